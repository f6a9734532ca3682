"""Registers each method's config class with vLLM, one method's failure apart from the others."""

from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import register_quantization_config

from vllm_quantkit.integration.config import CONFIGS

logger = init_logger("vllm.quantkit")


def register_all() -> None:
    """Make every method known to `--quantization`; registering again changes nothing."""
    for name, config in CONFIGS.items():
        try:
            register_quantization_config(name)(config)
        except (ValueError, TypeError):
            logger.exception("quantkit: --quantization %s could not be registered.", name)
