"""encode and decode are inverses, for every dialect, width, group size and ragged shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.formats import Role, get_format
from vllm_quantkit.spec import ALL_ROWS, ActivationSpec, LayerShape, SchemeSpec, WeightSpec

BOUND = 1200.0

GROUP_SIZES = (-1, 16, 32, 50, 64, 128)


def scheme(dialect, *, bits=4, group_size=32, symmetric=False, act_order=False, variant=""):
    weight = WeightSpec(bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order)
    return SchemeSpec(dialect=dialect, weight=weight, variant=variant)


def eight_bits(dialect, activation=None, variant="", **weight):
    """A scheme of 8-bit elements; E4M3 per channel unless `weight` says else."""
    numerics = {"bits": 8, "group_size": -1, "symmetric": True, "code_type": "e4m3", **weight}
    return SchemeSpec(
        dialect=dialect, weight=WeightSpec(**numerics), variant=variant, activation=activation
    )


STATIC = ActivationSpec(code="e4m3", dynamic=False, group_size=0)
STATIC_ASYMMETRIC = ActivationSpec(code="int8", dynamic=False, group_size=0, symmetric=False)
BLOCKS = {"group_size": 16, "scale_rows": 8}

EIGHT_BITS = [
    eight_bits("fp8", scale_rows=ALL_ROWS),
    eight_bits("fp8", STATIC, scale_rows=ALL_ROWS, code_type="e5m2"),
    eight_bits("fp8"),
    eight_bits("fp8", ActivationSpec(code="e4m3", group_size=16), **BLOCKS),
    eight_bits("fbgemm_fp8", ActivationSpec(code="e4m3", upper_bound=BOUND)),
    eight_bits("compressed-tensors", STATIC, "float-quantized", scale_rows=ALL_ROWS),
    eight_bits("compressed-tensors", None, "naive-quantized", **BLOCKS),
    eight_bits("compressed-tensors", STATIC_ASYMMETRIC, "int-quantized", code_type="int"),
    *(
        eight_bits(
            "compressed-tensors",
            None,
            "naive-quantized",
            code_type="int",
            bits=bits,
            symmetric=False,
            **extent,
        )
        for bits in (3, 4, 8)
        for extent in (BLOCKS, {"scale_rows": ALL_ROWS}, {"group_size": 16, "act_order": True})
    ),
    eight_bits("bitsandbytes", ActivationSpec(code="int8"), code_type="int"),
    eight_bits("bitsandbytes", None, bits=4, group_size=16, code_type="nf4"),
    eight_bits("16-bit", None),
    eight_bits("quantkit", ActivationSpec(code="e4m3")),
    eight_bits("quantkit", STATIC_ASYMMETRIC, code_type="int"),
    eight_bits("quantkit", None, **BLOCKS),
    eight_bits("quantkit", None, bits=4, group_size=16, code_type="nf4"),
]


def canonical(spec, shape, seed):
    """Random canonical tensors of a layer, by role; scales are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    N, K = shape.out_features, shape.in_features
    G, top = spec.weight.num_groups(K), 2**spec.weight.bits
    height = N if spec.weight.scale_rows == ALL_ROWS else spec.weight.scale_rows
    first = torch.arange(N) // height * height  # the row whose scales this one shares
    return {
        Role.CODES: torch.randint(top, (N, K), generator=generator, dtype=torch.uint8),
        Role.SCALES: torch.randint(1, 256, (N, G), generator=generator)[first] / 256,
        Role.ZEROS: torch.randint(top, (N, G), generator=generator, dtype=torch.uint8)[first],
        Role.GROUP_INDEX: torch.randint(G, (K,), generator=generator, dtype=torch.int32),
        Role.SHAPE: torch.tensor([N, K]),
        Role.INPUT_SCALE: torch.rand(1, generator=generator).half().float(),
        Role.INPUT_ZERO: torch.randint(-128, 128, (1,), generator=generator).float(),
        Role.WEIGHT: torch.randn(N, K, generator=generator).bfloat16(),
        Role.MARK: MARKS.get(spec.dialect, torch.ones(1)),
    }


MARKS = {
    "fbgemm_fp8": torch.tensor([BOUND]),
    "bitsandbytes": torch.tensor(0, dtype=torch.uint8),
}
"""Dialect to the mark that it takes."""


def assert_round_trip(spec, shape, seed):
    values = canonical(spec, shape, seed)
    for tensor in get_format(spec.dialect).tensors(spec, shape):
        before = values[tensor.role].clone()
        dtypes = {before.dtype}
        # Scales are stored in the dtype that they are given in, SCB times 127.
        if tensor.role is Role.SCALES and tensor.name != "SCB":
            dtypes = SCALE_DTYPES & {*tensor.dtypes}
        for dtype in dtypes:
            assert_decoded(tensor, values[tensor.role].to(dtype), before)
        assert torch.equal(values[tensor.role], before), "encode changed its input"


SCALE_DTYPES = {torch.float16, torch.bfloat16, torch.float32}


def assert_decoded(tensor, value, before):
    stored = tensor.encode(value)
    assert tuple(stored.shape) == tensor.shape
    assert stored.dtype == (value.dtype if tensor.role is Role.SCALES else tensor.dtypes[0])
    assert stored.is_contiguous()
    kept = stored.clone()
    decoded = tensor.decode(stored)
    assert decoded.dtype == before.dtype
    torch.testing.assert_close(decoded, before, rtol=0, atol=0)
    # Some codes of 8-bit floats are NaN, which must stay NaN.
    torch.testing.assert_close(stored.double(), kept.double(), rtol=0, atol=0, equal_nan=True)
    # A 16-bit weight is read once, as it lies in the file; what is kept must be a copy.
    assert (decoded.data_ptr() == stored.data_ptr()) == (tensor.role is Role.WEIGHT)


sizes = st.integers(1, 70)
seeds = st.integers(0, 2**16)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from((2, 3, 4, 8)),
    group_size=st.sampled_from(GROUP_SIZES),
    variant=st.sampled_from(("gptq", "gptq_v2")),
    act_order=st.booleans(),
    N=sizes,
    K=sizes,
    seed=seeds,
)
def test_gptq(*, bits, group_size, variant, act_order, N, K, seed):
    spec = scheme("gptq", bits=bits, group_size=group_size, act_order=act_order, variant=variant)
    assert_round_trip(spec, LayerShape(out_features=N, in_features=K), seed)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    group_size=st.sampled_from(GROUP_SIZES),
    act_order=st.booleans(),
    N=sizes,
    K=sizes,
    seed=seeds,
)
def test_compressed_tensors(*, bits, group_size, act_order, N, K, seed):
    spec = scheme("compressed-tensors", bits=bits, group_size=group_size, act_order=act_order)
    assert_round_trip(spec, LayerShape(out_features=N, in_features=K), seed)


@settings(max_examples=100, deadline=None)
@given(
    bits=st.integers(2, 8),
    group_size=st.sampled_from(GROUP_SIZES),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    scale_rows=st.sampled_from((1, 8, ALL_ROWS)),
    N=sizes,
    K=sizes,
    seed=seeds,
)
def test_quantkit(*, bits, group_size, symmetric, act_order, scale_rows, N, K, seed):
    weight = WeightSpec(
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        scale_rows=scale_rows,
    )
    spec = SchemeSpec(dialect="quantkit", weight=weight)
    assert_round_trip(spec, LayerShape(out_features=N, in_features=K), seed)


@pytest.mark.parametrize("spec", EIGHT_BITS, ids=lambda spec: f"{spec.dialect} {spec.variant}")
@settings(max_examples=15, deadline=None)
@given(N=sizes, K=sizes, seed=seeds)
def test_eight_bits(*, spec, N, K, seed):
    assert_round_trip(spec, LayerShape(out_features=N, in_features=K), seed)


@settings(max_examples=40, deadline=None)
@given(group_size=st.sampled_from(GROUP_SIZES), octets=st.integers(1, 9), K=sizes, seed=seeds)
def test_awq_gemm(group_size, octets, K, seed):
    shape = LayerShape(out_features=8 * octets, in_features=K)
    assert_round_trip(scheme("awq", group_size=group_size, variant="gemm"), shape, seed)


@settings(max_examples=30, deadline=None)
@given(
    group_size=st.sampled_from((32, 64, 128, 256)),
    groups=st.integers(1, 9),
    N=sizes,
    seed=seeds,
)
def test_awq_gemv(group_size, groups, N, seed):
    shape = LayerShape(out_features=N, in_features=group_size * groups)
    assert_round_trip(scheme("awq", group_size=group_size, variant="gemv"), shape, seed)


def test_gemv_per_channel():
    shape = LayerShape(out_features=9, in_features=192)
    assert_round_trip(scheme("awq", group_size=-1, variant="gemv"), shape, 0)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (scheme("awq", variant="gemm"), (12, 64)),
        (scheme("awq", variant="gemv"), (16, 36)),
        (scheme("awq", group_size=16, variant="gemv"), (16, 64)),
        (scheme("awq", group_size=64, variant="gemv"), (16, 96)),
        (scheme("awq", variant="gemv_fast"), (16, 64)),
        (scheme("awq", bits=8), (16, 64)),
        (scheme("awq", act_order=True), (16, 64)),
        (scheme("gptq", bits=5), (16, 64)),
        (scheme("gptq", variant="marlin"), (16, 64)),
        (eight_bits("quantkit", None, bits=4), (16, 64)),
        (eight_bits("quantkit", None, code_type="fp4"), (16, 64)),
        (eight_bits("quantkit", None, symmetric=False), (16, 64)),
    ],
)
def test_refuses_what_the_dialect_cannot_store(spec, shape):
    size = LayerShape(out_features=shape[0], in_features=shape[1])
    with pytest.raises(UnsupportedScheme, match=r"Use |Quantise again|Keep the layer|Choose other"):
        get_format(spec.dialect).tensors(spec, size)


@pytest.mark.parametrize("dialect", ["awq", "gptq", "compressed-tensors", "quantkit"])
def test_encode_refuses_values_that_spill_into_their_neighbours(dialect):
    spec, shape = scheme(dialect), LayerShape(out_features=16, in_features=64)
    for tensor in get_format(dialect).tensors(spec, shape):
        if tensor.role in (Role.CODES, Role.ZEROS):
            columns = 64 if tensor.role is Role.CODES else 2
            with pytest.raises(ValueError, match="must be below 16 to be stored, but one is 16"):
                tensor.encode(torch.full((16, columns), 16, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (scheme("awq", variant="gemm"), (16, 50)),
        (scheme("awq", variant="gemv"), (5, 64)),
        (scheme("gptq", bits=3, act_order=True), (16, 50)),
        (scheme("gptq", bits=4), (16, 64)),
        (scheme("compressed-tensors", bits=3, group_size=32), (7, 64)),
        (scheme("compressed-tensors", bits=4, group_size=-1), (7, 64)),
        (scheme("quantkit", bits=3, group_size=32), (7, 64)),
        *((spec, (7, 64)) for spec in EIGHT_BITS if spec.weight.code_type != "nf4"),
    ],
)
def test_infer_shape(spec, shape):
    size = LayerShape(out_features=shape[0], in_features=shape[1])
    fmt = get_format(spec.dialect)
    stored = {tensor.name: tensor.shape for tensor in fmt.tensors(spec, size)}
    assert fmt.infer_shape(spec, stored) == size
    assert set(stored) <= set(fmt.TENSORS)
    assert fmt.codes_name(spec) in stored


def test_compressed_tensors_takes_a_padded_size_from_weight_shape():
    spec = scheme("compressed-tensors", bits=3, group_size=-1)
    fmt, size = get_format("compressed-tensors"), LayerShape(out_features=7, in_features=64)
    stored = {tensor.name: tensor.shape for tensor in fmt.tensors(spec, size)}
    assert fmt.infer_shape(spec, stored).in_features == 70  # 7 words of 10 codes
    assert fmt.infer_shape(spec, stored, (7, 64)) == size
