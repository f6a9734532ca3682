"""`quantkit::quantize_rows` and the norms and activation functions that quantise what they make.

Schemas, fakes and one implementation per device. Results are rows as `rows` describes them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit_kernels.act_quant.checks import How, check_inputs, gated_width, parse
from quantkit_kernels.act_quant.rows import RowQuantizer
from quantkit_kernels.act_quant.source import Source
from quantkit_kernels.devices import ACTIVATION_DTYPES, DISPATCH, backend

_HOW = (
    "Tensor? scale, Tensor? zero, str code, int group_size, bool symmetric, float upper_bound, "
    "int sum_group"
)
_NORM = "Tensor weight, float epsilon"
SCHEMAS = {
    "quantize_rows": f"(Tensor x, {_HOW}) -> Tensor",
    "rms_norm_quantize": f"(Tensor x, {_NORM}, {_HOW}) -> Tensor",
    "add_rms_norm_quantize": f"(Tensor x, Tensor residual, {_NORM}, {_HOW}) -> "
    "(Tensor rows, Tensor residual)",
    "silu_mul_quantize": f"(Tensor x, {_HOW}) -> Tensor",
}
"""Op to its schema."""

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"quantkit::{_name}", _schema)


def quantize_rows(
    x: Tensor, quantizer: RowQuantizer, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """q[m, k] = rint(x[m, k] / scale) + zero, with the scales, as rows.

    Args:
        x: float16, bfloat16 or float32 [..., K].
        quantizer: how; `group_size` is `PER_TENSOR` where `scale` is given.
        scale: float32 [1], the static scale, from 2**-126 to below 2**126; None makes dynamic ones.
        zero: float32 [1], the static zero-point, a whole number, where not symmetric.

    Returns:
        uint8 [..., stride].

    Raises:
        ValueError: the arguments do not fit together.
    """
    rows: Tensor = torch.ops.quantkit.quantize_rows(x, scale, zero, *_fields(quantizer))
    return rows


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    quantizer: RowQuantizer,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """Rows of y = x / sqrt(mean(x^2) + epsilon) * weight, in float32 until quantised.

    Args:
        x: float16, bfloat16 or float32 [..., K]; x * weight stays within float32.
        weight: [K], what y is multiplied by: Gemma's plus 1.
        epsilon: see above.
        quantizer, scale, zero: as for `quantize_rows`.

    Returns:
        uint8 [..., stride].

    Raises:
        ValueError: the arguments do not fit together.
    """
    fields = _fields(quantizer)
    rows: Tensor = torch.ops.quantkit.rms_norm_quantize(x, weight, epsilon, scale, zero, *fields)
    return rows


def add_rms_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    epsilon: float,
    quantizer: RowQuantizer,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm_quantize` of s = x + residual, and s itself.

    s is rounded to the dtype of x before it is normed, so that the norm reads what the next layer
    will.

    Args:
        x: float16, bfloat16 or float32 [..., K].
        residual: as x.
        weight, epsilon, quantizer, scale, zero: as for `rms_norm_quantize`.

    Returns:
        uint8 [..., stride], and s.

    Raises:
        ValueError: the arguments do not fit together.
    """
    fields = _fields(quantizer)
    rows, total = torch.ops.quantkit.add_rms_norm_quantize(
        x, residual, weight, epsilon, scale, zero, *fields
    )
    return rows, total


def silu_mul_quantize(
    x: Tensor, quantizer: RowQuantizer, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """Rows of y = silu(x[..., :K]) * x[..., K:], in float32 until quantised.

    Args:
        x: float16, bfloat16 or float32 [..., 2 K].
        quantizer, scale, zero: as for `quantize_rows`.

    Returns:
        uint8 [..., stride].

    Raises:
        ValueError: the arguments do not fit together.
    """
    rows: Tensor = torch.ops.quantkit.silu_mul_quantize(x, scale, zero, *_fields(quantizer))
    return rows


def _fields(quantizer: RowQuantizer) -> tuple[str, int, bool, float, int]:
    """What stands for a quantizer in a schema."""
    return (
        quantizer.code,
        quantizer.group_size,
        quantizer.symmetric,
        quantizer.upper_bound,
        quantizer.sum_group,
    )


def _rows(x: Tensor) -> Tensor:
    """x as [M, K] with contiguous rows; a copy only where it has to be one."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _plain(weight: Tensor) -> Tensor:
    """The norm's weight, contiguous, in a dtype that every kernel reads."""
    return (weight if weight.dtype in ACTIVATION_DTYPES else weight.float()).contiguous()


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    return rows if x.dim() == 2 else rows.reshape(*x.shape[:-1], rows.shape[-1])


def _implementations(device_type: str) -> dict[str, Callable[..., object]]:
    """Op to what runs on a kind of device."""

    def run(source: Source, x: Tensor, how: How) -> Tensor:
        quantizer = parse(how, source.width)
        rows = backend("act_quant", device_type).quantise(source, quantizer, how[0], how[1])
        return _shaped(rows, x)

    def quantize(x: Tensor, *how: *How) -> Tensor:
        check_inputs(x)
        return run(Source("x", _rows(x), x.shape[-1]), x, how)

    def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *how: *How) -> Tensor:
        check_inputs(x, weight)
        return run(Source("norm", _rows(x), x.shape[-1], _plain(weight), epsilon), x, how)

    def add_rms_norm(
        x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *how: *How
    ) -> tuple[Tensor, Tensor]:
        check_inputs(x, weight, residual)
        flat = _rows(x)
        total = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
        norm = x.shape[-1], _plain(weight), epsilon
        rows = run(Source("add_norm", flat, *norm, _rows(residual), total), x, how)
        return rows, _shaped(total, x)

    def silu_mul(x: Tensor, *how: *How) -> Tensor:
        check_inputs(x)
        return run(Source("silu_mul", _rows(x), gated_width(x)), x, how)

    functions = (quantize, rms_norm, add_rms_norm, silu_mul)
    return dict(zip(SCHEMAS, functions, strict=True))


for _device_type, _dispatch in DISPATCH.items():
    for _name, _function in _implementations(_device_type).items():
        torch.library.impl(f"quantkit::{_name}", _dispatch, _function)


def _fake_rows(x: Tensor, in_features: int, how: How) -> Tensor:
    stride = parse(how, in_features).layout(in_features).stride
    return x.new_empty(*x.shape[:-1], stride, dtype=torch.uint8)


@torch.library.register_fake("quantkit::quantize_rows")
def _fake_quantize(x: Tensor, *how: *How) -> Tensor:
    check_inputs(x)
    return _fake_rows(x, x.shape[-1], how)


@torch.library.register_fake("quantkit::rms_norm_quantize")
def _fake_rms_norm(x: Tensor, weight: Tensor, epsilon: float, *how: *How) -> Tensor:
    check_inputs(x, weight)
    return _fake_rows(x, x.shape[-1], how)


@torch.library.register_fake("quantkit::add_rms_norm_quantize")
def _fake_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, *how: *How
) -> tuple[Tensor, Tensor]:
    check_inputs(x, weight, residual)
    return _fake_rows(x, x.shape[-1], how), x.new_empty(x.shape)


@torch.library.register_fake("quantkit::silu_mul_quantize")
def _fake_silu_mul(x: Tensor, *how: *How) -> Tensor:
    check_inputs(x)
    return _fake_rows(x, gated_width(x), how)
