import re
import runpy
import sys
from pathlib import Path

import pytest

from vllm_quantkit.checkpoint import audit, read_headers, read_quantization_config
from vllm_quantkit.formats import get_format

DEMO = Path(__file__).parents[2] / "examples" / "tiny-lm"


def run_demo(monkeypatch: pytest.MonkeyPatch, *options: str | Path) -> None:
    """Runs the script in this process, which has PyTorch loaded already."""
    monkeypatch.syspath_prepend(DEMO)
    monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, options)])
    runpy.run_path(str(DEMO / "quantize.py"), run_name="__main__")
    for neighbour in ("evaluate", "model"):
        del sys.modules[neighbour]


@pytest.mark.parametrize("scheme", ["awq", "gptq"])
def test_the_demo_writes_a_checkpoint_and_says_what_it_costs(
    scheme: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "out"
    for name in ("calibration.txt", "held_out.txt"):
        (tmp_path / name).write_text((DEMO / "data" / name).read_text()[:4000])
    options = ["--model", llama, "--data", tmp_path, "--scheme", scheme, "--out", out]
    run_demo(monkeypatch, *options, "--windows=2", "--length=64")
    printed = capsys.readouterr().out
    assert printed.count("output error") == 14
    assert re.search(r"weights: [\d,]+ -> [\d,]+ bytes", printed)
    perplexities = re.search(r"tokens: ([\d.]+) -> ([\d.]+)\n", printed)
    assert perplexities
    before, after = map(float, perplexities.groups())
    assert abs(after / before - 1) < 0.2
    rules = get_format(scheme).parse(read_quantization_config(out))
    assert len(audit(read_headers(out), rules).quantised) == 14
