"""What vLLM without the plugin does with a checkpoint: rules as data, each with vLLM's file."""

from vllm_quantkit.check.plain.choose import Choice, choose
from vllm_quantkit.check.plain.layer import PlainLayer

__all__ = ["Choice", "PlainLayer", "choose"]
