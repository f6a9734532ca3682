"""Encoding a layer loses nothing: scales keep their bits, or the layer is refused."""

import pytest
import torch

from quantkit_kernels.wna16 import QuantizedWeight
from tests.written_schemes import FLOAT, TOKEN_FP8, W8A8, compressed, gptq, integers, quantkit
from vllm_quantkit.formats import get_format
from vllm_quantkit.quantize.output.checkpoint import encode_layer, scale_dtype_for

N, K = 16, 64
AWQ = get_format("awq").scheme(integers(4, 32, symmetric=False), None)
W4 = compressed(integers(4, 32))


def layer(scheme, scale):
    groups = scheme.weight.num_groups(K)
    return QuantizedWeight(
        codes=torch.randint(2**scheme.weight.bits, (N, K), dtype=torch.uint8),
        scales=torch.full((N, groups), scale),
        zeros=torch.full((N, groups), scheme.weight.default_zero, dtype=torch.uint8),
        group_index=(torch.arange(K) // (K // groups)).int(),
        bits=scheme.weight.bits,
        code_type=scheme.weight.code_type,
    )


def scales_of(scheme, weight, dtype=None):
    stored = encode_layer(weight, scheme, scale_dtype=dtype)
    return next(tensor for name, tensor in stored.items() if "scale" in name)


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (W4, torch.bfloat16),
        (compressed(integers(8, -1)), torch.bfloat16),
        (AWQ, torch.float16),
        (gptq(integers(4, 32)), torch.float16),
        (W8A8, torch.float32),
        (compressed(FLOAT, TOKEN_FP8), torch.float32),
        (compressed(FLOAT), torch.float32),
        (quantkit(integers(3, 32)), torch.float32),
    ],
    ids=lambda value: getattr(value, "dialect", None),
)
def test_scales_are_stored_in_the_dtype_that_readers_keep(scheme, expected):
    assert scale_dtype_for(scheme, torch.bfloat16) is expected
    value = float(torch.tensor(0.1).to(expected))
    stored = scales_of(scheme, layer(scheme, value), expected)
    assert stored.dtype is expected
    assert bool((stored.float() == value).all())


@pytest.mark.parametrize("scheme", [W4, AWQ, gptq(integers(4, 32))], ids=lambda s: s.dialect)
@pytest.mark.parametrize("scale", [0.1, 1e-9, 1e6])
def test_a_scale_that_would_be_rounded_is_refused(scheme, scale):
    with pytest.raises(ValueError, match=r"32 of 32 scales cannot be stored in torch\.float16"):
        encode_layer(layer(scheme, scale), scheme)


def test_a_dtype_that_the_dialect_does_not_have_is_refused():
    scheme = quantkit(integers(3, 32))
    with pytest.raises(ValueError, match=r"stored in torch\.float32, but torch\.float16 was asked"):
        encode_layer(layer(scheme, 0.5), scheme, scale_dtype=torch.float16)
