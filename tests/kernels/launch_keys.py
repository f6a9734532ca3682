"""What Triton would compile: the keys of its own cache, taken where no GPU launches anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from tests.kernels.paper_gpu import triton_for_cpu

Key = tuple[str, str]
"""Kernel, and what it is specialised for."""


class LaunchKeys:
    """Stands for the launches of all kernels.

    Attributes:
        seen: keys of what was launched.
    """

    def __init__(self, arch: int) -> None:
        self.seen: set[Key] = set()
        self._backend = make_backend(GPUTarget("cuda", arch, 32))
        self._binders: dict[Any, Any] = {}

    def launch(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """As `JITFunction.run` looks up a compiled kernel."""
        if kernel not in self._binders:
            binder = create_function_from_signature(kernel.signature, kernel.params, self._backend)
            self._binders[kernel] = binder
        _, specialization, options = self._binders[kernel](*args, **kwargs)
        key = compute_cache_key({}, specialization, options)
        self.seen.add((kernel.fn.__qualname__, key))


@pytest.fixture
def launch_keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[LaunchKeys]:
    """Tensors on the CPU go to the Triton modules, whose kernels are not run."""
    keys = LaunchKeys(90)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        keys.launch(self, args, kwargs)

    monkeypatch.setattr(JITFunction, "run", run)
    with triton_for_cpu():
        yield keys
