"""The CUDA backend without a GPU: its layout, its tile choice, its kernels in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import TensorHandle

from quantkit_kernels.tuning import Device
from quantkit_kernels.wna16 import QuantizedWeight, make_uniform, reference_linear
from quantkit_kernels.wna16 import triton as backend
from quantkit_kernels.wna16.cuda_layout import pack_codes, pack_scales, unpack_codes, unpack_scales
from quantkit_kernels.wna16.triton_tiles import TileConfig, select_tile
from quantkit_kernels.wna16.triton_unpack import (
    add_pair,
    make_pair,
    mul_pair,
    negative_zero_pair,
    unpack4,
    unpack8,
)
from quantkit_kernels.wna16.weights import PackedWeight
from tests.kernels.interpreted import (
    error,
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)

FP16_ERROR = 2e-3
"""Relative to the norm of y: weights and y are each rounded to 11 bits, about 3e-4 in all."""

FP32_ERROR = 2e-6
"""Exact weights and fp32 sums, in another order than the reference's."""

GROUPS = (16, 32, 64, 128)


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


def int_weight(
    n: int, k: int, group: int, bits: int, *, symmetric: bool = False, shuffled: bool = False
) -> QuantizedWeight:
    """A random weight; asymmetric zeros span 0 .. 2**bits, as GPTQ's do, but fit in a byte."""
    groups = -(-k // group)
    index = torch.arange(k) // group
    zeros = torch.randint(0, min(2**bits, 255) + 1, (n, groups))
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    return QuantizedWeight(
        codes=torch.randint(0, 2**bits, (n, k), dtype=torch.uint8),
        scales=(torch.rand(n, groups) * 0.02 + 0.005).half().float(),
        zeros=zeros.to(torch.uint8),
        group_index=(index[torch.randperm(k)] if shuffled else index).to(torch.int32),
        bits=bits,
    )


def run(x: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return backend.linear(
        x,
        packed.codes,
        packed.scales,
        packed.zeros,
        packed.gather,
        bias,
        packed.bits,
        packed.group_size,
        packed.in_features,
        packed.out_features,
        packed.code_type,
    )


def run_tile(x: Tensor, packed: PackedWeight, tile: TileConfig, dtype: torch.dtype) -> Tensor:
    """Like `run`, on one tile, with y in any dtype and memory around it that must stay NaN."""
    room = torch.empty(x.shape[0] + 2, packed.out_features, dtype=dtype)
    y = room[1:-1]
    kind = (packed.bits, packed.code_type, packed.group_size)
    backend.run_tiled(x, packed.codes, packed.scales, None, *kind, y, tile)
    assert room[0].isnan().all()
    assert room[-1].isnan().all()
    return y


def check(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, limit: float) -> None:
    y = run(x, backend.pack(make_uniform(weight), x.dtype), bias)
    assert y.dtype == x.dtype
    assert error(y, reference_linear(x, weight, bias)) <= limit


@interpreter
@in_interpreter
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_and_group(bits: int, group: int, symmetric: bool) -> None:
    weight = int_weight(100, 256, group, bits, symmetric=symmetric)
    assert make_uniform(weight).group_size == group
    check(torch.randn(5, 256).half(), weight, torch.randn(100).half(), FP16_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize("m", [1, 16, 17, 33, 65, 129])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_number_of_tokens(bits: int, m: int) -> None:
    weight = int_weight(72, 256, 128, bits)
    check(torch.randn(m, 256).half(), weight, None, FP16_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize(("n", "k"), [(1, 128), (7, 96), (130, 200), (64, 1040), (192, 131)])
@pytest.mark.parametrize("bits", [4, 8])
def test_ragged_shapes(bits: int, n: int, k: int) -> None:
    check(torch.randn(3, k).half(), int_weight(n, k, 32, bits), torch.randn(n), FP16_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("m", [2, 40])
def test_channels_in_any_order(bits: int, m: int) -> None:
    weight = int_weight(70, 300, 64, bits, shuffled=True)
    packed = backend.pack(make_uniform(weight), torch.float16)
    assert packed.gather is not None
    assert packed.gather.numel() % 128 == 0
    check(torch.randn(m, 300).half(), weight, None, FP16_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("scale_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_splits_agree(bits: int, dtype: torch.dtype, scale_weights: bool, splits: int) -> None:
    weight = int_weight(72, 640, 128, bits)
    packed = backend.pack(make_uniform(weight), dtype)
    tile = TileConfig(16, 128, 4, 4, splits, scale_weights)
    x = torch.randn(5, 640).to(dtype)
    y = run_tile(x, packed, tile, torch.float32)
    rounding = {torch.float16: 3e-4, torch.bfloat16: 3e-3}[dtype]
    limit = rounding if scale_weights else FP32_ERROR
    assert error(y, reference_linear(x, weight)) <= limit
    assert torch.equal(y, run_tile(x, packed, tile, torch.float32))


@interpreter
@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_small_groups_in_either_dtype(bits: int, group: int, dtype: torch.dtype) -> None:
    weight = int_weight(128, 128, group, bits)
    packed = backend.pack(make_uniform(weight), dtype)
    x = torch.randn(16, 128).to(dtype)
    y = run_tile(x, packed, TileConfig(16, 64, 4, 4, 1, True), torch.float32)
    rounding = {torch.float16: 3e-4, torch.bfloat16: 3e-3}[dtype]
    assert error(y, reference_linear(x, weight)) <= rounding


@interpreter
@in_interpreter
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", GROUPS)
def test_float32_is_exact(group: int, bits: int) -> None:
    weight = int_weight(100, 256, group, bits)
    check(torch.randn(3, 256), weight, torch.randn(100), FP32_ERROR)


@interpreter
@in_interpreter
@pytest.mark.parametrize("bias", [None, torch.ones(200)])
def test_many_tokens_go_chunk_by_chunk(
    bias: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "DENSE_TOKENS", 8)
    monkeypatch.setattr(backend, "DENSE_CHUNK", 128 * 300)
    check(torch.randn(9, 300).half(), int_weight(200, 300, 64, 4), bias, FP16_ERROR)


@interpreter
@in_interpreter
def test_no_tokens() -> None:
    packed = backend.pack(make_uniform(int_weight(64, 128, 64, 4)), torch.float16)
    assert run(torch.empty(0, 128, dtype=torch.float16), packed).shape == (0, 64)


@triton.jit
def centred_pairs(words_ptr, zeros_ptr, out_ptr, BITS: tl.constexpr, BF16: tl.constexpr):
    """(code - zero) * 3 / 8 in pairs, in plain Triton and in assembly: int32 [2, pairs, size]."""
    SIZE: tl.constexpr = 1024
    offsets = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    words = tl.load(words_ptr + offsets)
    zeros = tl.load(zeros_ptr + offsets)
    for ASM in tl.static_range(2):
        zero = negative_zero_pair(zeros, BITS, BF16, ASM)
        scale = make_pair(tl.full((SIZE,), 0.375, tl.float32), BF16, ASM)
        pairs = unpack4(words, BF16, ASM) if BITS == 4 else unpack8(words, BF16, ASM)
        for i in tl.static_range(16 // BITS):
            value = mul_pair(add_pair(pairs[i], zero, BF16, ASM), scale, BF16, ASM)
            row = ASM * (16 // BITS) + i
            tl.store(out_ptr + row * tl.num_programs(0) * SIZE + offsets, value)


def emulate(asm: tl.constexpr, constraints: str, args: list, *_: object, **__: object) -> tl.tensor:
    """What the GPU computes for one of our one-instruction assembly strings."""
    shape = next(arg.handle.data.shape for arg in args if isinstance(arg, tl.tensor))
    operands = [
        torch.from_numpy(arg.handle.data.copy())
        if isinstance(arg, tl.tensor)
        else torch.full(shape, getattr(arg, "value", arg), dtype=torch.int32)
        for arg in args
    ]
    name = str(getattr(asm, "value", asm)).split()[0]
    result = INSTRUCTIONS[name](*operands).numpy()
    return tl.tensor(TensorHandle(result, tl.int32), tl.block_type(tl.int32, list(shape)))


def fma(dtype: torch.dtype, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fma.rn.*x2: a * b + c in each half, rounded once; float64 holds the exact value."""
    x, y, z = (t.contiguous().view(dtype).double() for t in (a, b, c))
    return (x * y + z).to(dtype).view(torch.int32)


INSTRUCTIONS = {
    "lop3.b32": lambda a, b, c: (a & b) | c,  # 0xea: bit i is set where (a & b) | c
    "prmt.b32": lambda a, b: ((a & 0xFF) | (b & 0xFF) << 8) * 0x10001,  # 0x4040: a0 b0 a0 b0
    "fma.rn.bf16x2": lambda a, b, c: fma(torch.bfloat16, a, b, c),
    "fma.rn.f16x2": lambda a, b, c: fma(torch.float16, a, b, c),
    "cvt.rn.bf16x2.f32": lambda a: a.bfloat16().repeat_interleave(2).view(torch.int32),
    "cvt.rn.f16x2.f32": lambda a: a.half().repeat_interleave(2).view(torch.int32),
}


@interpreter
@in_interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_with_every_zero(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tl, "inline_asm_elementwise", emulate)
    zeros = torch.arange(32 if bits == 4 else 256).repeat_interleave(256)
    bytes_ = torch.arange(256).repeat(zeros.numel() // 256)
    codes = bytes_[:, None] >> torch.tensor([0, 4]) & 15 if bits == 4 else bytes_[:, None]
    stored = bytes_ if bits == 4 else bytes_ ^ 0x80
    words = stored * 0x01010101  # every position holds the same byte
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    scales = pack_scales(torch.full((words.numel(), 1), 0.01), zeros[:, None], 128)
    out = torch.empty(2, 16 // bits, words.numel(), dtype=torch.int32)
    centred_pairs[(words.numel() // 1024,)](words, scales, out, bits, dtype == torch.bfloat16)
    plain, assembly = out.view(dtype).unflatten(-1, (-1, 2)).float()
    assert torch.equal(plain, assembly)
    in_order = codes[:, [0, 1, 0, 1] if bits == 4 else [0, 0]].T
    expected = ((in_order - zeros) * 0.375).to(dtype).float()
    assert torch.equal(assembly, expected[:, :, None].expand(-1, -1, 2))


@given(st.data())
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_codes_loses_nothing(bits: int, data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    words = pack_codes(codes, bits)
    assert words.shape == (-(-n // 128) * 2, -(-k // 128), 64, 4 * bits)
    restored = unpack_codes(words, bits)
    assert torch.equal(restored[:n, :k], codes)
    assert not restored[n:].any()
    assert not restored[:, k:].any()


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_packing_scales_loses_nothing_of_16_bit_scales(data: st.DataObject) -> None:
    n, groups = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 20))
    group = data.draw(st.sampled_from(GROUPS))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16]))
    scales = torch.randn(n, groups).to(dtype).float()
    zeros = torch.randint(0, 256, (n, groups), dtype=torch.uint8)
    words = pack_scales(scales, zeros, group)
    assert words.shape == (-(-groups * group // 128) * 128 // group, -(-n // 128) * 128)
    restored_scales, restored_zeros = unpack_scales(words)
    assert torch.equal(restored_scales[:n, :groups], scales)
    assert torch.equal(restored_zeros[:n, :groups], zeros)
    assert not restored_scales[n:].any()
    assert not restored_scales[:, groups:].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_what_a_thread_multiplies(bits: int) -> None:
    """Thread t of an MMA A fragment holds columns 16 c + 8 j + 2 t + b."""
    column = torch.arange(128)
    threads = column % 8 // 2
    codes = threads.to(torch.uint8).expand(64, 128)
    words = unpack_codes(pack_codes(codes, bits), bits)[:64]
    assert torch.equal(words, codes)
    tile = pack_codes(codes, bits)[0, 0, 0]
    owner = torch.arange(4 * bits) // 4 % 4
    one_thread = (owner if bits == 4 else owner ^ 0x80) * (0x11111111 if bits == 4 else 0x01010101)
    assert torch.equal(tile.long() & 0xFFFFFFFF, one_thread)


@given(
    st.integers(1, 1023),
    st.integers(1, 40000),
    st.integers(1, 240),
    st.sampled_from([4, 8]),
    st.sampled_from(GROUPS),
    st.sampled_from([(80, 108, 163), (89, 142, 99), (90, 132, 227), (100, 148, 227)]),
    st.booleans(),
)
def test_every_tile_can_run(
    m: int,
    n: int,
    k_tiles: int,
    bits: int,
    group: int,
    gpu: tuple[int, int, int],
    code_book: bool,
) -> None:
    device = Device(gpu[0], gpu[1], gpu[2] * 1024)
    tile = select_tile(m, n, 128 * k_tiles, bits, group, device, code_book=code_book)
    assert 1 <= tile.splits <= k_tiles
    per_split = -(-k_tiles // tile.splits)
    assert (tile.splits - 1) * per_split < k_tiles, "a split without k tiles"
    assert tile.splits * m * n < 2**31, "offsets are 32 bits"
    assert tile.scale_weights or group == 128
    assert tile.stages >= 2
    assert tile.block_m >= min(m, 64 if code_book and gpu[0] < 90 else 128)
