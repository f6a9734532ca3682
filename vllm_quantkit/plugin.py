"""`register()`: the `vllm.general_plugins` entry point. vLLM calls it in every process."""

from __future__ import annotations

import logging

# vLLM formats and levels only loggers below its own name.
logger = logging.getLogger("vllm.quantkit")


def register() -> None:
    """Register every method with vLLM; safe to call any number of times.

    A failure is logged as a sentence instead of raised: vLLM drops a plugin that raises, and the
    user would only see "unknown quantization method".
    """
    try:
        from vllm_quantkit.integration.registration import register_all
    except ImportError:
        logger.exception(
            "quantkit: this vLLM lacks what the plugin needs; no method is registered."
        )
        return
    register_all()
