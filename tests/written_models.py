"""Small models written the way the quantiser writes them: block by block, then one folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from quantkit_kernels.code_types import CODE_BOOKS, code_values
from quantkit_kernels.wna16 import QuantizedWeight
from tests.helpers import block_linears, output_major
from vllm_quantkit._safetensors import read_headers
from vllm_quantkit.formats import Role
from vllm_quantkit.quantize.methods.float8 import quantize_float8
from vllm_quantkit.quantize.methods.rtn import rtn, split_groups
from vllm_quantkit.quantize.output.checkpoint import (
    encode_layer,
    quantization_config,
    scale_dtype_for,
)
from vllm_quantkit.quantize.output.records import BlockRecord, LayerRecord
from vllm_quantkit.quantize.output.verify import weight_digest
from vllm_quantkit.quantize.output.workspace import Workspace
from vllm_quantkit.spec import SchemeSpec, WeightSpec

SchemeFor = Callable[[str], SchemeSpec | None]
"""Layer name to its scheme; None leaves it in 16 bits."""

INPUT_SCALE = 2.0**-4
"""Of static activations."""


@dataclass(frozen=True)
class WrittenModel:
    """A folder, and what it must hold.

    Attributes:
        folder: the checkpoint.
        schemes: quantised layer to its scheme.
        weights: quantised layer to its codes.
        records: what was noted of its blocks.
    """

    folder: Path
    schemes: dict[str, SchemeSpec]
    weights: dict[str, QuantizedWeight]
    records: tuple[BlockRecord, ...]


def write_model(source: Path, out: Path, scheme_for: SchemeFor) -> WrittenModel:
    """Rounds the linear layers of the blocks to nearest, and writes them as `scheme_for` says."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    linears = block_linears(model)
    found = {name: scheme_for(name) for name in linears}
    schemes = {name: scheme for name, scheme in found.items() if scheme is not None}
    ignore = ("lm_head", *(name for name, scheme in found.items() if scheme is None))
    dtype = read_headers(source)["model.norm.weight"].dtype
    weights = {name: round_layer(linears[name], s, dtype) for name, s in schemes.items()}
    config = {"quantization_config": quantization_config(schemes, ignore)}
    records = []
    with Workspace.create(out, {"schemes": len(schemes)}, resume=False) as workspace:
        for index in range(model.config.num_hidden_layers):
            names = [name for name in schemes if name.startswith(f"model.layers.{index}.")]
            records.append(record(index, {name: weights[name] for name in names}))
            tensors = block_tensors(weights, {name: schemes[name] for name in names}, dtype)
            workspace.write_block(index, tensors, records[-1])
        replaced = [f"{name}.weight" for name in schemes]
        workspace.finish(source, replaced, config, {"README.md": "written\n"})
    return WrittenModel(out, schemes, weights, tuple(records))


def round_layer(linear: nn.Module, scheme: SchemeSpec, dtype: torch.dtype) -> QuantizedWeight:
    """The layer's weight in the scheme's numerics, scales as they are stored."""
    weight, spec = output_major(linear), scheme.weight
    if spec.code_type in ("e4m3", "e5m2"):
        return quantize_float8(weight, spec)
    if spec.code_type in CODE_BOOKS:
        return round_to_book(weight, spec)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    scale_dtype = scale_dtype_for(scheme, dtype)
    return rtn(weight, spec, order=order if spec.act_order else None, scale_dtype=scale_dtype)


def round_to_book(weight: Tensor, spec: WeightSpec) -> QuantizedWeight:
    """The nearest value of the code book, times the largest magnitude of each group."""
    groups = split_groups(weight, spec.group_size)
    scales = groups.abs().amax(-1)
    distance = (groups / scales[..., None])[..., None] - code_values(spec.code_type)
    codes = distance.abs().argmin(-1).to(torch.uint8).flatten(1)[:, : weight.shape[1]]
    index = (torch.arange(weight.shape[1]) // spec.group_size).int()
    zeros = torch.zeros_like(scales, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros, index, spec.bits, spec.code_type)


def block_tensors(
    weights: dict[str, QuantizedWeight], schemes: dict[str, SchemeSpec], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of these layers by their full names."""
    return {
        f"{layer}.{name}": tensor
        for layer, scheme in schemes.items()
        for name, tensor in encode_layer(
            weights[layer],
            scheme,
            static_inputs(scheme),
            scale_dtype=scale_dtype_for(scheme, dtype),
        ).items()
    }


def static_inputs(scheme: SchemeSpec) -> dict[Role, Tensor]:
    """One scale where activations are static."""
    if scheme.activation is None or scheme.activation.dynamic:
        return {}
    return {Role.INPUT_SCALE: torch.tensor([INPUT_SCALE])}


def record(index: int, weights: dict[str, QuantizedWeight]) -> BlockRecord:
    """What a run notes, as far as reading back needs it."""
    layers = tuple(
        LayerRecord(
            name=name,
            scheme="",
            method="rtn",
            weight_error=0.0,
            digest=weight_digest(weight.dequantize()),
        )
        for name, weight in weights.items()
    )
    return BlockRecord(index=index, layers=layers)
