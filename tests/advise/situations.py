"""A situation and a trial for rules to look at: plain where a case does not say otherwise."""

from __future__ import annotations

from typing import Any

from vllm_quantkit.advise.candidates import CacheName, Candidate, SchemeName, scheme_named
from vllm_quantkit.advise.quality import QualityRange, published
from vllm_quantkit.advise.situation import Situation, Trial


def situation(**facts: Any) -> Situation:
    """An 8 B model in 16 bits on an H100."""
    usual: dict[str, Any] = {
        "model": "Llama-3.1-8B",
        "parameters": 8_030_000_000,
        "device": "NVIDIA H100",
        "kind": "cuda",
        "capability": (9, 0),
        "numbers": ("bf16", "fp8", "int8"),
        "fp8": True,
        "batch": 32,
        "context": 2048,
        "max_position": 131072,
    }
    return Situation(**(usual | facts))


def trial(
    scheme: SchemeName = "fp8",
    cache: CacheName = "auto",
    fits: float = 40,
    quality: QualityRange | None = None,
) -> Trial:
    """A candidate that fits."""
    candidate = Candidate(scheme=scheme_named(scheme), cache=cache)
    return Trial(candidate=candidate, fits=fits, quality=quality or published(candidate))


def measured(divergence: float) -> QualityRange:
    """A measured divergence."""
    return QualityRange(low=divergence, high=divergence, basis="measured", words="measured")
