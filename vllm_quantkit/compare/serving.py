"""A row as an engine: how it is started, and what it takes by the headers of its files."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from vllm_quantkit.bench.schemes import Scheme, make_spec, model_config
from vllm_quantkit.compare.result import Bits, Facts
from vllm_quantkit.compare.rows import BASE, Row
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.footprint import (
    KVCache,
    LayerGroup,
    Workload,
    footprint,
    kv_cache_for,
    layer_groups,
    read_model,
)
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.kv_calibration import read_kv_calibration
from vllm_quantkit.options import Options, read_options
from vllm_quantkit.schemes.registry import SCHEMES
from vllm_quantkit.spec import SchemeSpec

SIXTEEN = 16


def engine_of(
    row: Row, common: EngineSpec, checkpoint: Path | None, calibration: Path | None
) -> EngineSpec:
    """The engine that serves a row.

    Args:
        row: which.
        common: the 16-bit model, and what all engines have in common.
        checkpoint: that was made for the row; None where none was.
        calibration: of the KV cache, for a row whose cache has 4 bits.

    Raises:
        QuantkitError: the row's method does not fit its checkpoint.
    """
    folder = checkpoint or row.folder
    scheme = Scheme(
        label=row.name,
        model=None if folder is None else str(folder),
        method=row.method or (BASE.name if folder is None else None),
        int4_cache=row.kv4,
    )
    spec = make_spec(scheme, common.model, common, model_config)
    return spec if calibration is None else _calibrated(spec, calibration)


def serve_command(spec: EngineSpec) -> str:
    """The command that serves the same."""
    words = ["vllm", "serve", spec.model]
    if spec.quantization is not None:
        words += ["--quantization", spec.quantization]
    options = dict(spec.options)
    if additional := options.get("additional_config"):
        words += ["--additional-config", json.dumps(additional)]
    if (ranks := options.get("tensor_parallel_size", 1)) > 1:
        words += ["--tensor-parallel-size", str(ranks)]
    return shlex.join(words)


def facts_of(spec: EngineSpec, device: Device) -> Facts:
    """Bits and bytes of an engine's weights and KV cache, on one rank.

    Raises:
        QuantkitError: see `read_model` and `footprint`.
    """
    model = read_model(spec.model)
    options = dict(spec.options)
    given = read_options(options.get("additional_config") or {})
    ranks = int(options.get("tensor_parallel_size", 1))
    method = spec.quantization if spec.quantization in SCHEMES else None
    cache = cache_of(method, given)
    found = footprint(
        model,
        method=method,
        device=device,
        kv=cache,
        options=given,
        tp=ranks,
        workload=Workload(max_model_len=spec.max_model_len),
    )
    # What a method of vLLM's own makes of a 16-bit model is not known here.
    foreign = spec.quantization is not None and method is None
    known = not foreign or model.facts.quantization_config is not None
    groups = layer_groups(model, method, given, ranks) if known else ()
    return Facts(
        bits=Bits(
            weights=_widths(groups, lambda scheme: scheme.weight.bits),
            activations=_widths(groups, _activation_bits),
            kv=_cache_bits(cache),
        ),
        weight_bytes=found.weight_bytes if known else None,
        weight_bytes_16bit=found.weight_bytes_16bit,
        kv_bytes_per_token=found.kv_bytes_per_token,
    )


def cache_of(method: str | None, options: Options) -> KVCache:
    """How keys and values are stored; layers that a calibration keeps in 16 bits are known."""
    cache = kv_cache_for(method, options)
    folder = options.kv_cache.calibration
    if cache.dtype != "int4" or folder is None:
        return cache
    records = read_kv_calibration(folder).summary.layers
    kept = {place for place, record in enumerate(records) if record.dtype != "int4"}
    return cache.model_copy(update={"skip_layers": tuple(sorted({*cache.skip_layers, *kept}))})


def _calibrated(spec: EngineSpec, calibration: Path) -> EngineSpec:
    """With what `quantkit calibrate-kv` wrote."""
    options = dict(spec.options)
    additional = options.get("additional_config") or {}
    quantkit = additional.get("quantkit", {})
    cache = {**quantkit.get("kv_cache", {}), "calibration": str(calibration)}
    options["additional_config"] = {**additional, "quantkit": {**quantkit, "kv_cache": cache}}
    return replace(spec, options=tuple(options.items()))


def _widths(groups: Iterable[LayerGroup], bits: Callable[[SchemeSpec], int]) -> tuple[int, ...]:
    """Of the blocks' linear layers, each once; 16 for those that are not quantised."""
    inside = (group for group in groups if not group.head)
    return tuple(sorted({SIXTEEN if g.spec is None else bits(g.spec) for g in inside}))


def _activation_bits(scheme: SchemeSpec) -> int:
    return SIXTEEN if scheme.activation is None else 8


def _cache_bits(cache: KVCache) -> tuple[int, ...]:
    width = {"auto": SIXTEEN, "fp8": 8, "int4": 4}[cache.dtype]
    return (width, SIXTEEN) if cache.skip_layers else (width,)
