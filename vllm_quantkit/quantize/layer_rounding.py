"""Layers that read one input become codes, stored tensors and a record of what that cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit_kernels.act_quant.reference import reference_quantize
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import QuantkitError, about
from vllm_quantkit.formats import Role
from vllm_quantkit.quantize.methods.rounding import Rounded, round_weights
from vllm_quantkit.quantize.methods.transforms import ChannelScales
from vllm_quantkit.quantize.observation.observing import quantize_inputs, row_quantizer
from vllm_quantkit.quantize.observation.stability import (
    refuse_unstable_static,
    scale_disagreement,
    static_input_scale,
)
from vllm_quantkit.quantize.observation.statistics import InputStats
from vllm_quantkit.quantize.output.checkpoint import encode_layer, scale_dtype_for
from vllm_quantkit.quantize.output.records import LayerRecord
from vllm_quantkit.quantize.output.verify import weight_digest
from vllm_quantkit.quantize.plan import LayerPlan
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe
from vllm_quantkit.spec import SchemeSpec

NOT_SCALED = "Channels were not scaled: no op before the layer can take the scales."


@dataclass(frozen=True)
class RoundedLayer:
    """What became of a layer.

    Attributes:
        layer: what was planned.
        weight: its codes.
        inputs: INPUT_SCALE and INPUT_ZERO of static activations.
        tensors: all of it as the checkpoint stores it, by full name.
        record: what it cost.
    """

    layer: LayerPlan
    weight: QuantizedWeight
    inputs: Mapping[Role, Tensor]
    tensors: Mapping[str, Tensor]
    record: LayerRecord


def round_layers(
    layers: Sequence[LayerPlan],
    weights: Sequence[Tensor],
    stats: InputStats | None,
    scales: ChannelScales | None,
    stored_dtype: torch.dtype,
) -> list[RoundedLayer]:
    """Rounds layers that read the same input, all with the recipe of the first.

    Args:
        layers: all quantised, and alike.
        weights: float32 [N_i, K], channel scales folded in.
        stats: of the input, divided by the scales; None where no token was seen.
        scales: that were folded in; None where none were.
        stored_dtype: of the model's other tensors.

    Raises:
        QuantkitError: a weight is not finite, or a static scale cannot be trusted.
    """
    recipe, scheme = layers[0].recipe, layers[0].scheme
    if recipe is None or scheme is None:
        raise ValueError(f"{layers[0].stored} stays in 16 bits")
    names = ", ".join(layer.stored for layer in layers)
    scale_dtype = scale_dtype_for(scheme, stored_dtype)
    with about(names):
        rounded = round_weights(weights, stats, recipe, scale_dtype=scale_dtype)
    inputs = _static_inputs(names, recipe, stats)
    common = _common_record(recipe, scheme, stats, scales)
    return [
        RoundedLayer(
            layer=layer,
            weight=codes.weight,
            inputs=inputs,
            tensors=_stored_tensors(layer, scheme, codes, inputs, scale_dtype),
            record=_finish_record(common, layer, recipe, stats, weight, codes),
        )
        for layer, weight, codes in zip(layers, weights, rounded, strict=True)
    ]


def install_layer(
    block: nn.Module, layer: LayerPlan, weight: QuantizedWeight, inputs: Mapping[Role, Tensor]
) -> None:
    """The layer now multiplies by its dequantised codes, and quantises what it reads."""
    linear = block.get_submodule(layer.name)
    linear.get_parameter("weight").data.copy_(weight.dequantize())
    activation = None if layer.scheme is None else layer.scheme.activation
    if activation is not None:
        scale, zero = inputs.get(Role.INPUT_SCALE), inputs.get(Role.INPUT_ZERO)
        quantize_inputs(linear, activation, scale, zero)


def output_error(
    stats: InputStats | None, recipe: LayerRecipe, weight: Tensor, dequantized: Tensor
) -> float | None:
    """|X W^T - X' Q^T| / |X W^T| on the inputs kept, X' = X as the layer will read it."""
    if stats is None or not len(stats.sample):
        return None
    x = read = stats.sample
    if recipe.activation is not None and recipe.activation.dynamic:
        read = reference_quantize(x, row_quantizer(recipe.activation)).dequantize()
    wanted = x @ weight.T
    size = wanted.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return float((wanted - read @ dequantized.T).norm() / size)


def _static_inputs(names: str, recipe: LayerRecipe, stats: InputStats | None) -> dict[Role, Tensor]:
    activation = recipe.activation
    if activation is None or activation.dynamic:
        return {}
    if stats is None:
        raise QuantkitError(
            f"{names}: static activations need calibration tokens, but the layer saw none: use "
            "dynamic activations, or route all tokens to all experts (--route-all)."
        )
    refuse_unstable_static(names, stats.halves, activation)
    with about(names):
        scale, zero = static_input_scale(stats.ranges, activation)
    return {Role.INPUT_SCALE: scale} | ({} if zero is None else {Role.INPUT_ZERO: zero})


def _stored_tensors(
    layer: LayerPlan,
    scheme: SchemeSpec,
    codes: Rounded,
    inputs: Mapping[Role, Tensor],
    scale_dtype: torch.dtype,
) -> dict[str, Tensor]:
    encoded = encode_layer(codes.weight, scheme, inputs, scale_dtype=scale_dtype)
    return {f"{layer.stored}.{key}": tensor.cpu() for key, tensor in encoded.items()}


def _common_record(
    recipe: LayerRecipe, scheme: SchemeSpec, stats: InputStats | None, scales: ChannelScales | None
) -> LayerRecord:
    """What the record says of all the layers."""
    planned = recipe.transform != "none"
    scaled = scales is not None and scales.alpha is not None
    note = scales.note if scales is not None else NOT_SCALED if planned and stats else ""
    return LayerRecord(
        name="",
        scheme=scheme.describe(),
        method=f"{recipe.transform} + {recipe.rounding}" if scaled else recipe.rounding,
        weight_error=0.0,
        tokens=0 if stats is None else stats.ranges.tokens,
        disagreement=_disagreement(recipe, stats, scales),
        alpha=None if scales is None else scales.alpha,
        note=note,
    )


def _finish_record(
    common: LayerRecord,
    layer: LayerPlan,
    recipe: LayerRecipe,
    stats: InputStats | None,
    weight: Tensor,
    codes: Rounded,
) -> LayerRecord:
    dequantized = codes.weight.dequantize()
    size = weight.norm().clamp_min(torch.finfo(torch.float32).tiny)
    changes = {
        "name": layer.stored,
        "weight_error": float((weight - dequantized).norm() / size),
        "output_error": output_error(stats, recipe, weight, dequantized),
        "note": " ".join(part for part in (common.note, codes.note) if part),
        "digest": weight_digest(dequantized),
    }
    return common.model_copy(update=changes)


def _disagreement(
    recipe: LayerRecipe, stats: InputStats | None, scales: ChannelScales | None
) -> float | None:
    """How far apart the halves' scales are, with the exponent that was found."""
    if stats is None:
        return None
    if recipe.transform == "smoothquant" and scales is not None and scales.alpha is not None:
        recipe = recipe.model_copy(update={"alpha": scales.alpha})
    return scale_disagreement(stats.halves, recipe)
