"""How the GPU benchmark calls vLLM: against its signatures, and definitions of what it calls.

vLLM's CUDA operations are replaced by their definitions in PyTorch, under the signatures of the
vLLM that is installed. A peer that passes the gate so hands over the right tensors in the right
layouts.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu import (
    gate,
    peers_vllm_fused,
    peers_vllm_scaled,
    peers_vllm_weights,
    problems,
    serving_models,
)
from benchmarks.gpu.contender import Contender
from benchmarks.gpu.inputs import load
from benchmarks.gpu.problems import FP8_BLOCK, Problem
from quantkit_kernels.act_quant import (
    RowQuantizer,
    reference_add,
    reference_quantize,
    reference_rms_norm,
    reference_silu_mul,
)
from quantkit_kernels.packing import unpack_aligned
from vllm_quantkit.formats.awq import decode_gemm

QUANTIZATION = "vllm.model_executor.layers.quantization"
TINY = (
    Problem("linear", 256, 384),
    Problem("norm", 256, 256, "add_rms_norm"),
    Problem("silu", 256, 256, "silu_mul"),
)

Patch = Callable[[str, str, Callable[..., Any]], None]


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "LINEAR_ROWS", (1, 33))
    monkeypatch.setattr(problems, "FUSED_ROWS", (3,))


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """Replaces a function by another under its own signature."""

    def replace(module: str, name: str, definition: Callable[..., Any]) -> None:
        holder = import_module(module)
        original = getattr(holder, name)
        monkeypatch.setattr(holder, name, create_autospec(original, side_effect=definition))

    return replace


def names(module: Any) -> list[Any]:
    return [pytest.param(c, id=f"{c.op} {c.name}") for c in module.contenders()]


def passes(contender: Contender) -> None:
    (verdict,) = gate.judge(contender, TINY, "cpu")
    assert verdict.reason == ""
    if contender.op == "linear":
        reads_other_memory(contender)


def reads_other_memory(contender: Contender) -> None:
    """A deep copy of its layer computes the same, also when the layer's own tensors are gone."""
    generator = torch.Generator().manual_seed(0)
    layer = load(contender, TINY[0], generator).layer
    inputs = layer.prepare(torch.randn(2, TINY[0].k).bfloat16())
    y, other = layer(inputs), copy.deepcopy(layer)
    for tensor in tensors_of(layer):
        tensor.zero_()
    assert not torch.equal(layer(inputs), y)
    assert torch.equal(other(inputs), y)


def tensors_of(holder: Any) -> list[Tensor]:
    """Of an object, and of the module it may hold."""
    found = [value for value in vars(holder).values() if isinstance(value, Tensor)]
    modules = [value for value in vars(holder).values() if isinstance(value, nn.Module)]
    return found + [tensor.data for module in modules for tensor in module.parameters()]


def dequantised(words: Tensor, scales: Tensor, zeros: Tensor | float, bits: int) -> Tensor:
    """float32 [K, N] from codes packed along K, scales and zeros [G, N]."""
    codes = unpack_aligned(words.T.contiguous(), bits, words.shape[0] * 32 // bits).T.float()
    group = len(codes) // len(scales)
    spread = zeros.repeat_interleave(group, 0) if isinstance(zeros, Tensor) else zeros
    return (codes - spread) * scales.float().repeat_interleave(group, 0)


def marlin_product(**given: Any) -> Tensor:
    """Of tensors whose permutations are left out."""
    kind, zeros = given["wtype"], given["weight_zp"]
    if zeros.numel() == 0:
        zeros = float(kind.bias)
    dense = dequantised(given["weight"], given["weight_scale"], zeros, kind.size_bits)
    size = given["input_size_per_partition"], given["output_size_per_partition"]
    assert dense.shape == size
    return (given["input"].float() @ dense).to(given["input"].dtype)


def machete_product(**given: Any) -> Tensor:
    kind = given["b_type"]
    assert given["b_group_zeros"] is None
    groups = given["b_group_scales"]
    assert given["b_group_size"] in (-1, given["a"].shape[1] // len(groups))
    dense = dequantised(given["b_q"], groups, float(kind.bias), kind.size_bits)
    return (given["a"].float() @ dense).to(given["a"].dtype)


def triton_product(
    a: Tensor, b_q: Tensor, scales: Tensor, qzeros: Tensor | None, group_size: int, zp_bias: int = 8
) -> Tensor:
    """Codes packed along N."""
    codes = unpack_aligned(b_q, 4, b_q.shape[1] * 8).float()
    zeros: Tensor | float = float(zp_bias)
    if qzeros is not None:
        zeros = unpack_aligned(qzeros, 4, codes.shape[1]).float().repeat_interleave(group_size, 0)
    dense = (codes - zeros) * scales.float().repeat_interleave(group_size, 0)
    return (a.float() @ dense).to(a.dtype)


def awq_product(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, splits: int) -> Tensor:
    group = len(codes) // len(scales)
    spread = decode_gemm(zeros).T.float().repeat_interleave(group, 0)
    dense = (decode_gemm(codes).T.float() - spread) * scales.float().repeat_interleave(group, 0)
    return (x.float() @ dense).to(x.dtype)


@pytest.mark.parametrize("contender", names(peers_vllm_weights))
def test_weights(contender: Contender, patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = f"{peers_vllm_weights.KERNELS}."
    for module, name in (
        ("marlin", "Marlin"),
        ("machete", "Machete"),
        ("triton_w4a16", "TritonW4A16"),
    ):
        kernel = getattr(import_module(kernels + module), f"{name}LinearKernel")
        monkeypatch.setattr(kernel, "can_implement", staticmethod(lambda config: (True, None)))
    patch("vllm._custom_ops", "gptq_marlin_repack", lambda b_q_weight, **_: b_q_weight)
    patch("vllm._custom_ops", "machete_prepack_B", lambda b_q_weight, **_: b_q_weight)
    patch("vllm._custom_ops", "machete_mm", machete_product)
    marlin = kernels + "marlin"
    patch(marlin, "marlin_permute_scales", lambda s, **_: s)
    patch(marlin, "marlin_zero_points", lambda zp, **_: zp.float())
    patch(marlin, "apply_gptq_marlin_linear", marlin_product)
    if hasattr(import_module(marlin), "marlin_make_workspace_new"):  # gone later than 0.26
        patch(marlin, "marlin_make_workspace_new", lambda device, **_: torch.zeros(1))
    patch(kernels + "triton_w4a16", "triton_w4a16_gemm", triton_product)
    patch(f"{QUANTIZATION}.awq_triton", "awq_gemm_triton", awq_product)
    passes(contender)


def test_a_kernel_that_refuses_says_why() -> None:
    (marlin,) = (c for c in peers_vllm_weights.contenders() if c.name == "Marlin W8A16")
    (verdict,) = gate.judge(marlin, TINY, "cpu")
    assert verdict.reason.startswith("ValueError: ")


def rows_of(x: Tensor, code: Any, group: int = -1) -> tuple[Tensor, Tensor]:
    parts = reference_quantize(x, RowQuantizer(code, group))
    return parts.codes, parts.scales


def scaled_product(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    out_dtype: torch.dtype,
    bias: None = None,
) -> Tensor:
    """b [K, N]; scales [M, 1] and [N, 1], or [M, K / 128] and [K / 128, N / 128]."""
    assert b.stride(0) == 1
    x = a.float() * scale_a.repeat_interleave(a.shape[1] // scale_a.shape[1], 1)
    if scale_a.shape[1] == 1:
        assert scale_b.shape == (b.shape[1], 1)
        w = b.float() * scale_b.T
    else:
        assert scale_b.shape == (b.shape[0] // FP8_BLOCK, b.shape[1] // FP8_BLOCK)
        # CUTLASS reads columns of the activations' scales.
        assert len(a) == 1 or scale_a.stride(0) == 1
        w = b.float() * scale_b.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return (x @ w).to(out_dtype)


def block_product(
    codes: Tensor, weight: Tensor, sx: Tensor, sw: Tensor, block: list[int], dtype: torch.dtype
) -> Tensor:
    assert block == [FP8_BLOCK, FP8_BLOCK]
    x = codes.float() * sx.repeat_interleave(FP8_BLOCK, 1)
    w = weight.float() * sw.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return (x @ w.T).to(dtype)


def group_quant(x: Tensor, group_size: int, **how: Any) -> tuple[Tensor, Tensor]:
    codes, scales = rows_of(x, "e4m3", group_size)
    assert how["use_ue8m0"] is False
    return codes, scales.T.contiguous().T if how.get("column_major_scales") else scales.contiguous()


def fp8_rows(x: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    assert how == {"use_per_token_if_dynamic": True}
    return rows_of(x, "e4m3")


def deep_gemm(left: Any, right: Any, y: Tensor, **how: Any) -> None:
    assert how == {"is_deep_gemm_e8m0_used": False}
    y.copy_(block_product(*left[:1], right[0], left[1], right[1], [FP8_BLOCK] * 2, y.dtype))


def norm_rows(
    x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype, bound: None, residual: Tensor
) -> tuple[Tensor, Tensor]:
    total = reference_add(x, residual)
    residual.copy_(total)
    code = "int8" if dtype == torch.int8 else "e4m3"
    return rows_of(reference_rms_norm(total, weight, epsilon), code)


def silu_blocks(x: Tensor, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert dtype == torch.float8_e4m3fn
    return rows_of(reference_silu_mul(x), "e4m3", group_size)


@pytest.fixture
def cuda(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's operations, by definition."""
    from vllm import _custom_ops as ops

    definitions: dict[str, Callable[..., Any]] = {
        "scaled_int8_quant": lambda x: (*rows_of(x, "int8"), None),
        "scaled_fp8_quant": fp8_rows,
        "cutlass_scaled_mm": scaled_product,
        "rms_norm_dynamic_per_token_quant": norm_rows,
        "silu_and_mul_per_block_quant": silu_blocks,
    }
    fakes = {
        name: create_autospec(getattr(ops, name), side_effect=definition)
        for name, definition in definitions.items()
    }
    for module in (peers_vllm_scaled, peers_vllm_fused):
        monkeypatch.setattr(module, "cuda_ops", partial(SimpleNamespace, **fakes))
    triton = f"{QUANTIZATION}.compressed_tensors.triton_scaled_mm"
    patch(triton, "triton_scaled_mm", scaled_product)
    utils = f"{QUANTIZATION}.utils.fp8_utils"
    patch(utils, "w8a8_triton_block_scaled_mm", block_product)
    patch(utils, "per_token_group_quant_fp8", group_quant)
    patch(utils, "deepgemm_post_process_fp8_weight_block", lambda wq, ws, **_: (wq, ws))
    patch("vllm.utils.deep_gemm", "is_deep_gemm_supported", lambda: True)
    patch("vllm.utils.deep_gemm", "fp8_gemm_nt", deep_gemm)


@pytest.mark.parametrize("contender", names(peers_vllm_scaled))
def test_scaled(contender: Contender, cuda: None) -> None:
    passes(contender)


@pytest.mark.parametrize("contender", names(peers_vllm_fused))
def test_fused(contender: Contender, cuda: None) -> None:
    passes(contender)


@pytest.mark.parametrize("module", [peers_vllm_scaled, peers_vllm_fused])
def test_a_vllm_for_cpus_is_a_reason(module: Any) -> None:
    peers_vllm_scaled.cuda_ops.cache_clear()
    for contender in module.contenders():
        (verdict,) = gate.judge(contender, TINY, "cpu")
        assert verdict.reason.startswith("ImportError: ")


def test_vllm_reads_the_models(tmp_path: Path) -> None:
    specs = serving_models.make_specs(serving_models.TINY, tmp_path)
    for name in (serving_models.VLLM_AWQ, serving_models.VLLM_W8A8):
        content = json.loads((Path(specs[name].model) / "config.json").read_text())
        stored = content["quantization_config"]
        config_class = import_module(QUANTIZATION).get_quantization_config
        config_class(stored["quant_method"]).from_config(stored)
