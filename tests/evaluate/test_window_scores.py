"""A window's figures are their definitions, however its positions arrive."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.evaluate import window_scores
from vllm_quantkit.evaluate.window_scores import WindowScores, WindowStream, open_stream

TOKENS = [5, 0, 3, 3, 1, 2, 5, 4]
VOCABULARY = 7

FLOAT32 = 1e-6
"""Relative: log-probabilities are stored in float32, sums over them are in float64."""


def distributions(seed: int) -> Tensor:
    logits = torch.randn(len(TOKENS) - 1, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return (2 * logits).log_softmax(-1)


def stored(path: Path, log_probs: Tensor) -> Path:
    with open_stream(TOKENS, keep=path) as stream:
        stream.add(log_probs)
        stream.finish()
    return path


def compared(base: Path, log_probs: Tensor, *sizes: int) -> WindowScores:
    with open_stream(TOKENS, base=base) as stream:
        for rows in log_probs.split(sizes or (len(log_probs),)):
            stream.add(rows)
        return stream.finish()


def test_figures_are_the_definitions(tmp_path: Path) -> None:
    p, q = distributions(0), distributions(1)
    found = compared(stored(tmp_path / "base", p), q)
    for t, token in enumerate(TOKENS[1:]):
        a, b = p[t].double().tolist(), q[t].double().tolist()
        kl = sum(math.exp(x) * (x - y) for x, y in zip(a, b, strict=True))
        assert found.losses[t] == pytest.approx(-b[token], rel=FLOAT32)
        assert found.base_losses is not None
        assert found.base_losses[t] == pytest.approx(-a[token], rel=FLOAT32)
        assert found.divergences is not None
        assert found.divergences[t] == pytest.approx(kl, rel=FLOAT32)
        assert found.agreements is not None
        assert found.agreements[t] == (a.index(max(a)) == b.index(max(b)))


@pytest.mark.parametrize("sizes", [(1, 6), (3, 4), (1,) * 7])
def test_chunks_change_nothing(
    sizes: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = stored(tmp_path / "base", distributions(0))
    whole = compared(base, distributions(1))
    monkeypatch.setattr(window_scores, "ROWS", 2)
    assert compared(base, distributions(1), *sizes).to_json() == whole.to_json()


def test_positions_behind_the_last_token_are_left_out(tmp_path: Path) -> None:
    base, q = stored(tmp_path / "base", distributions(0)), distributions(1)
    more = torch.cat([q, q[:1]])
    assert compared(base, more).to_json() == compared(base, q).to_json()


def test_a_model_is_as_it_is(tmp_path: Path) -> None:
    found = compared(stored(tmp_path / "base", distributions(0)), distributions(0))
    assert found.divergences is not None
    assert found.agreements is not None
    assert not found.divergences.any()
    assert found.agreements.all()


def test_masked_entries_add_nothing(tmp_path: Path) -> None:
    p, q = distributions(0), distributions(1)
    p[:, 6], q[:, 6] = -math.inf, -math.inf
    found = compared(stored(tmp_path / "base", p), q)
    assert found.divergences is not None
    assert np.isfinite(found.divergences).all()


def test_figures_survive_the_pipe(tmp_path: Path) -> None:
    found = compared(stored(tmp_path / "base", distributions(0)), distributions(1))
    assert WindowScores.from_json(found.to_json()).to_json() == found.to_json()


def test_missing_positions_are_noticed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="6 of 7 distributions"):
        stored(tmp_path / "base", distributions(0)[:-1])
    assert not list(tmp_path.iterdir()), "nothing half-written stays"


def test_what_is_not_a_number_is_refused() -> None:
    rows = distributions(0)
    rows[3, 2] = math.nan
    with (
        pytest.raises(CheckpointError, match="are not numbers"),
        open_stream(TOKENS) as stream,
    ):
        stream.add(rows)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base = stored(tmp_path / "base", distributions(0)[:, :6].log_softmax(-1))
    with pytest.raises(CheckpointError, match="another vocabulary"):
        compared(base, distributions(1))


def test_a_larger_base_vocabulary_is_refused(tmp_path: Path) -> None:
    """Its file has all the bytes that are asked for, and more."""
    base = stored(tmp_path / "base", distributions(0))
    with pytest.raises(CheckpointError, match="another vocabulary"):
        compared(base, distributions(1)[:, :6].log_softmax(-1))


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WindowStream, "add", add)
    with pytest.raises(CheckpointError, match=r"the disk of .* is full"):
        stored(tmp_path / "base", distributions(0))
    assert not list(tmp_path.iterdir())
