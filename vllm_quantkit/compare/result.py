"""What was found of every row: the content of `table.json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from vllm_quantkit.bench.results import Entry
from vllm_quantkit.evaluate.intervals import Interval
from vllm_quantkit.evaluate.quality import Quality
from vllm_quantkit.evaluate.tasks import TaskScore
from vllm_quantkit.spec import Frozen

Step = Literal["checkpoint", "footprint", "quality", "tasks", "speed"]
"""What is done for a row, in this order."""


class Bits(Frozen):
    """Of weights, activations and keys and values; several where layers differ, least first.

    Attributes:
        weights: of the linear layers of the blocks; empty where only vLLM knows.
        activations: that these layers multiply with; empty likewise.
        kv: of the KV cache.
    """

    weights: tuple[int, ...]
    activations: tuple[int, ...]
    kv: tuple[int, ...]

    def __str__(self) -> str:
        parts = (self.weights, self.activations, self.kv)
        return "/".join(",".join(map(str, part)) or "?" for part in parts)


class Facts(Frozen):
    """What a row takes, by the headers of its files.

    Attributes:
        bits: see `Bits`.
        weight_bytes: of the whole model, loaded and packed; None where only vLLM knows.
        weight_bytes_16bit: the same with every layer in 16 bits.
        kv_bytes_per_token: over all layers.
    """

    bits: Bits
    weight_bytes: int | None
    weight_bytes_16bit: int
    kv_bytes_per_token: int


class Timing(Frozen):
    """How fast a row is, measured in turns with the 16-bit model.

    Attributes:
        entries: decode and prefill, with ratios to the 16-bit model's.
        weight_bytes: of the engine's weights, as they lie in memory.
        cache_tokens: that its KV cache holds.
        doubts: what kept the machine from telling, a sentence each.
    """

    entries: tuple[Entry, ...]
    weight_bytes: int
    cache_tokens: int
    doubts: tuple[str, ...] = ()

    def of(self, quantity: str) -> dict[int, Entry]:
        """The entries of `decode` or `prefill`, by batch or by tokens of the prompt."""
        return {int(entry.at): entry for entry in self.entries if entry.quantity == quantity}


class Failure(Frozen):
    """What could not be done, and why, in a sentence."""

    step: Step
    reason: str


class RowResult(Frozen):
    """One way to serve the model.

    Attributes:
        name: as `--rows` has it.
        title: as the table has it.
        serve: the command that serves it as it was measured.
        bits: of weights, activations and KV cache; None where the row could not be made.
        weight_bytes: measured in the engine; None where it was not started.
        weight_bytes_predicted: by the headers of its files.
        weight_share: of the 16-bit model's weights: measured where both were, else predicted.
        kv_bytes_per_token: over all layers.
        cache_tokens: that the engine's KV cache held.
        decode: batch to tokens/s, and times the 16-bit model's.
        prefill: tokens of a prompt to tokens/s, and times the 16-bit model's.
        perplexity: of held-out text.
        quality: beside the 16-bit model, on the same tokens; None for that model itself.
        tasks: scores of lm-eval, and what they are worse by than the 16-bit model's.
        quantise_seconds: that making the checkpoint took, calibration of the cache included; None
            where nothing was made.
        failures: what is missing, and why.
    """

    name: str
    title: str
    serve: str = ""
    bits: Bits | None = None
    weight_bytes: int | None = None
    weight_bytes_predicted: int | None = None
    weight_share: float | None = None
    kv_bytes_per_token: int | None = None
    cache_tokens: int | None = None
    decode: dict[int, Entry] = Field(default_factory=dict)
    prefill: dict[int, Entry] = Field(default_factory=dict)
    perplexity: Interval | None = None
    quality: Quality | None = None
    tasks: tuple[TaskScore, ...] = ()
    quantise_seconds: float | None = None
    failures: tuple[Failure, ...] = ()

    def score(self, task: str, metric: str) -> TaskScore | None:
        """Its score; None where it has none."""
        found = (score for score in self.tasks if (score.task, score.metric) == (task, metric))
        return next(found, None)

    def failed(self, step: Step) -> bool:
        """True where the step was tried and did not succeed."""
        return any(failure.step == step for failure in self.failures)


class Comparison(Frozen):
    """The whole table.

    Attributes:
        format: of the file.
        version: of the format.
        model: folder or hub name.
        quick: True for the reduced form, whose figures are too rough to quote.
        machine: processor, cores and versions.
        rows: the 16-bit model first.
        notes: what the figures were measured with and on, a sentence each.
        doubts: what keeps them from saying more, a sentence each.
    """

    format: Literal["quantkit-compare"] = "quantkit-compare"
    version: Literal[1] = 1
    model: str
    quick: bool = False
    machine: str
    rows: tuple[RowResult, ...]
    notes: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def batches(self) -> tuple[int, ...]:
        """Batches that any row decoded in."""
        return tuple(sorted({batch for row in self.rows for batch in row.decode}))

    @property
    def prompts(self) -> tuple[int, ...]:
        """Tokens of the prompts that any row prefilled."""
        return tuple(sorted({tokens for row in self.rows for tokens in row.prefill}))

    @property
    def tasks(self) -> tuple[tuple[str, str], ...]:
        """Tasks that any row was asked, each with its metric."""
        found = ((score.task, score.metric) for row in self.rows for score in row.tasks)
        return tuple(dict.fromkeys(found))

    def failures(self) -> Iterator[str]:
        """What is missing, a sentence each."""
        for row in self.rows:
            for failure in row.failures:
                yield f"{row.title}, {failure.step}: {failure.reason}"
