"""`make demo MODEL=FOLDER` quantises the folder once."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import demo_models
from vllm_quantkit.checkpoint import audit, read_headers, read_quantization_config
from vllm_quantkit.formats import get_format


def test_a_folder_is_quantised_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_models, "CACHE", tmp_path)
    said: list[str] = []
    models = demo_models.prepare(str(llama), said.append)
    assert len(said) == 1
    assert "held-out perplexity" in capfd.readouterr().out
    rules = get_format("awq").parse(read_quantization_config(Path(models.quantized)))
    assert len(audit(read_headers(Path(models.quantized)), rules).quantised) == 14
    assert demo_models.prepare(str(llama), said.append) == models
    assert len(said) == 1


def test_a_model_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="'no/model' is neither a folder nor a model"):
        demo_models.prepare("no/model", print)
