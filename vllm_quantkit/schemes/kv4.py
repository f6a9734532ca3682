"""An INT4 KV cache beside 16-bit weights."""

from collections.abc import Mapping
from typing import Any

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.options import LayerOptions
from vllm_quantkit.schemes.base import Method
from vllm_quantkit.spec import LayerRules, SchemeSpec


class KV4(Method):
    """`--quantization quantkit-kv4`."""

    name = "quantkit-kv4"
    dialects = ()
    contents = "16-bit models"
    int4_cache = True

    @classmethod
    def serves(cls, spec: SchemeSpec) -> bool:
        """No checkpoint's layer: weights stay as they are."""
        return False

    @classmethod
    def at_load(cls, options: LayerOptions) -> None:
        """Weights stay in 16 bits."""

    @classmethod
    def rules(cls, config: Mapping[str, Any]) -> LayerRules:
        """Refused: a quantised checkpoint has a method, which serves an INT4 KV cache as well.

        Raises:
            UnsupportedScheme: always.
        """
        found = config.get("quant_method", "unnamed")
        raise UnsupportedScheme(
            f"--quantization {cls.name} serves 16-bit models with an INT4 KV cache, but this "
            f"checkpoint is quantised (quant_method {found!r}); use --quantization quantkit "
            f"--kv-cache-dtype int4_per_token_head, which serves its weights and an INT4 KV cache."
        )
