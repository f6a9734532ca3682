"""Errors of a cache's formats, beside attention computed query by query in float64."""

from __future__ import annotations

import math

import pytest
import torch

from quantkit_kernels.kv_int4 import CacheLayout, KeyTreatment
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.kv_calibration import KVErrors
from vllm_quantkit.quantize.kv_cache import errors as errors_module
from vllm_quantkit.quantize.kv_cache.attention import AttentionCall
from vllm_quantkit.quantize.kv_cache.errors import ErrorMeter
from vllm_quantkit.quantize.kv_cache.formats import CacheFormat, e4m3, int4_keys, int4_values

TOKENS, SIZE = 37, 24


def made_call(
    *,
    heads: int = 6,
    kv_heads: int = 2,
    window: int = 0,
    float_mask: bool = False,
    softcap: float | None = None,
    sinks: bool = False,
) -> AttentionCall:
    generator = torch.Generator().manual_seed(heads + window)
    query = 2 * torch.randn(2, heads, TOKENS, SIZE, generator=generator)
    key, value = torch.randn(2, 2, kv_heads, TOKENS, SIZE, generator=generator)
    mask = None
    if window:
        distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
        mask = ((distance >= 0) & (distance < window))[None, None]
    if float_mask and mask is not None:
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    extra = torch.randn(heads, generator=generator) if sinks else None
    return AttentionCall(query, key, value, mask, 0.3, softcap, extra)


def slow_errors(call: AttentionCall, form: CacheFormat, window: int, rows: list[int]) -> KVErrors:
    """From the definitions, in float64, a query at a time."""
    logits, softmaxes, outputs, norms = [], [], [], []
    back, whole = [], []
    group = call.query.shape[1] // call.key.shape[1]
    for sample in range(len(call.query)):
        for head in range(call.query.shape[1]):
            key, value = (x[sample, head // group] for x in (call.key, call.value))
            stored = form.key(key[:, None])[:, 0], form.value(value[:, None])[:, 0]
            if head % group == 0:
                back.append((stored[1] - value).double().square().sum())
                whole.append(value.double().square().sum())
            for row in rows:
                first = max(0, row - window + 1) if window else 0
                query = call.query[sample, head, row].double()
                seen = []
                for keys, values in ((key, value), stored):
                    plain = call.scale * (keys[first : row + 1].double() @ query)
                    capped = plain
                    if call.softcap is not None:
                        capped = call.softcap * torch.tanh(plain / call.softcap)
                    if call.sinks is not None:
                        capped = torch.cat((capped, call.sinks[head, None].double()))
                    softmax = capped.exp() / capped.exp().sum()
                    mixed = softmax[: len(plain)] @ values[first : row + 1].double()
                    seen.append((plain, softmax, mixed))
                apart = seen[1][0] - seen[0][0]
                logits.append(apart - apart.mean())
                softmaxes.append((seen[1][1] - seen[0][1]).abs().sum() / 2)
                outputs.append((seen[1][2] - seen[0][2]).square().sum())
                norms.append(seen[0][2].square().sum())
    return KVErrors(
        logits=float(torch.cat(logits).square().mean().sqrt()),
        softmax=float(torch.stack(softmaxes).mean()),
        values=math.sqrt(float(sum(back) / sum(whole))),
        output=math.sqrt(float(sum(outputs) / sum(norms))),
    )


FORMATS = {
    "int4": CacheFormat(
        int4_keys(
            CacheLayout(SIZE, 16),
            KeyTreatment(torch.linspace(-1, 1, SIZE)[None], torch.linspace(0.5, 2, SIZE)[None]),
        ),
        int4_values(CacheLayout(SIZE, 16)),
    ),
    "fp8": CacheFormat(e4m3(0.02), e4m3(0.01)),
}


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"heads": 4, "kv_heads": 1},
        {"heads": 3, "kv_heads": 3},
        {"window": 9},
        {"window": 9, "float_mask": True},
        {"softcap": 3.0},
        {"sinks": True, "window": 5},
    ],
    ids=str,
)
def test_errors_are_those_of_the_definitions(case):
    call = made_call(**case)
    meter = ErrorMeter(FORMATS, torch.float32)
    meter.add(call)
    for name, found in meter.errors().items():
        expected = slow_errors(call, FORMATS[name], case.get("window", 0), list(range(TOKENS)))
        for field, value in expected.model_dump().items():
            # float32 sums of 24 products against float64; errors are 1e-2 to 1
            assert getattr(found, field) == pytest.approx(value, rel=1e-4, abs=1e-7), (name, field)
        assert found.softmax > 1e-3


def test_of_long_samples_some_queries_are_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(errors_module, "QUERIES", 10)
    call = made_call()
    meter = ErrorMeter(FORMATS, torch.float32)
    meter.add(call)
    expected = slow_errors(call, FORMATS["int4"], 0, list(range(0, TOKENS, 4)))
    assert meter.errors()["int4"].softmax == pytest.approx(expected.softmax, rel=1e-4)


def test_errors_are_beside_the_models_own_cache():
    """What 16 bits round off is nobody's error: a format that gives it back has none."""
    call = made_call()
    same = CacheFormat(lambda key: key.bfloat16().float(), lambda value: value.bfloat16().float())
    for dtype, exact in ((torch.bfloat16, True), (torch.float32, False)):
        meter = ErrorMeter({"bf16": same}, dtype)
        meter.add(call)
        assert (
            meter.errors()["bf16"] == KVErrors(logits=0, softmax=0, values=0, output=0)
        ) == exact


def test_a_constant_taken_from_every_key_is_no_error():
    """Softmax does not see it: so 4 bits need not hold it."""
    call = made_call()
    moved = CacheFormat(lambda key: key + 3.0, lambda value: value)
    meter = ErrorMeter({"moved": moved}, torch.float32)
    meter.add(call)
    found = meter.errors()["moved"]
    # float32 of logits about 20
    assert found.logits < 1e-5
    assert found.softmax < 1e-5


def test_int4_gives_back_what_it_was_given_less_its_rounding():
    key = 3 + torch.randn(50, 2, SIZE, generator=torch.Generator().manual_seed(0))
    layout = CacheLayout(SIZE, 16)
    treatments = [KeyTreatment(), KeyTreatment(key.mean(0), key.std(0).sqrt())]
    errors = [
        float((int4_keys(layout, treatment)(key) - key).norm() / (key - key.mean(0)).norm())
        for treatment in treatments
    ]
    # steps of a 15th of about 5 spreads, over sqrt(12); padding of 24 to 32 dimensions helps
    assert 0.03 < errors[1] < 0.12 < errors[0]


def test_e4m3_saturates():
    values = torch.tensor([1000.0, -1000.0, 0.5]).view(1, 1, 3)
    assert e4m3(1.0)(values).flatten().tolist() == [448.0, -448.0, 0.5]


def test_what_4_bits_cannot_hold_is_an_error_and_not_nan():
    call = made_call()
    call.key[0, 0, 3] = 1e30
    meter = ErrorMeter({"int4": FORMATS["int4"]}, torch.float32)
    meter.add(call)
    assert meter.errors()["int4"].softmax > 0.01


def test_masks_that_a_cache_cannot_serve_are_refused():
    plain = made_call(window=9, float_mask=True)
    assert plain.mask is not None
    rows = torch.arange(TOKENS)
    biased = AttentionCall(
        plain.query, plain.key, plain.value, plain.mask + 0.5, plain.scale, None, None
    )
    with pytest.raises(UnsupportedScheme, match="adds a bias to its attention logits"):
        biased.visible(0, rows)
    wide = AttentionCall(
        plain.query, plain.key, plain.value, plain.mask.repeat(1, 6, 1, 1), 1.0, None, None
    )
    with pytest.raises(UnsupportedScheme, match="masks differ between its 6 heads"):
        wide.visible(0, rows)
