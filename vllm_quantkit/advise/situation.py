"""Typed facts that the rules look at."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_quantkit.advise.candidates import CacheName, Candidate, SchemeName
from vllm_quantkit.advise.measured import Measured
from vllm_quantkit.advise.quality import Basis, QualityRange
from vllm_quantkit.advise.roofline import Limit
from vllm_quantkit.advise.workload import Goal, Training, Workload
from vllm_quantkit.footprint import ModelFacts
from vllm_quantkit.hardware import Device, Kind, Number
from vllm_quantkit.spec import Frozen

REASONING_NAMES = re.compile(
    r"(^|[-_/. ])(r1|qwq|qvq|o1|magistral|marco-o1|s1|reasoner|reasoning|thinking|think|"
    r"skywork-or1|openthinker|nemotron-nano|gpt-oss)([-_/. ]|$)",
    re.IGNORECASE,
)
"""In the names of models made for long chains of thought."""

THINK = "<think>"
"""In the chat templates of such models."""

TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")


class Situation(Frozen):
    """A model on a device under a workload, as far as it is known when a rule is asked.

    Attributes:
        model: folder or name.
        parameters: of the model.
        experts: of each mixture layer; 0 without.
        mla: True for latent attention.
        quantized_as: `quant_method` of a checkpoint that is quantised already.
        reasoning: True where name or chat template say that it thinks at length.
        max_position: longest sequence that config.json allows; 0 where it does not say.
        device, kind, capability, numbers, fp8: the device's name, kind, CUDA compute capability,
            what it multiplies, and whether FP8 is among that.
        goal, max_kl, batch, context, training: of the workload.
        samples: fewest that a measured checkpoint was calibrated on.
        bits: fewest of a measured checkpoint's weights.
        fits_plain: True where all sequences fit at a time beside 16-bit weights and cache.
        fits_any: True where any candidate fits at least one sequence.
        limit_plain: what a decode step in 16 bits goes to.
        gain: how many times better than 16 bits the best candidate is; None where 16 bits do not
            fit.
        chosen, chosen_cache: what was chosen.
        chosen_bits: of its weights.
        chosen_sequences: that fit at a time.
        chosen_quality: how far it is from 16 bits, and how that is known.
    """

    model: str
    parameters: int
    experts: int = 0
    mla: bool = False
    quantized_as: str | None = None
    reasoning: bool = False
    max_position: int = 0
    device: str
    kind: Kind
    capability: tuple[int, int] | None = None
    numbers: tuple[Number, ...] = ()
    fp8: bool = False
    goal: Goal = "throughput"
    max_kl: float | None = None
    batch: int
    context: int
    training: Training = "none"
    samples: int | None = None
    bits: int | None = None
    fits_plain: bool | None = None
    fits_any: bool | None = None
    limit_plain: Limit | None = None
    gain: float | None = None
    chosen: SchemeName | None = None
    chosen_cache: CacheName = "auto"
    chosen_bits: int = 16
    chosen_sequences: float = 0.0
    chosen_quality: QualityRange | None = None

    @property
    def billions(self) -> float:
        """Parameters, in 10**9."""
        return self.parameters / 1e9

    @property
    def quality_basis(self) -> Basis:
        """How the chosen candidate's quality is known."""
        return "exact" if self.chosen_quality is None else self.chosen_quality.basis


class Trial(Frozen):
    """A candidate as the rules that exclude or prefer see it.

    Attributes:
        candidate: its scheme and cache.
        fits: sequences that fit at a time.
        quality: how far it is from 16 bits.
    """

    candidate: Candidate
    fits: float
    quality: QualityRange


def situation_of(
    facts: ModelFacts, device: Device, workload: Workload, measured: tuple[Measured, ...] = ()
) -> Situation:
    """What is known before anything is estimated."""
    stored = facts.quantization_config
    samples = [one.samples for one in measured if one.samples is not None]
    return Situation(
        model=facts.model,
        parameters=facts.parameters,
        experts=facts.experts,
        mla=facts.mla,
        quantized_as=None if stored is None else str(stored.get("quant_method", "unknown")),
        reasoning=reasons_at_length(facts.model),
        max_position=facts.max_position,
        device=device.name,
        kind=device.kind,
        capability=device.capability,
        numbers=tuple(device.peaks),
        fp8=device.multiplies_fp8,
        goal=workload.goal,
        max_kl=workload.max_kl,
        batch=workload.batch,
        context=workload.context,
        training=workload.training,
        samples=min(samples, default=None),
        bits=min((one.bits for one in measured), default=None),
    )


def reasons_at_length(model: str) -> bool:
    """True where the model's name, or the chat template in its folder, says so."""
    folder = Path(model)
    if REASONING_NAMES.search(folder.name if folder.is_dir() else model):
        return True
    files = (folder / name for name in TEMPLATE_FILES)
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())
    return any(THINK in text for text in texts)
