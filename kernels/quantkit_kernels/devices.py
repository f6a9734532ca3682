"""What every op needs to run on several kinds of devices: its modules, and activations' dtypes."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

DISPATCH = {"cpu": "cpu", "cuda": "cuda", "generic": "default"}
"""Kind of device to the key under which torch.library dispatches to its implementation."""

MODULES = {"cpu": "cpu", "cuda": "triton"}
"""Kind of device to the module of an op's folder that serves it; all others have `generic`."""


LAYOUTS = {"cpu": "cpu", "cuda": "cuda_pack"}
"""Kind of device to the module that lays a weight out for it, on whatever machine; all others have
`generic`."""


@cache
def backend(op: str, device_type: str) -> ModuleType:
    """The module of the op's folder that serves a kind of device; imported when first needed."""
    return import_module(f"quantkit_kernels.{op}.{MODULES.get(device_type, 'generic')}")


@cache
def layout(op: str, device_type: str) -> ModuleType:
    """The module of the op's folder whose `pack` lays a weight out; launches nothing."""
    return import_module(f"quantkit_kernels.{op}.{LAYOUTS.get(device_type, 'generic')}")


def check_activations(dtype: torch.dtype) -> None:
    """Activations are float16, bfloat16 or float32.

    Raises:
        ValueError: they are not.
    """
    if dtype not in ACTIVATION_DTYPES:
        raise ValueError(f"activations of {dtype} are not served; use one of {ACTIVATION_DTYPES}")
