"""From a 16-bit model folder to a quantised one, a decoder block at a time.

Each block is calibrated on what the quantised blocks before it make of the text, and inside a block
each stage on what the quantised stages before it do: later layers see, and may repair, the errors
of earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from quantkit_kernels.wna16 import IntWeight
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.formats import get_format
from vllm_quantkit.quantize.awq import awq_scales, fold
from vllm_quantkit.quantize.calibration import BlockInputs, InputStats, input_stats
from vllm_quantkit.quantize.checkpoint import exchange_layers, refuse_existing, write_checkpoint
from vllm_quantkit.quantize.methods import Method
from vllm_quantkit.quantize.model_map import ModelMap, Stage, model_map
from vllm_quantkit.spec import SchemeSpec, WeightSpec


@dataclass
class Quantized:
    """What quantising a model produced, by the names of its modules and parameters.

    Attributes:
        layers: layer to its codes.
        errors: layer to |X (W - Q)^T| / |X W^T| on the calibration text.
        changed: 16-bit parameters that folding changed, such as norm weights.
    """

    layers: dict[str, IntWeight] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)


def quantize_folder(
    source: Path,
    out: Path,
    scheme: SchemeSpec,
    method: Callable[[WeightSpec], Method],
    batches: Iterable[Tensor],
    *,
    progress: Callable[[str, float], None] = lambda name, error: None,
) -> tuple[PreTrainedModel, Quantized]:
    """`out` = `source` with the decoder blocks' linear layers as `scheme` stores them.

    Args:
        source: a transformers model folder.
        out: must not exist.
        scheme: how layers are stored.
        method: one of `METHODS`; rounds the weights to the scheme's numerics.
        batches: int64 [B, T] token ids to calibrate on.
        progress: called with each layer's name and relative output error.

    Returns:
        the model in float32 with dequantised weights, and what was written.

    Raises:
        QuantkitError: the model's type is unknown, or a weight cannot be quantised.
        CheckpointError: `out` exists, or `source` does not hold what the model has.
    """
    refuse_existing(out)
    stored = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    dtype = stored.dtype
    model = stored.float().eval()
    result = quantize_model(model, method(scheme.weight), batches, dtype=dtype, progress=progress)
    changed = {name: {name: value.to(dtype)} for name, value in result.changed.items()}
    exchange = exchange_layers(result.layers, scheme) | changed
    keep = model_map(model.config.model_type).keep
    config = {"quantization_config": get_format(scheme.dialect).render(scheme, keep)}
    write_checkpoint(source, out, exchange, config)
    return model, result


def quantize_model(
    model: PreTrainedModel,
    method: Method,
    batches: Iterable[Tensor],
    *,
    dtype: torch.dtype,
    progress: Callable[[str, float], None] = lambda name, error: None,
) -> Quantized:
    """Replaces the blocks' linear weights by their dequantised codes, in place.

    Args:
        model: a causal language model in float32.
        method: rounds the weights.
        batches: int64 [B, T] token ids to calibrate on.
        dtype: what the checkpoint stores unquantised parameters in.
        progress: as in `quantize_folder`.

    Raises:
        QuantkitError: the model's type is unknown, or a weight cannot be quantised.
    """
    layout = model_map(model.config.model_type)
    blocks = model.get_submodule(layout.blocks)
    inputs, result = BlockInputs(model, blocks, batches), Quantized()
    for index, block in enumerate(blocks):
        prefix, run = f"{layout.blocks}.{index}", partial(inputs.run, index, block)
        if method.scales_channels:
            width = _head_width(model.config)
            for name in scale_block(block, layout, method, run, dtype=dtype, head_width=width):
                result.changed[f"{prefix}.{name}"] = block.get_parameter(name).detach()
        for name, codes, error in quantize_block(block, layout, method, run):
            result.layers[f"{prefix}.{name}"], result.errors[f"{prefix}.{name}"] = codes, error
            progress(f"{prefix}.{name}", error)
        inputs.hidden = run()
    return result


def scale_block(
    block: nn.Module,
    layout: ModelMap,
    method: Method,
    run: Callable[[], object],
    *,
    dtype: torch.dtype,
    head_width: int,
) -> Iterator[str]:
    """Folds AWQ's channel scales into the block, which stays the same function.

    Args:
        block: a decoder block in float32, changed in place.
        layout: names its layers.
        method: gives the numerics that the search rounds to.
        run: runs the block over its calibration inputs.
        dtype: what the checkpoint stores unquantised parameters in.
        head_width: channels of an attention head.

    Yields:
        names of the parameters that changed and are not weights of quantised layers.
    """
    every_stats = _stage_stats(block, layout.stages, run)
    for stage, stats in zip(layout.stages, every_stats, strict=True):
        previous = block.get_submodule(stage.previous)
        consumers = [block.get_submodule(name) for name in stage.layers]
        repeats = stats.mean_abs.numel() // len(previous.get_parameter("weight"))
        heads = {"repeats": repeats, "width": head_width if repeats > 1 else 1}
        weights = [consumer.get_parameter("weight") for consumer in consumers]
        scales = awq_scales(weights, stats, method.spec, **heads)
        fold(previous, consumers, scales, dtype=dtype, **heads)
        quantised = any(stage.previous in other.layers for other in layout.stages)
        for name, _ in previous.named_parameters():
            if name == "bias" or not quantised:
                yield f"{stage.previous}.{name}"


def quantize_block(
    block: nn.Module, layout: ModelMap, method: Method, run: Callable[[], object]
) -> Iterator[tuple[str, IntWeight, float]]:
    """Replaces the block's linear weights by dequantised codes, stage by stage.

    Args:
        block: a decoder block in float32, changed in place.
        layout: names its layers.
        method: rounds the weights.
        run: runs the block over its calibration inputs.

    Yields:
        name, codes and relative output error of each layer.

    Raises:
        QuantkitError: a weight cannot be quantised; names it.
    """
    for stage in layout.stages:
        (stats,) = _stage_stats(block, (stage,), run)
        for name in stage.layers:
            weight = block.get_submodule(name).get_parameter("weight")
            try:
                codes = method.quantize(weight, stats)
            except QuantkitError as error:
                raise QuantkitError(f"{name}: {error}") from error
            rounded = codes.dequantize()
            yield name, codes, relative_error(weight.detach(), rounded, stats.hessian)
            weight.data.copy_(rounded)


def relative_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """sqrt(tr(E H E^T) / tr(W H W^T)) = |X E^T| / |X W^T|, E = W - rounded; all float32."""
    error, size = (((x @ hessian) * x).sum() for x in (weight - rounded, weight))
    return float((error / size).clamp_min(0).sqrt()) if size > 0 else 0.0


def _stage_stats(
    block: nn.Module, stages: tuple[Stage, ...], run: Callable[[], object]
) -> list[InputStats]:
    """The input moments of each stage, all from one run."""
    layers = {stage.layers[0]: block.get_submodule(stage.layers[0]) for stage in stages}
    return list(input_stats(run, layers).values())


def _head_width(config: PreTrainedConfig) -> int:
    """Channels of an attention head."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)
