"""Weights of floats and code books on CUDA, in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from quantkit_kernels.code_types import code_values
from quantkit_kernels.wna16 import QuantizedWeight, make_uniform, reference_linear
from quantkit_kernels.wna16 import triton as backend
from quantkit_kernels.wna16.triton_codes import (
    book_bits,
    float8_power,
    look_up,
    look_up_asm,
    unpack_float8,
)
from quantkit_kernels.wna16.triton_tiles import TileConfig
from tests.kernels.interpreted import (
    error,
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)
from tests.kernels.wna16_triton_cases import FP32_ERROR, run, run_tile

BITS = {"e4m3": 8, "e5m2": 8, "nf4": 4, "fp4": 4}
FLOATS, BOOKS = ("e4m3", "e5m2"), ("nf4", "fp4")

ROUNDED = {torch.float16: 4e-4, torch.bfloat16: 4e-3}
"""Relative to the norm of y: values, scales and weights rounded to 11 or 8 bits, each 2e-4 or less
at 11 bits, and eight times as much at 8."""

VALUES_ROUNDED = {torch.float16: 2e-4, torch.bfloat16: 2e-3}
"""Values of a code book rounded to 11 or 8 bits, their scales exact."""


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Uninitialised tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@interpreter
@starts_the_interpreter
def test_in_the_interpreter() -> None:
    run_in_interpreter(__file__)


def random_weight(
    code_type: str, n: int, k: int, group: int, *, scale: float = 0.01
) -> QuantizedWeight:
    """Every finite code, and scales of 24 bits."""
    finite = torch.arange(2 ** BITS[code_type])[code_values(code_type).isfinite()]
    index = torch.arange(k) // group
    groups = int(index[-1]) + 1
    return QuantizedWeight(
        codes=finite[torch.randint(0, len(finite), (n, k))].to(torch.uint8),
        scales=(torch.rand(n, groups) + 0.2) * scale,
        zeros=torch.zeros(n, groups, dtype=torch.uint8),
        group_index=index.to(torch.int32),
        bits=BITS[code_type],
        code_type=code_type,
    )


@interpreter
@in_interpreter
@pytest.mark.parametrize("code_type", BITS)
@pytest.mark.parametrize("group", [16, 64])
def test_float32(code_type: str, group: int) -> None:
    weight = random_weight(code_type, 100, 200, group)
    x, bias = torch.randn(3, 200), torch.randn(100)
    y = run(x, backend.pack(make_uniform(weight), x.dtype), bias)
    assert error(y, reference_linear(x, weight, bias)) <= FP32_ERROR


@interpreter
@in_interpreter
@pytest.mark.parametrize("code_type", BITS)
@pytest.mark.parametrize("m", [1, 70])
def test_half_precision(code_type: str, m: int) -> None:
    weight = random_weight(code_type, 72, 300, 128)
    x, bias = torch.randn(m, 300).half() * 1e-3, torch.randn(72)
    y = run(x, backend.pack(make_uniform(weight), x.dtype), bias)
    # y is rounded too.
    assert error(y, reference_linear(x, weight, bias)) <= ROUNDED[torch.float16] * 1.5


@interpreter
@in_interpreter
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("code_type", BITS)
def test_scaled_after_the_product(code_type: str, dtype: torch.dtype, splits: int) -> None:
    weight = random_weight(code_type, 72, 256, 128)
    packed = backend.pack(make_uniform(weight), dtype)
    x = torch.randn(5, 256).to(dtype)
    y = run_tile(x, packed, TileConfig(16, 64, 4, 4, splits, scale_weights=False))
    limit = FP32_ERROR if code_type in FLOATS else VALUES_ROUNDED[dtype]
    assert error(y, reference_linear(x, weight)) <= limit


@interpreter
@in_interpreter
@pytest.mark.parametrize(
    ("code_type", "scale"), [*((code_type, 1e-2) for code_type in BITS), ("e4m3", 2e-5)]
)
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("dtype", ROUNDED)
def test_scaled_weights(code_type: str, scale: float, dtype: torch.dtype, group: int) -> None:
    """Scales below 6e-5 are subnormal in float16: those of E4M3 weights must not be rounded so."""
    weight = random_weight(code_type, 128, 128, group, scale=scale)
    packed = backend.pack(make_uniform(weight), dtype)
    x = torch.randn(16, 128).to(dtype)
    y = run_tile(x, packed, TileConfig(16, 64, 4, 4, 1, scale_weights=True))
    assert error(y, reference_linear(x, weight)) <= ROUNDED[dtype]


@triton.jit
def float8_pairs(words_ptr, out_ptr, CODE: tl.constexpr, BF16: tl.constexpr):
    offsets = tl.arange(0, 256)
    words = tl.load(words_ptr + offsets)
    even, odd = unpack_float8(words, CODE, BF16, True, False)
    tl.store(out_ptr + offsets, even)
    tl.store(out_ptr + 256 + offsets, odd)


@interpreter
@in_interpreter
@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("code_type", FLOATS)
def test_every_float_is_exact(code_type: str, dtype: torch.dtype) -> None:
    words = (torch.arange(256, dtype=torch.int64) * 0x01010101).to(torch.uint32).view(torch.int32)
    out = torch.empty(2, 256, dtype=torch.int32)
    float8_pairs[(1,)](words, out, code_type, dtype == torch.bfloat16)
    values = code_values(code_type)
    finite = values.isfinite()
    pairs = out.view(dtype).unflatten(1, (256, 2))
    for pair in (pairs[0, :, 0], pairs[0, :, 1], pairs[1, :, 0], pairs[1, :, 1]):
        assert torch.equal(pair[finite].float(), values[finite])


def test_powers_are_the_differences_of_the_biases() -> None:
    for code_type, bias in (("e4m3", 7), ("e5m2", 15)):
        for bf16, dtype, wide in ((True, torch.bfloat16, 127), (False, torch.float16, 15)):
            bits = torch.tensor(float8_power(code_type, bf16), dtype=torch.int16)
            assert bits.view(dtype).item() == 2.0 ** (wide - bias)


def prmt(low: int, high: int, selector: int) -> int:
    """PTX prmt.b32: byte i is the byte of (high, low) that nibble i selects, or its sign."""
    both, result = low | high << 32, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 0xFF
        result |= (0xFF * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return result


def execute(text: str, word: int) -> list[int]:
    """What our look-up assembly makes of an input word: the registers $0 to $3."""
    registers = {"$4": word}
    for line in text.strip("{}\n").split("\n"):
        name, _, rest = line.strip(";").partition(" ")
        if name == ".reg":
            continue
        target, *sources = rest.split(", ")
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = OPERATIONS[name](*values) & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(4)]


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lambda a, b, c, table: {0xCA: (a & b) | (~a & c), 0xEA: (a & b) | c}[table],
}


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("code_type", BOOKS)
def test_look_up_assembly(code_type: str, bf16: bool, residual: bool) -> None:
    text, bits = look_up_asm(code_type, bf16, residual), book_bits(code_type, bf16, residual)
    words = torch.randint(0, 2**32, (200,)).tolist()
    for word in words:
        codes = [word >> 4 * i & 15 for i in range(8)]
        assert execute(text, word) == [bits[codes[i]] | bits[codes[i + 4]] << 16 for i in range(4)]


@triton.jit
def books(words_ptr, out_ptr, CODE: tl.constexpr, BF16: tl.constexpr, ASM: tl.constexpr):
    offsets = tl.arange(0, 256)
    words = tl.load(words_ptr + offsets)
    pairs = look_up(words, CODE, BF16, False, ASM)
    for i in tl.static_range(4):
        tl.store(out_ptr + i * 256 + offsets, pairs[i])


def emulate(text: tl.constexpr, constraints: str, args: list, *_: object) -> tuple[tl.tensor, ...]:
    """What the GPU computes for our look-up assembly."""
    words = args[0].handle.data
    results = torch.tensor(
        [execute(getattr(text, "value", text), int(word) & 0xFFFFFFFF) for word in words]
    )
    columns = results.to(torch.uint32).view(torch.int32).T.contiguous().numpy()
    block = tl.block_type(tl.int32, list(words.shape))
    return tuple(tl.tensor(TensorHandle(column, tl.int32), block) for column in columns)


@interpreter
@in_interpreter
@pytest.mark.parametrize("code_type", BOOKS)
def test_assembly_and_plain_triton_agree(code_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tl, "inline_asm_elementwise", emulate)
    words = torch.randint(-(2**31), 2**31, (256,), dtype=torch.int32)
    plain, assembly = torch.empty(2, 4, 256, dtype=torch.int32)
    books[(1,)](words, plain, code_type, True, False)
    books[(1,)](words, assembly, code_type, True, True)
    assert torch.equal(plain, assembly)
    low = plain[0].view(torch.bfloat16)[::2].float()
    assert torch.equal(low, code_values(code_type)[(words & 15).long()].bfloat16().float())
