"""Who serves a model: the method behind a flag, or without one vLLM, or the plugin unasked."""

from __future__ import annotations

from vllm_quantkit.check.plain import PlainLayer, choose
from vllm_quantkit.check.release import Release
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.footprint import Model
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.schemes import SCHEMES, get_method
from vllm_quantkit.spec import LayerShape, SchemeSpec

AUTO = "quantkit"
"""The method that claims, unasked, what vLLM itself refuses."""


def serving_method(
    quantization: str | None, model: Model, device: Device, release: Release, dtype: str
) -> str | None:
    """The method that serves; None for vLLM's own."""
    if quantization is not None:
        return quantization if quantization in SCHEMES else None
    return AUTO if _is_claimed(model, device, release, dtype) else None


def _is_claimed(model: Model, device: Device, release: Release, dtype: str) -> bool:
    """True for a checkpoint that the plugin reads and vLLM refuses.

    As the plugin does, vLLM is asked about a square layer of the model's hidden size.
    """
    config = model.facts.quantization_config
    if config is None:
        return False
    try:
        schemes = get_method(AUTO).rules(config).schemes
    except QuantkitError:
        return False
    hidden = LayerShape(out_features=model.facts.hidden_size, in_features=model.facts.hidden_size)
    method = str(config.get("quant_method", "")).lower()

    def refused(spec: SchemeSpec) -> bool:
        layer = PlainLayer(
            spec=spec,
            method=method,
            shape=hidden,
            rank_shape=hidden,
            rank_rows=(hidden.out_features,),
            dtype=dtype,
        )
        return choose(layer, device, release).serves == "no"

    return any(refused(spec) for spec in schemes)
