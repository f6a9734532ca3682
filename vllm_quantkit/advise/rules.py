"""What is known about choosing a scheme, as data: a condition, an effect, a sentence, a source.

`answer` rules end the search: the first that holds is the answer. `exclude` rules strike out a
candidate. `prefer` rules decide between candidates whose speeds the estimate cannot tell apart.
`warn` rules add a sentence. Sentences are formatted with the `Situation` s and the `Trial` c.
"""

from __future__ import annotations

from vllm_quantkit.advise.quality import (
    KIVI,
    KV_SERVING,
    LLAMA_CPP,
    QUANTIZERS,
    SMOOTHQUANT,
    TRADE_OFFS,
)
from vllm_quantkit.advise.rule import Condition, Rule
from vllm_quantkit.advise.situation import Situation, Trial

ROOFLINE = "https://doi.org/10.1145/1498765.1498785"
VLLM_HARDWARE = "https://docs.vllm.ai/en/v0.14.0/features/quantization/"
VLLM_FP8 = "https://docs.vllm.ai/en/v0.32.0/features/quantization/llm_compressor/fp8/"
VLLM_KV = "https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache/"
REASONING = "https://arxiv.org/abs/2504.04823"
AWQ = "https://arxiv.org/abs/2306.00978"
MLA = "https://arxiv.org/abs/2405.04434"
PAGED = "https://arxiv.org/abs/2309.06180"
DIVERGENCE = "https://arxiv.org/abs/2407.09141"
QLORA = "https://arxiv.org/abs/2305.14314"
KERNEL_REPORT = "benchmarks/results/kernel_report.json"
CPU_LINEAR = "benchmarks/results/cpu_linear.json"

WORTH_IT = 1.15
"""A gain below this is within what the estimate cannot tell, and no reason to lose quality."""

ENOUGH_SAMPLES = 256
SMALL_MODEL = 1_000_000_000
SERVED_FROM = (8, 0)


def _of(*names: str) -> Condition:
    """A condition on the candidate's scheme."""
    return lambda s, c: c is not None and c.candidate.scheme.name in names


def _cache(name: str, c: Trial | None) -> bool:
    return c is not None and c.candidate.cache == name


def _little_to_gain(s: Situation) -> bool:
    speed = s.goal in ("throughput", "latency")
    return speed and bool(s.fits_plain) and s.gain is not None and s.gain < WORTH_IT


def _above(s: Situation, c: Trial | None, *, measured: bool) -> bool:
    if c is None or s.max_kl is None or (c.quality.basis == "measured") != measured:
        return False
    return c.quality.likely > s.max_kl


def _undecided(s: Situation) -> bool:
    quality = s.chosen_quality
    if quality is None or s.max_kl is None or quality.basis == "exact":
        return False
    return quality.likely <= s.max_kl < quality.high


ANSWERS: tuple[Rule, ...] = (
    Rule(
        "quantised-already",
        "answer",
        lambda s, c: s.quantized_as is not None,
        "Serve it as it is: {s.model} is quantised already ({s.quantized_as}). Quantising it again "
        "would add a second error to the first; for another scheme start from the 16-bit model.",
        VLLM_HARDWARE,
    ),
    Rule(
        "full-fine-tuning",
        "answer",
        lambda s, c: s.training == "full",
        "Do not quantise what you want to train: rounded weights have no gradient, so full "
        "fine-tuning needs the 16-bit model. To train on a quantised base, train a LoRA adapter on "
        "it and leave it frozen; or train first and quantise what comes out.",
        QLORA,
    ),
    Rule(
        "apple-silicon",
        "answer",
        lambda s, c: s.kind == "apple",
        "Use llama.cpp with a GGUF file on this machine: it has kernels for {s.device}'s GPU, and "
        "vllm-quantkit has none. Its Q4_K_M takes about 4.9 bits a weight, and on Llama 3 8B its "
        "KL divergence from 16 bits is 0.031.",
        LLAMA_CPP,
    ),
    Rule(
        "old-gpu",
        "answer",
        lambda s, c: s.kind == "cuda" and (s.capability or (0, 0)) < SERVED_FROM,
        "Do not use vllm-quantkit here: its GPU kernels need compute capability 8.0 (Ampere), and "
        "{s.device} is older. vLLM's own GPTQ and AWQ kernels reach back to Turing (7.5) as far as "
        "your version of vLLM still has them; llama.cpp with a GGUF file runs on older ones, too.",
        VLLM_HARDWARE,
    ),
    Rule(
        "mixture-of-experts",
        "answer",
        lambda s, c: s.experts > 0,
        "Use vLLM's own method: vllm-quantkit does not serve mixture-of-experts layers "
        "({s.experts} experts here). On Ada, Hopper and later that is FP8 at load; for 4 bits, an "
        "AWQ or GPTQ checkpoint, which `quantkit quantize` writes for vLLM itself.",
        VLLM_FP8,
    ),
    Rule(
        "nothing-fits",
        "answer",
        lambda s, c: s.fits_any is False,
        "Nothing that may be advised fits one sequence of {s.context} tokens on {s.device}. Use "
        "more GPUs (--tp), a shorter --context, a larger --max-kl if you gave one, or a smaller "
        "model: at the same size it is usually better than fewer than 4 bits.",
        LLAMA_CPP,
    ),
    Rule(
        "best-quality",
        "answer",
        lambda s, c: s.goal == "quality" and bool(s.fits_plain),
        "Do not quantise: quality is the goal, and all {s.batch} sequences of {s.context} tokens "
        "fit beside the 16-bit weights.",
        TRADE_OFFS,
    ),
    Rule(
        "fixed-costs",
        "answer",
        lambda s, c: _little_to_gain(s) and s.limit_plain == "fixed costs",
        "Do not quantise: a step of this model goes to launches and scheduling rather than to its "
        "weights, so the fastest scheme gains {s.gain:.2f}x, which is within the error of this "
        "estimate, and 16 bits fit.",
        ROOFLINE,
    ),
    Rule(
        "compute-bound",
        "answer",
        lambda s, c: _little_to_gain(s) and s.limit_plain == "arithmetic" and not s.fp8,
        "Do not quantise: with {s.batch} sequences the products take longer than reading the "
        "weights, {s.device} does not multiply FP8, and the fastest scheme gains {s.gain:.2f}x; "
        "16 bits fit.",
        ROOFLINE,
    ),
    Rule(
        "little-to-gain",
        "answer",
        lambda s, c: _little_to_gain(s),
        "Do not quantise: 16 bits fit, and the fastest scheme gains {s.gain:.2f}x, less than this "
        "estimate can tell.",
        ROOFLINE,
    ),
)
"""The first that holds is the answer."""

EXCLUDES: tuple[Rule, ...] = (
    Rule(
        "does-not-fit",
        "exclude",
        lambda s, c: c is not None and c.fits < 1,
        "not one sequence of {s.context} tokens fits beside the weights ({c.fits:.2f} do)",
        PAGED,
    ),
    Rule(
        "kl-measured-above",
        "exclude",
        lambda s, c: _above(s, c, measured=True),
        "its measured KL divergence, {c.quality.likely:.4f}, is above {s.max_kl}",
        DIVERGENCE,
    ),
    Rule(
        "kl-likely-above",
        "exclude",
        lambda s, c: _above(s, c, measured=False),
        "its KL divergence is likely above {s.max_kl}: others are at {c.quality.low:.4f} to "
        "{c.quality.high:.4f}",
        LLAMA_CPP,
    ),
    Rule(
        "fp8-without-hardware",
        "exclude",
        lambda s, c: _of("fp8", "fp8-block")(s, c) and s.kind == "cuda" and not s.fp8,
        "{s.device} has no FP8 products, so FP8 weights would meet 16-bit activations: INT8 "
        "weights have the same size and a smaller error",
        VLLM_FP8,
    ),
    Rule(
        "fp8-on-cpu",
        "exclude",
        lambda s, c: _of("fp8", "fp8-block")(s, c) and s.kind == "cpu",
        "CPUs have no FP8 products: INT8 is faster at the same size",
        CPU_LINEAR,
    ),
    Rule(
        "int8-without-hardware",
        "exclude",
        lambda s, c: _of("smoothquant")(s, c) and "int8" not in s.numbers,
        "no rate of INT8 products is published for {s.device}",
        VLLM_HARDWARE,
    ),
    Rule(
        "int4-cache-of-latents",
        "exclude",
        lambda s, c: _cache("int4", c) and s.mla,
        "an INT4 KV cache is not served for latent attention (MLA)",
        MLA,
    ),
)
"""Each strikes out the candidates for which it holds."""

PREFERS: tuple[Rule, ...] = (
    Rule(
        "fp8-is-lossless",
        "prefer",
        lambda s, c: _of("fp8")(s, c) and s.fp8,
        "FP8 loses nothing that benchmarks see, needs no calibration text, and {s.device} "
        "multiplies it at twice the rate of 16-bit floats",
        TRADE_OFFS,
    ),
    Rule(
        "calibrated-4-bit",
        "prefer",
        _of("awq"),
        "of 4-bit weights, those whose salient channels were scaled by what text shows lose less, "
        "and depend less on the text than GPTQ's",
        AWQ,
    ),
    Rule(
        "per-channel-before-blocks",
        "prefer",
        _of("fp8"),
        "scales per channel cost fewer instructions than blocks of 128, at the same size",
        KERNEL_REPORT,
    ),
    Rule(
        "whole-cache",
        "prefer",
        lambda s, c: _cache("auto", c),
        "a 16-bit KV cache loses nothing, and the estimate sees no use of a smaller one",
        KIVI,
    ),
    Rule(
        "measured-cache",
        "prefer",
        lambda s, c: c is not None and s.kind == "cuda" and c.candidate.cache != "int4",
        "on GPUs vLLM's own attention kernels read the cache; those for INT4 have not been "
        "measured there",
        VLLM_KV,
    ),
    Rule(
        "whole-cache-for-reasoning",
        "prefer",
        lambda s, c: s.reasoning and c is not None and c.candidate.cache != "int4",
        "long chains of thought read their own cache for thousands of tokens",
        REASONING,
    ),
)
"""Decide between candidates that are equally good within the error of the estimate."""

WARNINGS: tuple[Rule, ...] = (
    Rule(
        "long-chains-of-thought",
        "warn",
        lambda s, c: s.reasoning and s.chosen not in (None, "16-bit"),
        "this model thinks at length, where small errors add up and short-answer scores do not "
        "show it: hard tasks lose most, small models more than large ones. Measure long answers "
        "(`quantkit eval --long 4096`) before you trust 4 bits.",
        REASONING,
    ),
    Rule(
        "few-samples",
        "warn",
        lambda s, c: s.samples is not None and s.samples < ENOUGH_SAMPLES,
        "a measured checkpoint was calibrated on {s.samples} samples: with fewer than 256, scales "
        "depend on which were chosen. Quantise again with more text, close to what will be served.",
        AWQ,
    ),
    Rule(
        "sub-4-bit",
        "warn",
        lambda s, c: min(s.bits or 16, s.chosen_bits) < 4,
        "weights of fewer than 4 bits lose far more: KL of others is 0.06 to 0.23 at 3 bits and "
        "0.11 to 0.45 at 2. A smaller model in 4 bits is usually the better use of the memory.",
        LLAMA_CPP,
    ),
    Rule(
        "small-model",
        "warn",
        lambda s, c: s.parameters < SMALL_MODEL and s.quality_basis == "published",
        "published figures are of models of 7 billion parameters and more, this one has "
        "{s.billions:.2g} billion, and small models lose more: measure it.",
        REASONING,
    ),
    Rule(
        "smoothquant-varies",
        "warn",
        lambda s, c: s.chosen == "smoothquant" and s.quality_basis == "published",
        "what INT8 activations cost differs much between models (perplexity +0.5 % for Mistral 7B, "
        "+4.4 % for Llama 3 70B): measure it, and try FP8 where the hardware has it.",
        SMOOTHQUANT,
    ),
    Rule(
        "rounded-at-load",
        "warn",
        lambda s, c: s.chosen == "int4",
        "4 bits without calibration lose about twice what AWQ and GPTQ do: calibrate if you have "
        "text like what will be served.",
        QUANTIZERS,
    ),
    Rule(
        "int4-cache",
        "warn",
        lambda s, c: s.chosen_cache == "int4",
        "an INT4 cache without calibration does not survive large key biases (Qwen2): run "
        "`quantkit calibrate-kv` as below. Greedy answers part from those of 16 bits after some "
        "tokens (in the demo model 79 % of 64-token answers do), so measure the task.",
        KV_SERVING,
    ),
    Rule(
        "fp8-cache",
        "warn",
        lambda s, c: s.chosen_cache == "fp8",
        "an FP8 cache without calibrated scales uses scales of 1: run `quantkit calibrate-kv` as "
        "below.",
        VLLM_KV,
    ),
    Rule(
        "not-all-at-once",
        "warn",
        lambda s, c: s.chosen is not None and 1 <= s.chosen_sequences < s.batch,
        "{s.chosen_sequences:.1f} of {s.batch} sequences of {s.context} tokens fit at a time; the "
        "others wait.",
        PAGED,
    ),
    Rule(
        "beyond-positions",
        "warn",
        lambda s, c: 0 < s.max_position < s.context,
        "config.json allows sequences of {s.max_position} tokens, fewer than the {s.context} asked "
        "for: vLLM will refuse that --max-model-len.",
        "https://docs.vllm.ai/en/latest/configuration/engine_args/",
    ),
    Rule(
        "kl-not-certain",
        "warn",
        lambda s, c: _undecided(s),
        "whether its KL divergence stays below {s.max_kl} is not known: the likely value does, the "
        "worst published does not. `quantkit eval --max-kl {s.max_kl}` decides.",
        LLAMA_CPP,
    ),
    Rule(
        "unmeasured-on-gpu",
        "warn",
        lambda s, c: s.kind == "cuda" and s.chosen not in (None, "16-bit"),
        "the speed of vllm-quantkit's GPU kernels has not been measured; these figures come from "
        "data sheets and what kernels usually reach of them.",
        KERNEL_REPORT,
    ),
    Rule(
        "adapters",
        "warn",
        lambda s, c: s.training == "lora" and s.chosen == "smoothquant",
        "an adapter reads what smoothing changes: for LoRA choose weights alone, or FP8.",
        SMOOTHQUANT,
    ),
)
"""Each that holds adds its sentence."""

RULES: tuple[Rule, ...] = (*ANSWERS, *EXCLUDES, *PREFERS, *WARNINGS)
