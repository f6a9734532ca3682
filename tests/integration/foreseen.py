"""What `quantkit check` foretold about kernels, against what an engine runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_quantkit.check import CheckReport, CheckRequest, preflight
from vllm_quantkit.check.layers import SIXTEEN
from vllm_quantkit.check.report import GroupCheck

RUNS = re.compile(r"INFO: [a-z0-9-]+: (\d+) layers run (.*)\.$")


def foresee(folder: Path | str, method: str | None, **options: Any) -> CheckReport:
    """The check of a model on this machine's CPU, as the tests' engines are started."""
    quantkit = options.pop("quantkit", None) or {}
    request = CheckRequest(
        model=str(folder),
        quantization=method,
        gpu="cpu",
        additional_config=json.dumps({"quantkit": quantkit} if quantkit else {}),
        **{"dtype": "float32", "cpu_cache_space": 1, "max_model_len": 256, **options},
    )
    return preflight(request)


def check_log(
    log: Sequence[str], folder: Path, method: str | None, quantkit: Any = None, **options: Any
) -> None:
    """The log counts the kernels that were foretold, and no others."""
    report = foresee(folder, method, quantkit=quantkit, **options)
    assert report.serves, report.blockers
    assert report.served_by == "quantkit"
    foretold: Counter[str] = Counter()
    for group in report.groups:
        foretold[group.kernel] += group.count if group.kernel != SIXTEEN else 0
    ran = Counter({m[2]: int(m[1]) for line in log if (m := RUNS.match(line))})
    assert ran == +foretold


def check_kernels(answer: Mapping[str, Mapping[str, str]], report: CheckReport) -> None:
    """Every layer runs the kernel foretold for it."""
    names = {name: group for group in report.groups for name in layers_of(group)}
    ran = {name: layer["kernel"] for name, layer in answer.items() if name in names}
    assert ran == {name: expected(group) for name, group in names.items()}


def layers_of(group: GroupCheck) -> list[str]:
    """Names of all layers of a group."""
    return [group.layers.replace("*", str(block)) for block in group.blocks] or [group.layers]


def expected(group: GroupCheck) -> str:
    """How an engine calls a group's kernel; vLLM's go by their classes."""
    return {SIXTEEN: "", "vLLM: CPU WNA16": "CPUWNA16LinearKernel"}.get(group.kernel, group.kernel)
