"""vLLM's layers with 4- and 8-bit weights and 16-bit activations: Marlin, Machete, Triton.

Each runs as vLLM's own linear layers run it, from a checkpoint's tensors in the layout of
compressed-tensors; vLLM rounds scales to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.gpu.contender import HALF_SUMS, ROUNDED, Contender, Layer
from benchmarks.gpu.problems import W4, W4_G32, W8
from quantkit_kernels.packing import pack_aligned
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.formats.awq import encode_gemm

KERNELS = "vllm.model_executor.kernels.linear.mixed_precision"
AWQ_SPLITS = 8
"""vLLM's AWQ layer asks for as many splits along k."""


class MixedPrecision(Layer):
    """A kernel class of `vllm.model_executor.kernels.linear.mixed_precision`.

    Args:
        weight: 4 or 8 bits.
        module: in which the class is.
        name: of the class.

    Raises:
        ImportError: vLLM is not installed, or has no such kernel.
        ValueError: the kernel refuses the layer; its own sentence.
    """

    def __init__(self, weight: QuantizedWeight, module: str, name: str) -> None:
        kernel_class = getattr(import_module(f"{KERNELS}.{module}"), name)
        config = layer_config(weight)
        served, reason = kernel_class.can_implement(config)
        if not served:
            raise ValueError(reason)
        self.layer = checkpoint_layer(weight, zeros=config.zero_points)
        self.kernel = kernel_class(
            config,
            w_q_param_name="weight_packed",
            w_s_param_name="weight_scale",
            w_zp_param_name="weight_zero_point" if config.zero_points else None,
        )
        self.kernel.process_weights_after_loading(self.layer)

    def __call__(self, inputs: Tensor) -> Any:
        """y = x W^T."""
        return self.kernel.apply_weights(self.layer, inputs)


def layer_config(weight: QuantizedWeight) -> Any:
    """vLLM's description of the layer."""
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import ScalarType

    n, k = weight.codes.shape
    groups, middle = weight.scales.shape[1], 2 ** (weight.bits - 1)
    symmetric = bool((weight.zeros == middle).all())
    fields: dict[str, Any] = {
        "full_weight_shape": (k, n),
        "partition_weight_shape": (k, n),
        "weight_type": ScalarType.uint(weight.bits, middle if symmetric else None),
        "act_type": torch.bfloat16,
        "group_size": -1 if groups == 1 else k // groups,
        "zero_points": not symmetric,
    }
    if "has_g_idx" in signature(MPLinearLayerConfig).parameters:  # gone in 0.30
        fields["has_g_idx"] = False
    return MPLinearLayerConfig(**fields)


def checkpoint_layer(weight: QuantizedWeight, *, zeros: bool) -> nn.Module:
    """A module with a layer's tensors as compressed-tensors stores them."""
    from vllm.model_executor.parameter import (
        ChannelQuantScaleParameter,
        GroupQuantScaleParameter,
        PackedvLLMParameter,
    )

    layer, bits, grouped = nn.Module(), weight.bits, weight.scales.shape[1] > 1
    loader = {"weight_loader": _no_loader}
    packed = {"input_dim": 1, "output_dim": 0, "packed_factor": 32 // bits, **loader}
    scales = {"data": weight.scales.bfloat16(), "output_dim": 0, **loader}
    with one_rank():
        layer.weight_packed = PackedvLLMParameter(
            data=pack_aligned(weight.codes, bits), packed_dim=1, **packed
        )
        layer.weight_scale = (
            GroupQuantScaleParameter(input_dim=1, **scales)
            if grouped
            else ChannelQuantScaleParameter(**scales)
        )
        if zeros:
            words = pack_aligned(weight.zeros.T.contiguous(), bits).T.contiguous()
            layer.weight_zero_point = PackedvLLMParameter(data=words, packed_dim=0, **packed)
    return layer


def _no_loader(*arguments: object) -> None:
    raise AssertionError("the tensors are loaded already")


@contextmanager
def one_rank() -> Iterator[None]:
    """Let vLLM's parameters be made without a process group."""
    module = "vllm.model_executor.parameter"
    with (
        mock.patch(f"{module}.get_tensor_model_parallel_rank", return_value=0),
        mock.patch(f"{module}.get_tensor_model_parallel_world_size", return_value=1),
    ):
        yield


class AwqTriton(Layer):
    """vLLM's Triton kernel for AWQ checkpoints, in float16, which it is limited to.

    Raises:
        ImportError: vLLM is not installed, or has no such kernel.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        import_module("vllm.model_executor.layers.quantization.awq_triton")
        self.codes = encode_gemm(weight.codes)
        self.zeros = encode_gemm(weight.zeros)
        self.scales = weight.scales.T.half().contiguous()

    def prepare(self, x: Tensor) -> Tensor:
        """x in float16."""
        return x.half()

    def __call__(self, inputs: Tensor) -> Any:
        """y = x W^T."""
        from vllm.model_executor.layers.quantization.awq_triton import awq_gemm_triton

        return awq_gemm_triton(inputs, self.codes, self.scales, self.zeros, AWQ_SPLITS)


def contenders() -> list[Contender]:
    """All of them."""
    marlin = partial(MixedPrecision, module="marlin", name="MarlinLinearKernel")
    machete = partial(MixedPrecision, module="machete", name="MacheteLinearKernel")
    triton = partial(MixedPrecision, module="triton_w4a16", name="TritonW4A16LinearKernel")
    return [
        Contender("Marlin W4A16 g128", W4, marlin, ROUNDED),
        Contender("Machete W4A16 g128", W4, machete, ROUNDED),
        Contender("vLLM Triton W4A16 g128", W4, triton, ROUNDED),
        Contender("Marlin W4A16 g32 asym", W4_G32, marlin, ROUNDED),
        Contender("vLLM Triton W4A16 g32 asym", W4_G32, triton, ROUNDED),
        Contender("vLLM Triton AWQ g32 asym", W4_G32, AwqTriton, HALF_SUMS),
        Contender("Marlin W8A16", W8, marlin, ROUNDED),
        Contender("Machete W8A16", W8, machete, ROUNDED),
    ]
