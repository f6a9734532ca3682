"""vLLM's products of 8-bit weights and activations: CUTLASS, Triton and DeepGEMM."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gpu.contender import E4M3_ROWS, EXACT, INT8_ROWS, SHORT_SUMS, Contender, Layer
from benchmarks.gpu.problems import BLOCK_FP8, FP8, FP8_BLOCK, INT8
from quantkit_kernels.wna16 import QuantizedWeight

OUT = torch.bfloat16
Product = Literal["cutlass", "triton"]


class ScaledLayer(Layer):
    """8-bit activations; quantised by each call, or before, where only the product is timed."""

    def __init__(self, *, product_only: bool) -> None:
        self.product_only = product_only

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [M, K] and scales [M, groups] of x."""

    @abstractmethod
    def product(self, codes: Tensor, scales: Tensor) -> Any:
        """y from quantised activations."""

    def prepare(self, x: Tensor) -> Any:
        """x, or what is made of it where only the product is timed."""
        return self.quantize(x) if self.product_only else x

    def seen(self, inputs: Any) -> Tensor:
        """What the inputs stand for."""
        if not self.product_only:
            return super().seen(inputs)
        codes, scales = inputs
        width = codes.shape[1] // scales.shape[1]
        return codes.float() * scales.repeat_interleave(width, 1)

    def __call__(self, inputs: Any) -> Any:
        """y = Q(x) W^T."""
        return self.product(*(inputs if self.product_only else self.quantize(inputs)))


class PerToken(ScaledLayer):
    """One scale for each token and output channel, int8 or E4M3.

    Raises:
        ImportError: vLLM is not installed, or not built for CUDA.
    """

    def __init__(self, weight: QuantizedWeight, how: Product, *, product_only: bool) -> None:
        super().__init__(product_only=product_only)
        cuda_ops()
        self.how = how
        integer = weight.code_type == "int"
        codes = (weight.codes ^ 128).view(torch.int8) if integer else e4m3(weight)
        self.codes, self.scales = codes.T, weight.scales.contiguous()  # [K, N] column-major, [N, 1]

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By vLLM's kernel, per token."""
        ops = cuda_ops()
        if self.codes.dtype == torch.int8:
            codes, scales, _ = ops.scaled_int8_quant(x)
            return codes, scales
        codes, scales = ops.scaled_fp8_quant(x, use_per_token_if_dynamic=True)
        return codes, scales

    def product(self, codes: Tensor, scales: Tensor) -> Any:
        """y = (q W^T) scales."""
        if self.how == "cutlass":
            return cuda_ops().cutlass_scaled_mm(codes, self.codes, scales, self.scales, OUT)
        from vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm import (
            triton_scaled_mm,
        )

        return triton_scaled_mm(codes, self.codes, scales, self.scales, OUT)


class PerBlock(ScaledLayer):
    """One scale for 128 channels of a token, and for 128 x 128 values of the weight.

    Raises:
        ImportError: vLLM is not installed, or not built for CUDA.
    """

    def __init__(self, weight: QuantizedWeight, how: Product, *, product_only: bool) -> None:
        super().__init__(product_only=product_only)
        cuda_ops()
        self.how = how
        self.codes = e4m3(weight)
        self.scales = weight.scales[::FP8_BLOCK].contiguous()  # [N / 128, K / 128]

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By vLLM's kernel, in groups; CUTLASS takes scales in columns."""
        from vllm.model_executor.layers.quantization.utils.fp8_utils import (
            per_token_group_quant_fp8,
        )

        codes, scales = per_token_group_quant_fp8(
            x, FP8_BLOCK, column_major_scales=self.how == "cutlass", use_ue8m0=False
        )
        return codes, scales

    def product(self, codes: Tensor, scales: Tensor) -> Any:
        """y, each block scaled by its two scales."""
        if self.how == "cutlass":
            weight = self.codes.T, scales, self.scales.T
            return cuda_ops().cutlass_scaled_mm(codes, *weight, OUT)
        from vllm.model_executor.layers.quantization.utils.fp8_utils import (
            w8a8_triton_block_scaled_mm,
        )

        block = [FP8_BLOCK, FP8_BLOCK]
        return w8a8_triton_block_scaled_mm(codes, self.codes, scales, self.scales, block, OUT)


class DeepGemm(ScaledLayer):
    """DeepGEMM's block FP8, as vLLM's layer prepares and calls it.

    Raises:
        ImportError: vLLM or DeepGEMM is not installed.
    """

    def __init__(self, weight: QuantizedWeight, *, product_only: bool) -> None:
        from vllm.model_executor.layers.quantization.utils.fp8_utils import (
            deepgemm_post_process_fp8_weight_block,
        )
        from vllm.utils.deep_gemm import is_deep_gemm_supported

        super().__init__(product_only=product_only)
        if not is_deep_gemm_supported():
            raise ImportError("vLLM finds no deep_gemm, or not for this GPU")
        self.codes, self.scales = deepgemm_post_process_fp8_weight_block(
            wq=e4m3(weight),
            ws=weight.scales[::FP8_BLOCK].contiguous(),
            quant_block_shape=(FP8_BLOCK, FP8_BLOCK),
            use_e8m0=False,
        )

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By vLLM's kernel, in groups, scales as TMA reads them."""
        from vllm.model_executor.layers.quantization.utils.fp8_utils import (
            per_token_group_quant_fp8,
        )

        how = {"column_major_scales": True, "tma_aligned_scales": True, "use_ue8m0": False}
        codes, scales = per_token_group_quant_fp8(x, FP8_BLOCK, **how)
        return codes, scales

    def product(self, codes: Tensor, scales: Tensor) -> Tensor:
        """y, each block scaled by its two scales."""
        from vllm.utils.deep_gemm import fp8_gemm_nt

        y = torch.empty(codes.shape[0], self.codes.shape[0], dtype=OUT, device=codes.device)
        weight = self.codes, self.scales
        fp8_gemm_nt((codes, scales), weight, y, is_deep_gemm_e8m0_used=False)
        return y


def e4m3(weight: QuantizedWeight) -> Tensor:
    """Its codes as float8_e4m3fn [N, K]."""
    return weight.codes.view(torch.float8_e4m3fn)


@cache
def cuda_ops() -> Any:
    """vLLM's custom operations.

    Raises:
        ImportError: vLLM is not installed, or not built for CUDA.
    """
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        raise ImportError("the vLLM installed here is not built for CUDA")
    return _custom_ops


def contenders() -> list[Contender]:
    """All of them, with and without the quantisation of x where both are compared."""
    found = []
    scaled = ((FP8, "FP8", E4M3_ROWS, SHORT_SUMS), (INT8, "W8A8", INT8_ROWS, EXACT))
    for kind, label, limit, product_limit in scaled:
        whole = partial(PerToken, how="cutlass", product_only=False)
        found.append(Contender(f"CUTLASS {label}", kind, whole, limit))
        for how, owner in (("cutlass", "CUTLASS"), ("triton", "vLLM Triton")):
            product = partial(PerToken, how=how, product_only=True)
            found.append(Contender(f"{owner} {label}, product", kind, product, product_limit))
    blocks = {
        "CUTLASS": partial(PerBlock, how="cutlass"),
        "vLLM Triton": partial(PerBlock, how="triton"),
        "DeepGEMM": DeepGemm,
    }
    for owner, make in blocks.items():
        whole, product = (partial(make, product_only=only) for only in (False, True))
        found.append(Contender(f"{owner} FP8 block", BLOCK_FP8, whole, E4M3_ROWS))
        found.append(Contender(f"{owner} FP8 block, product", BLOCK_FP8, product, EXACT))
    return found
