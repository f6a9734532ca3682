"""What CUDA writes to the 4-bit cache and reads from it, its tiles, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from quantkit_kernels.kv_int4 import CacheLayout, KeyTreatment, reference
from quantkit_kernels.kv_int4 import triton as backend
from quantkit_kernels.kv_int4.rotation import rotate_keys, rotate_values
from quantkit_kernels.kv_int4.triton_quantise import divided, quantise
from quantkit_kernels.kv_int4.triton_tiles import (
    DecodeTile,
    check_layout,
    decode_tile,
    prefill_tile,
    splits_of,
)
from quantkit_kernels.triton_common import INTERPRETED as DEVICE
from tests.kernels.interpreted import (
    in_interpreter,
    interpreter,
    run_in_interpreter,
    starts_the_interpreter,
)
from tests.kernels.kv_int4_triton_cases import HEADS, layout_of, make, treatment_of


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


def read_back(cache: Tensor, layout: CacheLayout) -> tuple[Tensor, Tensor]:
    """Rotated keys and values, float32 [tokens, heads, P], of all slots, as the reference reads."""
    tokens = len(cache) * layout.block_size
    keys, values = torch.empty(2, tokens, HEADS, layout.padded_size)
    reference.gather(cache, torch.arange(len(cache)), 0, tokens, keys, values, layout)
    return keys, values


def check_groups(y: Tensor, ours: Tensor, theirs: Tensor, group: int) -> None:
    """Values are the reference's, but where its choice of a scale or a code is a tie."""
    y, ours, theirs = (x.unflatten(-1, (-1, group)) for x in (y, ours, theirs))
    # Sums in another order, and the rotation's rounding, decide ties of float32.
    assert (ours != theirs).any(-1).float().mean() <= 5e-3
    errors = [(x - y).square().sum(-1) for x in (ours, theirs)]
    assert (errors[0] <= errors[1] * (1 + 1e-4)).all()


@interpreter
@in_interpreter
@pytest.mark.parametrize(("size", "dtype", "treated"), [
    (64, torch.float16, False), (80, torch.float32, True), (128, torch.float16, True),
    (192, torch.float32, False),
])  # fmt: skip
def test_what_is_written(size: int, dtype: torch.dtype, treated: bool) -> None:
    layout = layout_of(size)
    treatment = treatment_of(size) if treated else KeyTreatment()
    fused = torch.randn(20, 3 * HEADS, size).to(dtype)
    key, value = fused[:, HEADS : 2 * HEADS], fused[:, 2 * HEADS :]
    slots = torch.tensor([64, 65, 130, -1, *range(3, 17), 66])
    cache = torch.full((3, HEADS, 64, layout.token_bytes), 0xFF, dtype=torch.uint8)
    expected = cache.clone()
    backend.write(key, value, cache, slots, layout, treatment)
    reference.write(key, value, expected, slots, layout, treatment)
    rows = (slots >= 0).nonzero().squeeze(1)
    rotated = rotate_keys(key[rows], treatment), rotate_values(value[rows])
    sizes = layout.key_dimensions, layout.value_dimensions
    read, wanted = read_back(cache, layout), read_back(expected, layout)
    for y, group, ours, theirs in zip(rotated, sizes, read, wanted, strict=True):
        check_groups(y, ours[slots[rows]], theirs[slots[rows]], group)
    untouched = torch.ones(3 * 64, dtype=torch.bool)
    untouched[slots[slots >= 0]] = False
    planes = layout.planes(cache)
    keys = planes.key_codes.transpose(1, 2).reshape(3 * 64, -1)
    values = planes.value_codes.permute(0, 3, 1, 2).reshape(3 * 64, -1)
    assert (keys[untouched] == 0xFF).all()
    assert (values[untouched] == 0xFF).all()


@triton.jit
def quantise_rows(
    rows_ptr,
    bytes_ptr,
    words_ptr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
):
    """`quantise` of float32 [M, 2 HALF]; words are [2 HALF / GROUP, M]."""
    row, i = tl.arange(0, M), tl.arange(0, triton.next_power_of_2(HALF))
    inside = (i < HALF)[None, :] & (row >= 0)[:, None]
    halves = rows_ptr + row[:, None] * (2 * HALF) + i[None, :]
    low = tl.load(halves, mask=inside, other=float("nan"))
    high = tl.load(halves + HALF, mask=inside, other=float("nan"))
    out = quantise(low, high, words_ptr + row, row >= 0, HALF, GROUP, M)
    tl.store(bytes_ptr + row[:, None] * HALF + i[None, :], out, mask=inside)


@interpreter
@in_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's of NaN
@pytest.mark.parametrize(("size", "group"), [
    (32, 32), (64, 32), (96, 32), (128, 64), (160, 32), (192, 64),
])  # fmt: skip
def test_given_values_become_the_codes_and_words_of_the_reference(size: int, group: int) -> None:
    """Whatever their size, in halves that groups straddle, beside columns that are NaN."""
    rows = 256
    y = torch.randn(rows, size) * torch.logspace(-7, 4.5, rows)[:, None]
    y[::3] += y[::3].abs().amax(-1, keepdim=True)
    y[::7] = y[::7].round()
    y[5] = 0
    y[6, 3] = 975400  # which the second scale would hold
    y[8, 7] = float("nan")
    packed = torch.zeros(rows, size // 2, dtype=torch.uint8)
    words = torch.zeros(size // group, rows, dtype=torch.int16)
    quantise_rows[(1,)](y, packed, words, size // 2, group, rows)
    expected, expected_words = reference.quantise(y, group)
    assert words[0, 6] == words[0, 8] == reference.NAN_WORD
    codes, words = reference.unpack(packed), words.T.contiguous()
    bad = expected_words == reference.NAN_WORD
    assert torch.equal(bad, words == reference.NAN_WORD)
    assert (codes == expected).unflatten(-1, (-1, group))[bad].all()
    y, ours, theirs = (
        x.unflatten(-1, (-1, group)).masked_fill(bad[..., None], 0).flatten(-2)
        for x in (
            y,
            reference.dequantise(codes, words),
            reference.dequantise(expected, expected_words),
        )
    )
    check_groups(y, ours, theirs, group)


@triton.jit
def divide(values_ptr, scales_ptr, inverses_ptr, out_ptr, N: tl.constexpr):
    """Out = values / scales by inverses, all float32 [N]."""
    i = tl.arange(0, N)
    inverse = tl.load(inverses_ptr + i)
    tl.store(out_ptr + i, divided(tl.load(values_ptr + i), tl.load(scales_ptr + i), inverse))


@interpreter
@in_interpreter
@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
def test_dividing_by_an_inexact_inverse_is_dividing(ulps: int) -> None:
    """GPUs know 1 / s to 2 ulp: where y / s is near a half, the code must not depend on it."""
    count = 1 << 16
    scales = torch.randint(64, 128, (count,)) * 2.0 ** torch.randint(-20, 10, (count,))
    halves = scales * (torch.randint(-17, 17, (count,)) + 0.5)
    steps = torch.randint(-2, 3, (count,), dtype=torch.int32)
    near = (halves.view(torch.int32) + steps).view(torch.float32)
    values = torch.where(torch.rand(count) < 0.5, near, scales * 6 * torch.randn(count))
    inverses = ((1 / scales).view(torch.int32) + ulps).view(torch.float32)
    out = torch.empty(count)
    divide[(1,)](values, scales, inverses, out, count)
    assert torch.equal(out, values / scales)


@interpreter
@in_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's of NaN and overflow
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_no_scale_holds_is_written_as_nan(bad: float) -> None:
    layout = layout_of(64)
    key, value = torch.randn(2, 2, HEADS, 64)
    key[0, 1, 3] = bad
    value[1, 0, 7] = bad
    cache = torch.zeros(1, HEADS, 64, layout.token_bytes, dtype=torch.uint8)
    expected = cache.clone()
    backend.write(key, value, cache, torch.tensor([0, 1]), layout, KeyTreatment())
    reference.write(key, value, expected, torch.tensor([0, 1]), layout, KeyTreatment())
    assert torch.equal(cache, expected)
    assert (layout.planes(cache).key_words[0, 1, :, 0] == reference.NAN_WORD).all()


@interpreter
@in_interpreter
@pytest.mark.parametrize(("size", "dtype"), [(80, torch.float32), (128, torch.float16)])
def test_gathered_is_what_the_reference_reads(dtype: torch.dtype, size: int) -> None:
    case = make(layout_of(size), [140], [1])
    keys, values = torch.full((2, 80, HEADS, case.layout.padded_size), float("nan"), dtype=dtype)
    expected = keys.clone(), values.clone()
    row = case.batch.block_table[0]
    backend.gather(case.cache, row, 57, 130, keys, values, case.layout)
    reference.gather(case.cache, row, 57, 130, *expected, case.layout)
    assert torch.equal(keys[:73], expected[0][:73])
    assert torch.equal(values[:73], expected[1][:73])
    assert keys[73:].isnan().all()
    assert values[73:].isnan().all()


@pytest.mark.parametrize(("layout", "fix"), [
    (CacheLayout(128, 96, value_columns=True), "block_size is 96.*multiple of 64"),
    (CacheLayout(128, 64), "value_columns is False.*value_columns=True"),
])  # fmt: skip
def test_other_layouts_are_refused(layout: CacheLayout, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        check_layout(layout)


def test_splits_fill_the_gpu_and_none_is_always_empty() -> None:
    two_warps = DecodeTile(rows=16, tokens=128, warps=2, stages=5)
    assert splits_of(8, 8, 32768, two_warps, DEVICE) == 13
    assert splits_of(1, 8, 131072, two_warps, DEVICE) == 99
    assert splits_of(512, 8, 32768, two_warps, DEVICE) == 1
    lone_warp = DecodeTile(rows=8, tokens=64, warps=1, stages=5)
    assert splits_of(8, 8, 32768, lone_warp, DEVICE) == 25
    assert splits_of(1, 1, 200, lone_warp, DEVICE) == 4


@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_tiles_divide_blocks(size: int) -> None:
    for rows in (1, 8, 9, 17, 300):
        for exact in (True, False):
            for layout in (layout_of(size), layout_of(size, block_size=192)):
                decode = decode_tile(rows, layout, DEVICE, exact=exact)
                assert layout.block_size % decode.tokens == 0
                assert (
                    layout.block_size % prefill_tile(rows, layout, DEVICE, exact=exact).tokens == 0
                )
