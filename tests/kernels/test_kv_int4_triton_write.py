"""What CUDA writes to the 4-bit cache and reads from it, its assembly and tiles, without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit_kernels.kv_int4 import CacheLayout, KeyTreatment, reference
from quantkit_kernels.kv_int4 import triton as backend
from quantkit_kernels.kv_int4 import triton_codes as codes
from quantkit_kernels.kv_int4.triton_tiles import (
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
    different = cache != expected
    # A tie, moved by the rounding of the rotation, changes a nibble by one.
    assert int(different.sum()) <= 1e-3 * len(slots) * HEADS * layout.padded_size
    untouched = torch.ones(3 * 64, dtype=torch.bool)
    untouched[slots[slots >= 0]] = False
    planes = layout.planes(cache)
    rows = planes.key_codes.transpose(1, 2).reshape(3 * 64, -1)
    columns = planes.value_codes.permute(0, 3, 1, 2).reshape(3 * 64, -1)
    assert (rows[untouched] == 0xFF).all()
    assert (columns[untouched] == 0xFF).all()


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


def execute(asm: str, *operands: Tensor) -> list[Tensor]:
    """What one of our assembly strings leaves in its operands, as int64 of 32 bits."""
    registers = {f"${i}": value for i, value in enumerate(operands)}
    for line in asm.replace("{", "").replace("}", "").split(";"):
        name, _, rest = line.strip().partition(" ")
        words = [word.strip() for word in rest.split(",")]
        if not name or name == ".reg":
            continue
        to, *sources = words
        values = [registers[w] if w in registers else torch.tensor(int(w, 0)) for w in sources]
        registers[to] = OPERATIONS[name](*values) & 0xFFFFFFFF
    return list(registers.values())


def permute(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """prmt.b32: each nibble of the selector picks one of eight bytes."""
    both = [a >> 8 * i & 0xFF for i in range(4)] + [b >> 8 * i & 0xFF for i in range(4)]
    return sum(both[int(selector) >> 4 * i & 7] << 8 * i for i in range(4))


def as_pair(high: Tensor, low: Tensor) -> Tensor:
    """cvt.rn.bf16x2.f32."""
    bits = [x.bfloat16().view(torch.int16).long() & 0xFFFF for x in (high, low)]
    return bits[0] << 16 | bits[1]


OPERATIONS = {
    "prmt.b32": permute,
    "lop3.b32": lambda a, b, c, _: (a & b) | c,  # 0xEA: bit i is set where (a & b) | c
    "shr.u32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "and.b32": lambda a, b: a & b,
    "cvt.rn.bf16x2.f32": as_pair,
}


@pytest.mark.parametrize(("asm", "dtype", "base"), [
    (codes.BF16_NIBBLES_ASM, torch.bfloat16, 128), (codes.FP16_NIBBLES_ASM, torch.float16, 1024),
])  # fmt: skip
def test_assembly_of_nibbles(asm: Any, dtype: torch.dtype, base: int) -> None:
    packed = torch.randint(0, 256, (1000, 4), dtype=torch.uint8)
    word = packed.view(torch.int32).squeeze(1).long() & 0xFFFFFFFF
    results = execute(asm.value, *(torch.empty(0),) * 4, word)[:4]
    pairs = torch.stack(results, -1).to(torch.int32).view(dtype).float()  # [1000, 8]
    expected = torch.cat((packed & 15, packed >> 4), -1).float() + base
    assert torch.equal(pairs, expected)


def test_assembly_of_rounding() -> None:
    low, high = torch.randn(2, 1000)
    pair, first, second = execute(codes.ROUND_ASM.value, *(torch.empty(0),) * 3, low, high)[:3]
    assert torch.equal(pair, as_pair(high, low))
    assert torch.equal(first.to(torch.int32).view(torch.float32), low.bfloat16().float())
    assert torch.equal(second.to(torch.int32).view(torch.float32), high.bfloat16().float())


@pytest.mark.parametrize(("layout", "fix"), [
    (CacheLayout(128, 96, value_columns=True), "block_size is 96.*multiple of 64"),
    (CacheLayout(128, 64), "value_columns is False.*value_columns=True"),
])  # fmt: skip
def test_other_layouts_are_refused(layout: CacheLayout, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        check_layout(layout)


def test_splits_fill_the_gpu_and_none_is_always_empty() -> None:
    assert splits_of(8, 8, 32768, 128, DEVICE) == 13
    assert splits_of(1, 8, 131072, 128, DEVICE) == 99
    assert splits_of(512, 8, 32768, 128, DEVICE) == 1
    assert splits_of(1, 1, 200, 64, DEVICE) == 4


@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_tiles_divide_blocks(size: int) -> None:
    for rows in (1, 8, 9, 17, 300):
        for exact in (True, False):
            for layout in (layout_of(size), layout_of(size, block_size=192)):
                decode = decode_tile(rows, layout, DEVICE, exact=exact)
                assert layout.block_size % decode.tokens == 0
                assert layout.block_size % prefill_tile(rows, layout, exact=exact).tokens == 0
