"""LLVM IR that writes a row of results: sums scaled, rounded, stored."""

from __future__ import annotations

from llvmlite import ir

from quantkit_kernels.cpu.arithmetic import VECTORS, Arithmetic
from quantkit_kernels.cpu.ir import F32, I32, VECTOR_F32, VECTOR_I32, Emitter, to_bf16


def build_store(module: ir.Module, arithmetic: Arithmetic) -> ir.Function:
    """out[n] = sums[n] for a panel, as float32 or bfloat16.

    store(sums, out, x_scale, x_zero, x_sum, bias, scales, column_sums, column_zeros, in_features,
    out_bf16), all but the last two addresses. Integers are scaled, see `_scaled_integers`.
    """
    e = Emitter(module, "store", 11)
    sums, out, *factors, out_bf16 = e.args
    if arithmetic.sums_are_integers:
        values = _scaled_integers(e, arithmetic.row_shift, sums, *factors)
    else:
        values = [e.load(VECTOR_F32, sums, v) for v in VECTORS]
    with e.b.if_else(e.is_null(out_bf16)) as (float32, bfloat16):
        with float32:
            for value, v in zip(values, VECTORS, strict=True):
                e.store(value, out, v)
        with bfloat16:
            for value, v in zip(values, VECTORS, strict=True):
                e.store(to_bf16(e, value), out, v // 2, align=2)
    e.b.ret_void()
    return e.function


def _scaled_integers(
    e: Emitter,
    shift: int,
    sums: ir.Value,
    x_scale: ir.Value,
    x_zero: ir.Value,
    x_sum: ir.Value,
    bias: ir.Value,
    scales: ir.Value,
    column_sums: ir.Value,
    column_zeros: ir.Value,
    in_features: ir.Value,
) -> list[ir.Value]:
    """x_scale scales sum_k (x - x_zero) (w - column_zeros) + bias, the sum exact.

    Given are sums = sum_k (x + shift) w, x_sum = sum_k x, column_sums = sum_k (w - column_zeros).
    """
    zero = e.b.fptosi(e.load(F32, x_zero), I32)
    offset = e.splat(e.b.add(zero, ir.Constant(I32, shift)))
    shifts = e.b.mul(e.b.trunc(in_features, I32), ir.Constant(I32, shift))
    row_sum = e.splat(e.b.add(e.load(I32, x_sum), shifts))
    factor = e.splat(e.load(F32, x_scale))
    values = []
    for v in VECTORS:
        excess = e.b.add(
            e.b.mul(offset, e.load(VECTOR_I32, column_sums, v)),
            e.b.mul(row_sum, e.load(VECTOR_I32, column_zeros, v)),
        )
        whole = e.b.sitofp(e.b.sub(e.load(VECTOR_I32, sums, v), excess), VECTOR_F32)
        scaled = e.b.fmul(whole, e.load(VECTOR_F32, scales, v))
        values.append(e.fma(scaled, factor, e.load(VECTOR_F32, bias, v)))
    return values
