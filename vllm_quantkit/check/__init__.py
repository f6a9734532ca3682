"""`quantkit check`: whether a model will be served, by its config.json and headers alone.

Nothing is downloaded, loaded or started, and vLLM is not imported; the device need not be here.
"""

from vllm_quantkit.check.command import run_check
from vllm_quantkit.check.preflight import preflight
from vllm_quantkit.check.report import CheckReport
from vllm_quantkit.check.request import CheckRequest

__all__ = ["CheckReport", "CheckRequest", "preflight", "run_check"]
