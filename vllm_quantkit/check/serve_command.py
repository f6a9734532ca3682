"""The command line that starts an engine as a check was asked."""

from __future__ import annotations

import json
import shlex

from vllm_quantkit.check.request import CheckRequest


def serve_command(request: CheckRequest) -> str:
    """`vllm serve ...` with the flags that were given."""
    defaults = {name: field.default for name, field in CheckRequest.model_fields.items()}
    flags = {
        "revision": "--revision",
        "quantization": "--quantization",
        "tp": "--tensor-parallel-size",
        "dtype": "--dtype",
        "max_model_len": "--max-model-len",
        "max_num_seqs": "--max-num-seqs",
        "kv_cache_dtype": "--kv-cache-dtype",
        "memory_utilization": "--gpu-memory-utilization",
        "cache_bytes": "--kv-cache-memory-bytes",
    }
    words = ["vllm", "serve", request.model]
    for name, flag in flags.items():
        value = getattr(request, name)
        if value != defaults[name]:
            words += [flag, str(value)]
    words += ["--enforce-eager"] if request.enforce_eager else []
    if config := request.parsed_config():
        words += ["--additional-config", json.dumps(config)]
    variables = ["VLLM_BATCH_INVARIANT=1"] if request.batch_invariant else []
    if request.cpu_cache_space is not None:
        variables.append(f"VLLM_CPU_KVCACHE_SPACE={request.cpu_cache_space}")
    return " ".join([*variables, shlex.join(words)])
