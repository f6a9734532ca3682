"""vLLM engines in processes of their own, so that nothing else imports vLLM."""

from vllm_quantkit.engine.client import Engine, EngineError, EngineSpec

__all__ = ["Engine", "EngineError", "EngineSpec"]
