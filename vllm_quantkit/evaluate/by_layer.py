"""Which layers a quantised model's error comes from: measured in transformers, on a few windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.sensitivity import LayerSensitivity, SensitivityMethod
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.terminal import Terminal

if TYPE_CHECKING:
    from vllm_quantkit.evaluate.layer_pairs import LayerGroup


def measure_by_layer(
    spec: EngineSpec,
    base: EngineSpec,
    windows: Windows,
    method: SensitivityMethod,
    *,
    terminal: Terminal,
) -> tuple[LayerSensitivity, ...]:
    """What each group of layers, and each block, costs: the largest first, groups before blocks.

    Args:
        spec: the quantised model; the options that transformers knows.
        base: the 16-bit one.
        windows: of text; a few will do.
        method: how.
        terminal: is told how far it is.

    Raises:
        QuantkitError: transformers cannot run a model as the engine does, or they do not match.
    """
    from vllm_quantkit.evaluate.attribution import MEASURES
    from vllm_quantkit.evaluate.layer_pairs import group_layers, pair_layers
    from vllm_quantkit.evaluate.scorers import load_hf

    plain, served = load_hf(base), load_hf(spec)
    groups = group_layers(list(pair_layers(plain, served)))
    if not groups:
        raise ConfigError(
            f"{spec.model} has no quantised linear layer, so there is nothing to attribute: give a "
            "quantised checkpoint, or --quantization."
        )
    passes = len(windows.rows) * (1 if method == "fisher approximation" else len(groups))
    with terminal.phase("layers", passes) as tick:
        found = MEASURES[method](plain, served, groups, windows.rows, tick)
    bits = weight_bits(spec)
    rows = [_sensitivity(group, kl, method, bits) for group, kl in zip(groups, found, strict=True)]
    return tuple(sorted(rows, key=lambda row: (row.is_block, -row.kl)))


def weight_bits(spec: EngineSpec) -> dict[str, int]:
    """Bits of each quantised layer's weight, by its name in the checkpoint."""
    from vllm_quantkit.evaluate.hf_model import quantised_layers
    from vllm_quantkit.options import read_options
    from vllm_quantkit.quantize.hub import model_folder

    options = read_options(dict(spec.options).get("additional_config") or {})
    schemes = quantised_layers(model_folder(spec.model), spec.quantization, options)
    return {name: scheme.weight.bits for name, scheme in schemes.items()}


def _sensitivity(
    group: LayerGroup, kl: float, method: SensitivityMethod, bits: dict[str, int]
) -> LayerSensitivity:
    sizes = group.sizes
    return LayerSensitivity(
        group=group.name,
        members=tuple(sizes),
        kl=kl,
        method=method,
        bits=sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values()),
        is_block=group.is_block,
    )
