"""Whether all engines fit into memory at the same time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vllm_quantkit.bench.plan import BenchPlan
from vllm_quantkit.engine.client import ENVIRONMENT, EngineSpec
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.footprint import Footprint, Workload, footprint, read_model
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.options import read_options
from vllm_quantkit.schemes.registry import SCHEMES

GIB = 1 << 30
USABLE = 0.9
"""Of a device's memory, by all engines together."""

UTILIZATION = "gpu_memory_utilization"


@dataclass(frozen=True)
class Fit:
    """Whether engines run at the same time.

    Attributes:
        together: True where they do.
        why: a sentence, for the user.
        share: of a GPU's memory for each engine; None on CPUs, where vLLM takes what it needs.
    """

    together: bool
    why: str
    share: float | None = None

    def apply(self, spec: EngineSpec) -> EngineSpec:
        """The engine with its share of the GPU, unless it was given one."""
        options = dict(spec.options)
        if self.share is None or UTILIZATION in options:
            return spec
        return replace(spec, options=(*spec.options, (UTILIZATION, self.share)))


def fit(
    specs: Mapping[str, EngineSpec], plan: BenchPlan, device: Device, together: bool | None
) -> Fit:
    """What the user wants, or what memory allows.

    Args:
        specs: the engines.
        plan: what their caches have to hold.
        device: that they share.
        together: the user's wish; None for none.
    """
    share = round(USABLE / len(specs), 3) if device.kind == "cuda" else None
    if len(specs) == 1:
        return Fit(True, "one engine", None)
    if together is False:
        return Fit(False, "as asked", None)
    if together:
        return Fit(True, "as asked", share)
    try:
        lacking = _lacking_gpu(specs, plan, device, share) if share else _lacking_cpu(specs, device)
    except QuantkitError as error:
        why = f"the engines' memory cannot be told ({error})"
        return Fit(True, f"{why}; if they do not fit, give --one-at-a-time", share)
    if lacking:
        return Fit(False, lacking)
    return Fit(True, "all engines fit into memory", share)


def _lacking_cpu(specs: Mapping[str, EngineSpec], device: Device) -> str:
    """Why they do not fit into the host's memory; empty where they do."""
    cache = float({**ENVIRONMENT, **os.environ}["VLLM_CPU_KVCACHE_SPACE"]) * GIB
    found = [_footprint(spec, device, None) for spec in specs.values()]
    ranks = [int(dict(spec.options).get("tensor_parallel_size", 1)) for spec in specs.values()]
    each = [
        n * (f.weight_bytes + f.activation_bytes + f.overhead_bytes + cache)
        for n, f in zip(ranks, found, strict=True)
    ]
    # While the last one loads, it may hold its weights in 16 bits as well.
    needed = sum(each) + max(f.weight_bytes_16bit for f in found)
    usable = USABLE * device.memory_bytes
    if needed <= usable:
        return ""
    return f"{len(specs)} engines need {needed / GIB:.1f} GiB of {usable / GIB:.1f}"


def _lacking_gpu(
    specs: Mapping[str, EngineSpec], plan: BenchPlan, device: Device, share: float
) -> str:
    """Why they do not fit into the GPU's memory; empty where they do."""
    shares = {name: dict(spec.options).get(UTILIZATION, share) for name, spec in specs.items()}
    if sum(shares.values()) > 1:
        return f"{len(specs)} engines of {UTILIZATION} {max(shares.values())} exceed the GPU"
    tokens = max(plan.batch_tokens, plan.longest)
    for name, spec in specs.items():
        held = _footprint(spec, device, shares[name]).cache_tokens
        if held < tokens:
            return (
                f"in {shares[name]:.0%} of the GPU the cache of {name} holds {max(held, 0):,} "
                f"tokens, fewer than the {tokens:,} measured with"
            )
    return ""


def _footprint(spec: EngineSpec, device: Device, share: float | None) -> Footprint:
    """Of one engine; one of vLLM's own methods is taken for the checkpoint as it is stored."""
    options = dict(spec.options)
    workload = {
        "max_model_len": spec.max_model_len,
        "max_num_seqs": options.get("max_num_seqs"),
        "enforce_eager": options.get("enforce_eager", False),
        **({} if share is None else {"memory_utilization": share}),
    }
    return footprint(
        read_model(spec.model),
        method=spec.quantization if spec.quantization in SCHEMES else None,
        device=device,
        options=read_options(options.get("additional_config", {})),
        tp=int(options.get("tensor_parallel_size", 1)),
        workload=Workload.model_validate(workload),
    )
