"""Pictures: what they show, and that it can be read."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tests.reporting.evaluations import EVALUATION, LONG, SCORES
from vllm_quantkit.reporting.distribution import Distribution
from vllm_quantkit.reporting.drawing import Picture, draw
from vllm_quantkit.reporting.pictures import (
    along_picture,
    distribution_picture,
    layers_picture,
    survival_picture,
)
from vllm_quantkit.reporting.trade_off import Point, trade_off_picture


def words(picture: Picture | None) -> list[str]:
    assert picture is not None
    return [text.text or "" for text in ET.fromstring(picture.file).iter() if "text" in text.tag]


def test_quantiles_are_those_of_all_tokens():
    found = Distribution.of(SCORES)

    divergences = np.concatenate([window.divergences for window in SCORES])
    by_share = dict(zip(found.shares, found.divergences, strict=True))
    assert by_share[0.0] == 0
    assert by_share[0.5] == pytest.approx(float(np.median(divergences)))
    assert by_share[1.0] == 1.0
    assert list(found.losses) == sorted(found.losses)


def test_without_a_base_there_are_losses_alone():
    lone = [type(SCORES[0])(losses=window.losses) for window in SCORES]

    found = Distribution.of(lone)

    assert (found.base_losses, found.divergences) == ((), ())
    assert len(found.losses) == len(found.shares)
    assert distribution_picture(found) is None


def test_axes_are_named_with_their_units():
    assert EVALUATION.distribution is not None
    tokens = words(distribution_picture(EVALUATION.distribution))
    assert "KL(base || model) of a token, nats" in tokens
    assert "share of tokens with at most that" in tokens
    along = words(along_picture(LONG.decodings))
    assert {"token of the continuation", "KL(base || model), nats per token"} <= set(along)
    assert {"greedy text", "sampled text"} <= set(along)
    survival = words(survival_picture(LONG.decodings))
    assert "base beside itself, other batches" in survival


def test_groups_are_drawn_and_blocks_only_where_there_are_no_groups():
    drawn = words(layers_picture(EVALUATION.by_layer))
    assert any(word.startswith("model.layers.0.self_attn.qkv_proj") for word in drawn)
    assert not any(re.match(r"model\.layers\.0 ", word) for word in drawn)

    (block,) = [layer for layer in EVALUATION.by_layer if layer.is_block]
    assert any(re.match(r"model\.layers\.0 ", word) for word in words(layers_picture([block])))
    assert layers_picture([]) is None


def test_models_that_agree_everywhere_can_be_drawn():
    flat = [part.model_copy(update={"divergence": zero()}) for part in LONG.decodings[0].curve]
    same = LONG.decodings[0].model_copy(update={"curve": tuple(flat)})

    assert words(along_picture([same]))
    assert along_picture([same.model_copy(update={"curve": ()})]) is None


def zero():
    return type(LONG.decodings[0].curve[0].divergence)(value=0.0, low=0.0, high=0.0)


def test_a_file_has_paper_and_a_title():
    picture = draw("name", "A <title>", "text", lambda axes: axes.plot([0, 1], [0, 1]))

    root = ET.fromstring(picture.file)

    assert root[0].text == "A <title>"
    assert root[1].attrib["fill"] == "#ffffff"
    assert "<metadata" not in picture.file
    assert re.findall(r"https?://\S+?(?=[\"<])", picture.file) == ["http://www.w3.org/2000/svg"]


POINTS = [
    Point(label="bf16", x=1.0, y=0.0, size=14),
    Point(label="INT8", x=1.5, y=0.0005, size=8),
    Point(label="GPTQ $4$", x=2.60, y=0.0200, size=4),
    Point(label="AWQ", x=2.60, y=0.0201, size=4),
]


def trade_off(points: list[Point]) -> Picture | None:
    return trade_off_picture(
        points, x_label="speed-up", y_label="KL, nats", size_label="weights, GB"
    )


def test_every_way_has_one_label():
    found = words(trade_off(POINTS))

    for point in POINTS:
        assert found.count(point.label) == 1
    assert {"speed-up", "KL, nats", "areas: weights, GB"} <= set(found)


def test_labels_do_not_lie_on_each_other():
    picture = trade_off(POINTS)
    assert picture is not None
    placed = {
        text.text: (float(text.attrib["x"]), float(text.attrib["y"]))
        for text in ET.fromstring(picture.file).iter()
        if text.text in ("GPTQ $4$", "AWQ")
    }

    (x1, y1), (x2, y2) = placed.values()
    # Their points are one; so one is left and one right of it, or one is above the other.
    assert abs(x1 - x2) > 10 or abs(y1 - y2) > 8


def test_areas_follow_sizes():
    picture = trade_off(POINTS)
    assert picture is not None
    assert "bf16: speed-up 1, KL, nats 0" in picture.alt


def test_one_way_alone_can_be_drawn():
    assert words(trade_off([POINTS[0]]))


def test_what_was_not_measured_is_not_drawn():
    broken = [Point(label="broken", x=math.nan, y=1, size=1), *POINTS]

    assert "broken" not in words(trade_off(broken))
    assert trade_off(broken[:1]) is None
