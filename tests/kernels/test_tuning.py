"""Buckets of tokens, and the tiles that are chosen for them: pure functions, so all are tried."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit_kernels.tile_choice import KERNELS, llm_int8_tile, scaled_tile, wna16_tile
from quantkit_kernels.tuning import (
    BUCKETS,
    Device,
    allowed_splits,
    batch_invariant,
    bucket_of,
    bucket_starts,
    set_batch_invariant,
    whole_splits,
)
from quantkit_kernels.tuning_tables import Product
from quantkit_kernels.wna16.weights import CONTAINER_OF
from tests.kernels.aot import DEVICES

devices = st.sampled_from(DEVICES)
tokens = st.integers(1, 20000)
SCALED = [name for name in KERNELS if not name.startswith("wna16")]


@st.composite
def products(draw: st.DrawFn) -> Product:
    """Any that weights are packed to."""
    kernel = draw(st.sampled_from(sorted(KERNELS)))
    n = draw(st.integers(1, 65536))
    if kernel.startswith("wna16"):
        group = draw(st.sampled_from((0, 16, 32, 64, 128)))
        return Product(kernel, n, 128 * draw(st.integers(1, 256)), group)
    group = draw(st.sampled_from((0, 32, 64, 128))) if kernel != "llm_int8" else 0
    return Product(kernel, n, draw(st.integers(1, 32768)), group)


@pytest.fixture
def invariant() -> Iterator[None]:
    set_batch_invariant(True)
    yield
    set_batch_invariant(False)


def chosen(product: Product, m: int, device: Device) -> Any:
    """The tile that a launch gets."""
    kernel, n, k, group = product
    family, _, codes = kernel.partition("-")
    if family == "llm_int8":
        return llm_int8_tile(m, n, k, device)
    code_type: Any = "int" if codes.startswith("int") else codes
    if family == "scaled":
        return scaled_tile(m, n, k, group or 128, group > 0, code_type, device)
    return wna16_tile(m, n, k, bits_of(product), group or k, code_type, device)


def bits_of(product: Product) -> int:
    """Of a code of the weight."""
    _, _, codes = product.kernel.rpartition("-")
    if product.kernel in SCALED:
        return 8
    return CONTAINER_OF.get(codes) or int(codes.removeprefix("int"))


def k_steps(product: Product, tile: Any) -> int:
    return -(-product.k // getattr(tile, "block_k", 128))


def test_buckets_cover_all_numbers_of_tokens_in_order() -> None:
    found = [bucket_of(m) for m in range(1, 20000)]
    assert found == sorted(found)
    assert tuple(dict.fromkeys(found)) == BUCKETS
    assert all(bucket >= m for m, bucket in enumerate(found, 1) if m <= BUCKETS[-1])
    assert all(bucket_of(bucket) == bucket for bucket in BUCKETS)
    assert all(bucket < 2 * m for m, bucket in enumerate(found, 1))


@given(most=tokens)
def test_one_number_of_tokens_stands_for_every_bucket(most: int) -> None:
    starts = bucket_starts(most)
    assert max(starts) <= most
    assert {bucket_of(m) for m in starts} == {bucket_of(m) for m in range(1, most + 1)}
    assert len({bucket_of(m) for m in starts}) == len(starts)


@given(product=products(), m=tokens, device=devices)
def test_every_chosen_tile_can_run(product: Product, m: int, device: Device) -> None:
    tile = chosen(product, m, device)
    assert KERNELS[product.kernel].refusal(tile, product, device) == ""
    assert tile.block_m in (16, 32, 64, 128, 256)
    assert tile.stages >= 2
    steps = k_steps(product, tile)
    assert (tile.splits - 1) * -(-steps // tile.splits) < steps  # none is empty


@given(product=products(), m=tokens, device=devices)
def test_a_bucket_is_cut_as_each_of_its_tokens(product: Product, m: int, device: Device) -> None:
    bucket, own = chosen(product, m, device), KERNELS[product.kernel].heuristic(product, m, device)
    if m <= 128:
        assert bucket.block_m == own.block_m
    # What a bucket's splits write is allowed by its largest m, so by all.
    assert bucket.splits <= allowed_splits(m, product.k, bits_of(product))


@given(product=products(), m=st.integers(1, 512), device=devices)
def test_few_programs_share_k_as_far_as_it_pays(product: Product, m: int, device: Device) -> None:
    tile, bucket = chosen(product, m, device), bucket_of(m)
    if getattr(tile, "dense", False) or getattr(tile, "persistent", False):
        return
    programs = -(-product.n // tile.block_n) * -(-bucket // tile.block_m)
    allowed = allowed_splits(bucket, product.k, bits_of(product))
    most = whole_splits(allowed, k_steps(product, tile))
    assert tile.splits <= most
    # One more split would be a second wave, or not pay.
    assert programs * (tile.splits + 1) > device.multiprocessors or tile.splits == most


@given(product=products(), device=devices)
def test_more_tokens_never_get_smaller_blocks(product: Product, device: Device) -> None:
    blocks = [chosen(product, bucket, device).block_m for bucket in BUCKETS]
    assert blocks == sorted(blocks)


@pytest.mark.usefixtures("invariant")
@given(product=products(), device=devices)
def test_invariant_batches_are_cut_alike(product: Product, device: Device) -> None:
    assert batch_invariant()
    (tile,) = {chosen(product, m, device) for m in (1, 5, 40, 200, 1000, 9000)}
    assert tile.splits == 1
    assert not getattr(tile, "dense", False)
    assert KERNELS[product.kernel].refusal(tile, product, device) == ""


def test_batches_are_not_invariant_unless_asked() -> None:
    assert not batch_invariant()
    h200 = DEVICES[2]
    assert len({wna16_tile(m, 4096, 4096, 4, 128, "int", h200) for m in (1, 64, 512)}) > 1
