"""`quantkit check`, once its options are known."""

from __future__ import annotations

from vllm_quantkit.check.preflight import preflight
from vllm_quantkit.check.request import CheckRequest
from vllm_quantkit.check.text import tell
from vllm_quantkit.terminal import Terminal

SERVED, BLOCKED = 0, 1
"""Exit statuses."""


def run_check(request: CheckRequest, terminal: Terminal) -> int:
    """Say whether the model will be served; returns the exit status.

    Raises:
        QuantkitError: model, device or version are none that can be checked.
    """
    report = preflight(request)
    tell(report, terminal)
    terminal.result(report)
    return SERVED if report.serves else BLOCKED
