"""The backend of each kind of device; its parts are imported where that device is served."""

from __future__ import annotations

from functools import cache
from typing import Any

from vllm.v1.attention.backend import MultipleOf

from vllm_quantkit.integration.kv_backend import (
    CPU_BLOCK,
    GPU_BLOCKS,
    Groups,
    Int4Backend,
    Int4Impl,
)


@cache
def backend_class(device_type: str, groups: Groups) -> type[Int4Backend]:
    """The backend of a kind of device; one class for each cache format, as vLLM groups layers."""
    parts = _cpu_parts if device_type == "cpu" else _cuda_parts
    implementation, builder, blocks = parts()

    def kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return blocks

    members = {
        "__module__": __name__,
        "groups": groups,
        "get_impl_cls": staticmethod(lambda: implementation),
        "get_builder_cls": staticmethod(lambda: builder),
        "get_supported_kernel_block_sizes": staticmethod(kernel_block_sizes),
    }
    return type(f"Int4Backend{device_type}K{groups.key}V{groups.value}", (Int4Backend,), members)


def _cpu_parts() -> tuple[type[Int4Impl], type, list[Any]]:
    from vllm_quantkit.integration.kv_cpu import Int4CPUBuilder, Int4CPUImpl

    return Int4CPUImpl, Int4CPUBuilder, [MultipleOf(CPU_BLOCK)]


def _cuda_parts() -> tuple[type[Int4Impl], type, list[Any]]:
    from vllm_quantkit.integration.kv_cuda import Int4CUDABuilder, Int4CUDAImpl

    return Int4CUDAImpl, Int4CUDABuilder, list(GPU_BLOCKS)
