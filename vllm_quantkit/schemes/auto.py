"""`--quantization quantkit`: the checkpoint says what it is."""

from collections.abc import Mapping
from typing import Any

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.formats import FORMATS
from vllm_quantkit.schemes.base import Method
from vllm_quantkit.spec import LayerRules, SchemeSpec


class Auto(Method):
    """Any dialect; the scheme of each layer follows from its spec."""

    name = "quantkit"
    dialects = tuple(name for name in FORMATS if name != "16-bit")
    contents = "quantised checkpoints"

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """Whatever a dialect holds."""
        return True

    @classmethod
    def rules(cls, config: Mapping[str, Any]) -> LayerRules:
        """As every method, but the checkpoint must name its dialect.

        Raises:
            ConfigError: it does not.
        """
        if "quant_method" not in config:
            raise ConfigError(
                "the checkpoint's quantization_config has no quant_method, so --quantization "
                "quantkit cannot tell what it is. Add the key, or name the method with "
                "--quantization quantkit-awq or quantkit-gptq."
            )
        return super().rules(config)
