"""Memory and speed of each candidate, and how far it is from the 16-bit model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm_quantkit.advise.candidates import Candidate
from vllm_quantkit.advise.measured import Measured, quality_of
from vllm_quantkit.advise.quality import QualityRange
from vllm_quantkit.advise.roofline import (
    Limit,
    LinearClock,
    Rates,
    Work,
    decode_step,
    prefill_seconds,
)
from vllm_quantkit.advise.workload import Workload
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.footprint import Footprint, Model, footprint, layer_groups
from vllm_quantkit.footprint import Workload as Engine
from vllm_quantkit.hardware import Device
from vllm_quantkit.options import Options
from vllm_quantkit.spec import Frozen


class Estimate(Frozen):
    """What a candidate takes and gives.

    Attributes:
        candidate: scheme and cache.
        weight_bytes: on each rank.
        kv_bytes_per_token: on each rank.
        needed_bytes: weights and the cache of all sequences, on each rank.
        sequences: of the whole context that fit at a time.
        running: sequences that run at a time, at most the batch.
        first_token_seconds: from a prompt to the first token, with nothing else running.
        token_seconds: of a decode step, half of the answer written.
        answer_seconds: prompt and answer of one sequence among those running.
        tokens_per_second: of answers, over all sequences, their prompts included.
        limit: what a decode step goes to.
        quality: distance from the 16-bit model.
    """

    candidate: Candidate
    weight_bytes: int
    kv_bytes_per_token: int
    needed_bytes: int
    sequences: float
    running: int
    first_token_seconds: float
    token_seconds: float
    answer_seconds: float
    tokens_per_second: float
    limit: Limit
    quality: QualityRange


class Unserved(Frozen):
    """A candidate that cannot be served, and why."""

    candidate: Candidate
    reason: str


@dataclass(frozen=True)
class Estimator:
    """Estimates candidates for one model, device and workload.

    Attributes:
        model: in 16 bits.
        device: each rank has one.
        workload: what is asked of it.
        rates: what the device reaches.
        clock: of linear layers.
        measured: checkpoints whose quality is known.

    Raises:
        UnsupportedScheme: the model cannot be cut over so many ranks.
    """

    model: Model
    device: Device
    workload: Workload
    rates: Rates
    clock: LinearClock
    measured: tuple[Measured, ...] = ()
    weights: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", linear_weights(self.model, self.workload.tp))

    def estimate(self, candidate: Candidate) -> Estimate | Unserved:
        """The estimate, or why the candidate is not served."""
        try:
            taken = self.footprint(candidate)
        except UnsupportedScheme as error:
            return Unserved(candidate=candidate, reason=str(error))
        return self._timed(candidate, taken)

    def work(self, taken: Footprint) -> Work:
        """What a token reads and multiplies on one rank."""
        facts, tp = self.model.facts, self.workload.tp
        return Work(
            weights=self.weights,
            weight_bytes=taken.linear_bytes,
            head_weights=facts.vocab_size * facts.hidden_size // tp,
            cache_bytes=taken.kv_bytes_per_token,
            layers=facts.num_layers,
            attention=facts.heads * facts.head_dim * facts.num_layers // tp,
            tp=tp,
        )

    def footprint(self, candidate: Candidate) -> Footprint:
        """Memory of a candidate.

        Raises:
            UnsupportedScheme: it is not served.
        """
        scheme, asked = candidate.scheme, self.workload
        return footprint(
            self.model,
            method=scheme.at_load,
            device=self.device,
            kv=candidate.kv,
            options=scheme.options if scheme.at_load else Options(),
            tp=asked.tp,
            workload=Engine(max_model_len=asked.context, max_num_seqs=asked.batch),
        )

    def _timed(self, candidate: Candidate, taken: Footprint) -> Estimate:
        asked, scheme = self.workload, candidate.scheme
        work = self.work(taken)
        running = max(1, min(asked.batch, int(taken.sequences)))
        middle = asked.prompt_tokens + asked.answer_tokens // 2
        step = decode_step(work, scheme, self.clock, self.rates, rows=running, context=middle)
        first = prefill_seconds(work, scheme, self.clock, self.rates, asked.prompt_tokens)
        writing = asked.answer_tokens * step.seconds
        return Estimate(
            candidate=candidate,
            weight_bytes=taken.weight_bytes,
            kv_bytes_per_token=taken.kv_bytes_per_token,
            needed_bytes=taken.weight_bytes
            + taken.kv_bytes_per_token * asked.context * asked.batch,
            sequences=max(0.0, taken.sequences),
            running=running,
            first_token_seconds=first,
            token_seconds=step.seconds,
            answer_seconds=first + writing,
            # Prompts and answers share the device: each prompt stops the others' answers.
            tokens_per_second=running * asked.answer_tokens / (running * first + writing),
            limit=step.limit,
            quality=quality_of(candidate, self.measured),
        )


def linear_weights(model: Model, tp: int) -> int:
    """Weights of a rank's linear layers that a token runs through: not of experts it passes by.

    Raises:
        UnsupportedScheme: the model cannot be cut over so many ranks.
    """
    facts = model.facts
    share = facts.experts_per_token / facts.experts if facts.experts else 1.0
    return int(
        sum(
            group.count
            * group.rank_shape.out_features
            * group.rank_shape.in_features
            * (share if group.expert else 1.0)
            for group in layer_groups(model, None, tp=tp)
            if not group.head
        )
    )


def estimate_all(
    estimator: Estimator, candidates: Sequence[Candidate]
) -> tuple[tuple[Estimate, ...], tuple[Unserved, ...]]:
    """Those that are served, and those that are not."""
    found = [estimator.estimate(candidate) for candidate in candidates]
    served = tuple(one for one in found if isinstance(one, Estimate))
    return served, tuple(one for one in found if isinstance(one, Unserved))
