"""How far a scheme is from the 16-bit model: measured, or as far as others have published.

Mean KL divergence of the next token's distribution, in nats, as a range. Where only perplexity is
published, ln(1 + its relative increase) stands for it: in llama.cpp's table for Llama 3 8B the two
are 0.028 and 0.031 at 4 bits, 0.45 and 0.45 at 2.
"""

from __future__ import annotations

from math import sqrt
from typing import Literal

from vllm_quantkit.advise.candidates import CacheName, Candidate, SchemeName
from vllm_quantkit.spec import Frozen

Basis = Literal["exact", "measured", "partly measured", "published"]

LLAMA_CPP = "https://github.com/ikawrakow/ik_llama.cpp/blob/main/examples/perplexity/README.md"
SMOOTHQUANT = "https://github.com/mit-han-lab/smoothquant"
TRADE_OFFS = "https://arxiv.org/abs/2411.02355"
FP8_FORMATS = "https://arxiv.org/abs/2209.05433"
GPTQ = "https://github.com/IST-DASLab/gptq"
KIVI = "https://github.com/jy-yuan/KIVI/blob/main/docs/long_bench.md"
QUANTIZERS = "benchmarks/results/quantizers_cpu.json"
KV_SERVING = "benchmarks/results/kv_serving_cpu.json"


class QualityRange(Frozen):
    """Where the mean KL divergence from the 16-bit model is, or is likely to be.

    Attributes:
        low, high: in nats.
        basis: 16 bits exactly, measured on this model (or in part: weights, but not the cache), or
            published of others.
        words: of what models, and what else is known.
        sources: URLs, or result files of this project.
    """

    low: float
    high: float
    basis: Basis
    words: str
    sources: tuple[str, ...] = ()

    @property
    def likely(self) -> float:
        """The middle of the range, on a logarithmic scale where that is possible."""
        return sqrt(self.low * self.high) if self.low > 0 else (self.low + self.high) / 2

    def plus(self, other: QualityRange) -> QualityRange:
        """Both together; small divergences add up, as far as they are independent."""
        if other.basis == "exact":
            return self
        if self.basis == "exact":
            return other
        return QualityRange(
            low=self.low + other.low,
            high=self.high + other.high,
            basis=self.basis if self.basis == other.basis else "partly measured",
            words=f"{self.words}; {other.words}",
            sources=tuple(dict.fromkeys((*self.sources, *other.sources))),
        )


EXACT = QualityRange(low=0, high=0, basis="exact", words="the model as it is")


def _published(low: float, high: float, words: str, *sources: str) -> QualityRange:
    return QualityRange(low=low, high=high, basis="published", words=words, sources=sources)


FLOAT8 = _published(
    0.0056,
    0.0062,
    "KL of this project's demo model and its twin with outliers; lossless on the benchmarks of "
    "Llama 3.1 8B to 405B",
    QUANTIZERS,
    TRADE_OFFS,
    FP8_FORMATS,
)
INT4_CALIBRATED = _published(
    0.0127,
    0.0431,
    "4-bit K-quants of llama.cpp on Llama 2 7B and Llama 3 8B; this project's demo model is at "
    "0.013 (GPTQ) and 0.019 (AWQ); accuracy is competitive with W8A8 of INT8",
    LLAMA_CPP,
    QUANTIZERS,
    TRADE_OFFS,
)

PUBLISHED: dict[SchemeName, QualityRange] = {
    "16-bit": EXACT,
    "fp8": FLOAT8,
    "fp8-block": FLOAT8,
    "smoothquant": _published(
        0.0009,
        0.0429,
        "this project's demo model, and perplexity of Llama 2 and 3 (+0.5 % for Mistral 7B, "
        "+0.7 % for Llama 2 7B, +2.0 % for Llama 3 8B, +4.4 % for 70B); 1 to 3 % of accuracy",
        QUANTIZERS,
        SMOOTHQUANT,
        TRADE_OFFS,
    ),
    "int8": _published(0.0004, 0.0014, "q8_0 of llama.cpp on Llama 2 7B and Llama 3 8B", LLAMA_CPP),
    "awq": INT4_CALIBRATED,
    "gptq": INT4_CALIBRATED,
    "int4": _published(
        0.0315,
        0.0719,
        "this project's demo model rounded to nearest, and q4_0 of llama.cpp on Llama 3 8B",
        QUANTIZERS,
        LLAMA_CPP,
    ),
}
"""KL divergence of models whose weights, and for some schemes activations, are quantised."""

PUBLISHED_CACHES: dict[CacheName, QualityRange] = {
    "auto": EXACT,
    "fp8": _published(
        0.0,
        0.0003,
        "perplexity of this project's demo model with an FP8 cache (-0.03 % to +0.03 %); greedy "
        "answers still part after some tokens",
        KV_SERVING,
    ),
    "int4": _published(
        0.0027,
        0.0034,
        "perplexity of this project's demo model with an INT4 cache; KIVI's 4 bits keep the "
        "LongBench average of LongChat 7B (38.79 beside 38.72)",
        KV_SERVING,
        KIVI,
    ),
}
"""The same of models whose KV cache is quantised."""

SUB_4_BIT = {
    3: _published(0.0639, 0.2282, "GPTQ of the demo model, 3-bit K-quants", QUANTIZERS, LLAMA_CPP),
    2: _published(0.1089, 0.4451, "q2_K of llama.cpp on Llama 2 7B and Llama 3 8B", LLAMA_CPP),
}
"""Bits to what fewer than four cost."""


def published(candidate: Candidate) -> QualityRange:
    """What is known of the candidate on other models."""
    return PUBLISHED[candidate.scheme.name].plus(PUBLISHED_CACHES[candidate.cache])
