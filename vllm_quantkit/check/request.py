"""What a check is asked: a model and how it would be served."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.spec import Frozen


class CheckRequest(Frozen):
    """A model and the flags of `vllm serve`, as far as they decide whether it works.

    Attributes:
        model: a transformers folder, or a name on the hub.
        revision: branch, tag or commit on the hub.
        quantization: `--quantization`; None for no flag.
        gpu: the device's name, see `hardware.find_device`; None for this machine's.
        tp: `--tensor-parallel-size`.
        vllm: a version; None for the installed one.
        dtype: `--dtype`; `auto` for the model's own.
        max_model_len: `--max-model-len`; None for the model's own.
        max_num_seqs: `--max-num-seqs`; None for vLLM's default.
        kv_cache_dtype: `--kv-cache-dtype`.
        memory_utilization: `--gpu-memory-utilization`.
        cache_bytes: `--kv-cache-memory-bytes`; None for what is left.
        cpu_cache_space: `VLLM_CPU_KVCACHE_SPACE`, GiB; only CPUs look at it.
        enforce_eager: `--enforce-eager`.
        additional_config: `--additional-config`, JSON.
        batch_invariant: `VLLM_BATCH_INVARIANT`.
    """

    model: str
    revision: str | None = None
    quantization: str | None = None
    gpu: str | None = None
    tp: int = Field(default=1, ge=1)
    vllm: str | None = None
    dtype: str = "auto"
    max_model_len: int | None = Field(default=None, gt=0)
    max_num_seqs: int | None = Field(default=None, gt=0)
    kv_cache_dtype: str = "auto"
    memory_utilization: float = Field(default=0.9, gt=0, le=1)
    cache_bytes: int | None = Field(default=None, gt=0)
    cpu_cache_space: int | None = Field(default=None, gt=0)
    enforce_eager: bool = False
    additional_config: str = "{}"
    batch_invariant: bool = False

    def parsed_config(self) -> Mapping[str, Any]:
        """`--additional-config` as vLLM takes it.

        Raises:
            ConfigError: it is no JSON object.
        """
        try:
            found = json.loads(self.additional_config)
        except ValueError as error:
            raise ConfigError(
                f"--additional-config {self.additional_config!r} is no JSON ({error}); write "
                f'\'{{"quantkit": {{"group_size": 64}}}}\'.'
            ) from None
        if not isinstance(found, Mapping):
            raise ConfigError(
                f"--additional-config {self.additional_config!r} is no JSON object; write "
                f'\'{{"quantkit": {{"group_size": 64}}}}\'.'
            )
        return found
