"""Watching what the layers of a block read, and quantising it as a serving engine will."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor, device, nn
from torch.utils.hooks import RemovableHandle

from quantkit_kernels.act_quant.reference import reference_quantize
from quantkit_kernels.act_quant.rows import RowQuantizer
from vllm_quantkit.quantize.observation.statistics import InputMoments, InputStats
from vllm_quantkit.spec import ActivationSpec


@dataclass(frozen=True)
class Watch:
    """What is to be noted of a module's first input.

    Attributes:
        module: name inside the block.
        width: its channels.
        hessian: True also sums x x^T.
    """

    module: str
    width: int
    hessian: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the sums, about."""
        return 4 * self.width * self.width if self.hessian else 64 * self.width


def observe(
    block: nn.Module,
    watches: Mapping[str, Watch],
    run: Callable[[], None],
    *,
    half: Callable[[], int],
    expected_rows: int,
) -> dict[str, InputStats | None]:
    """What each watched module read while `run` ran; None where it read nothing.

    Args:
        block: a decoder block.
        watches: by any key.
        run: runs the block over the calibration set.
        half: which half of the set the batch in work belongs to.
        expected_rows: tokens in the set.
    """
    moments: dict[str, InputMoments] = {}
    with ExitStack() as stack:
        for key, watch in watches.items():
            module = block.get_submodule(watch.module)
            moments[key] = InputMoments(
                watch.width,
                hessian=watch.hessian,
                expected_rows=expected_rows,
                device=_device(block),
            )
            stack.callback(_hook(module, moments[key], half).remove)
        run()
    return {key: seen.stats() if seen.tokens else None for key, seen in moments.items()}


def quantize_inputs(
    layer: nn.Module, activation: ActivationSpec, scale: Tensor | None, zero: Tensor | None
) -> None:
    """From now on x becomes scale * (code - zero) before it is multiplied, as in serving.

    Args:
        layer: a linear layer; gets a hook that stays.
        activation: the numerics.
        scale: float32 [1] of static activations.
        zero: float32 [1] of static asymmetric activations.
    """
    quantizer = row_quantizer(activation)

    def replace(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        rows = reference_quantize(x.flatten(0, -2), quantizer, scale, zero).dequantize()
        return (rows.view(x.shape).to(x.dtype), *args[1:])

    layer.register_forward_pre_hook(replace)


def row_quantizer(activation: ActivationSpec) -> RowQuantizer:
    """How the kernels call these numerics."""
    bound = float("inf") if activation.upper_bound is None else activation.upper_bound
    return RowQuantizer(activation.code, activation.group_size, activation.symmetric, bound)


def _hook(module: nn.Module, moments: InputMoments, half: Callable[[], int]) -> RemovableHandle:
    def note(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        moments.add(args[0] if args else named["hidden_states"], half())

    return module.register_forward_pre_hook(note, with_kwargs=True)


def _device(block: nn.Module) -> device:
    return next(block.parameters()).device
