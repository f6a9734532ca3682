"""From a 16-bit model folder to a quantised one, a decoder block at a time.

Each block is calibrated on what the quantised blocks before it make of the text, and inside a block
each stage on what the quantised stages before it do: later layers see, and may repair, the errors
of earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.formats import get_format
from vllm_quantkit.quantize.awq import awq_scales, fold
from vllm_quantkit.quantize.calibration import BlockInputs, InputStats, input_stats
from vllm_quantkit.quantize.checkpoint import exchange_layers, refuse_existing, write_checkpoint
from vllm_quantkit.quantize.methods import Method
from vllm_quantkit.quantize.model_map import Stage, model_map
from vllm_quantkit.quantize.rtn import finite_weight
from vllm_quantkit.spec import SchemeSpec, WeightSpec


@dataclass
class Quantized:
    """What quantising a model produced, by the names of its modules and parameters.

    Attributes:
        layers: layer to its codes.
        errors: layer to |X (W - Q)^T| / |X W^T| on the calibration text.
        changed: 16-bit parameters that folding changed, such as norm weights.
    """

    layers: dict[str, QuantizedWeight] = field(default_factory=dict)
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
    for name, parameter in model.named_parameters():
        with _naming(name):
            finite_weight(parameter)
    layout = model_map(model.config.model_type)
    modules = model.get_submodule(layout.blocks)
    inputs, result = BlockInputs(model, modules, batches), Quantized()
    for index, module in enumerate(modules):
        run = partial(inputs.run, index, module)
        block = Block(f"{layout.blocks}.{index}", module, layout.stages, run)
        if method.scales_channels:
            width = _head_width(model.config)
            for name, value in scale_block(block, method.spec, dtype=dtype, head_width=width):
                result.changed[name] = value
        for name, codes, error in quantize_block(block, method):
            result.layers[name], result.errors[name] = codes, error
            progress(name, error)
        inputs.hidden = run()
    return result


@dataclass(frozen=True)
class Block:
    """A decoder block under work.

    Attributes:
        name: of the block in the model.
        module: the block in float32; its parameters are changed in place.
        stages: its linear layers, in the order they run.
        run: runs it over its calibration inputs.
    """

    name: str
    module: nn.Module
    stages: tuple[Stage, ...]
    run: Callable[[], object]

    def weight(self, layer: str) -> nn.Parameter:
        """The weight of the layer that has this name inside the block."""
        return self.module.get_submodule(layer).get_parameter("weight")

    def stats(self, *stages: Stage) -> list[InputStats]:
        """The input moments of each stage, all from one run."""
        layers = {stage.layers[0]: self.module.get_submodule(stage.layers[0]) for stage in stages}
        return list(input_stats(self.run, layers).values())


def scale_block(
    block: Block, spec: WeightSpec, *, dtype: torch.dtype, head_width: int
) -> Iterator[tuple[str, Tensor]]:
    """Folds AWQ's channel scales into the block, which stays the same function.

    Args:
        block: changed in place.
        spec: the numerics that the search rounds to.
        dtype: what the checkpoint stores unquantised parameters in.
        head_width: channels of an attention head.

    Yields:
        name and value of the parameters that changed and are not weights of quantised layers.

    Raises:
        QuantkitError: a scale cannot be stored; names the layers.
    """
    linears = {name for stage in block.stages for name in stage.layers}
    every_stats = block.stats(*block.stages)
    for stage, stats in zip(block.stages, every_stats, strict=True):
        previous = block.module.get_submodule(stage.previous)
        weights = [block.weight(name) for name in stage.layers]
        repeats = weights[0].shape[1] // len(block.weight(stage.previous))
        heads = {"repeats": repeats, "width": head_width if repeats > 1 else 1}
        with _naming(f"{block.name}.{', '.join(stage.layers)}"):
            scales = awq_scales(weights, stats, spec, **heads)
        fold(previous, weights, scales, dtype=dtype, **heads)
        for name, value in previous.named_parameters():
            if name != "weight" or stage.previous not in linears:
                yield f"{block.name}.{stage.previous}.{name}", value.detach()


def quantize_block(block: Block, method: Method) -> Iterator[tuple[str, QuantizedWeight, float]]:
    """Replaces the block's linear weights by dequantised codes, stage by stage.

    Args:
        block: changed in place.
        method: rounds the weights.

    Yields:
        name, codes and relative output error of each layer.

    Raises:
        QuantkitError: a weight cannot be quantised; names it.
    """
    for stage in block.stages:
        (stats,) = block.stats(stage)
        for layer in stage.layers:
            weight, name = block.weight(layer), f"{block.name}.{layer}"
            with _naming(name):
                codes = method.quantize(weight, stats)
            rounded = codes.dequantize()
            yield name, codes, relative_error(weight.detach(), rounded, stats.hessian)
            weight.data.copy_(rounded)


def relative_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """sqrt(tr(E H E^T) / tr(W H W^T)) = |X E^T| / |X W^T|, E = W - rounded; all float32."""
    error, size = (((x @ hessian) * x).sum() for x in (weight - rounded, weight))
    return float((error / size).clamp_min(0).sqrt()) if size > 0 else 0.0


@contextmanager
def _naming(subject: str) -> Iterator[None]:
    """Says in any error what it is about."""
    try:
        yield
    except QuantkitError as error:
        raise type(error)(f"{subject}: {error}") from error


def _head_width(config: PreTrainedConfig) -> int:
    """Channels of an attention head."""
    stated = getattr(config, "head_dim", None)
    return int(stated or config.hidden_size // config.num_attention_heads)
