"""The layout of weights on CUDA."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit_kernels.wna16.cuda_layout import pack_codes, pack_scales, unpack_codes, unpack_scales

WIDTHS = [2, 4, 8]
LAYOUTS = pytest.mark.parametrize("quads", [False, True], ids=["pairs", "quads"])


@given(st.data())
@settings(deadline=None, max_examples=30)
@pytest.mark.parametrize("bits", WIDTHS)
@LAYOUTS
def test_packing_codes_loses_nothing(quads: bool, bits: int, data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    words = pack_codes(codes, bits, quads=quads)
    assert words.shape == (-(-n // 128), -(-k // 128), 128, 4 * bits)
    restored = unpack_codes(words, bits, quads=quads)
    assert torch.equal(restored[:n, :k], codes)
    assert not restored[n:].any()
    assert not restored[:, k:].any()


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_packing_scales_loses_nothing_of_16_bit_scales(data: st.DataObject) -> None:
    n, groups = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 20))
    group = data.draw(st.sampled_from([16, 32, 64, 128]))
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


def test_a_whole_row_has_one_scale() -> None:
    words = pack_scales(torch.rand(5, 1), torch.full((5, 1), 8, dtype=torch.uint8), 1024)
    assert words.shape == (1, 128)


@pytest.mark.parametrize("bits", WIDTHS)
@LAYOUTS
def test_words_hold_what_a_thread_multiplies(quads: bool, bits: int) -> None:
    """Thread t of an MMA A fragment holds columns 16 c + 8 j + 2 t + b, or 16 c + 4 t + 2 j + b."""
    threads = torch.arange(128) % 16 // 4 if quads else torch.arange(128) % 8 // 2
    words = pack_codes(threads.to(torch.uint8).expand(64, 128), bits, quads=quads)[0, 0, 0]
    owner = torch.arange(4 * bits) // (2 if bits == 2 else 4) % 4
    repeated = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}[bits]
    assert torch.equal(words.long() & 0xFFFFFFFF, owner * repeated)


@pytest.mark.parametrize("bits", WIDTHS)
@LAYOUTS
def test_both_halves_of_a_word_are_neighbours(quads: bool, bits: int) -> None:
    """Each column's number is its code, a few bits at a time."""
    for shift in range(0, 7, bits):
        columns = torch.arange(128) >> shift & 2**bits - 1
        words = pack_codes(columns.to(torch.uint8).expand(1, 128), bits, quads=quads)[0, 0, 0]
        for low in range(0, 16, bits):
            even, odd = (words >> low + half & 2**bits - 1 for half in (0, 16))
            assert torch.equal(odd, even | 1 if shift == 0 else even)
