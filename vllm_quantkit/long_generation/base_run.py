"""What the 16-bit model wrote, and how likely it found it: measured once, for any other model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from vllm_quantkit.cache import cache_folder
from vllm_quantkit.engine import Engine, EngineSpec
from vllm_quantkit.errors import CheckpointError, about
from vllm_quantkit.evaluate.base_scores import (
    BaseScores,
    check_room,
    claimed,
    default_folder,
    fingerprint,
    vocabulary_size,
)
from vllm_quantkit.evaluate.scorers import EngineScorer
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.long_generation.plan import LongPlan, Room
from vllm_quantkit.long_generation.prompts import PromptSet
from vllm_quantkit.long_generation.result import DecodingName
from vllm_quantkit.long_generation.texts import ModelTexts, write_all
from vllm_quantkit.one_step import write_in_one_step
from vllm_quantkit.terminal import Terminal

TEXTS_FILE = "texts.json"


@dataclass(frozen=True)
class BaseRun:
    """The base's side of a comparison.

    Attributes:
        prompts: that were continued.
        plan: in which ways.
        room: how long.
        texts: what the base wrote.
        scores: its log-probabilities of prompts and texts, for each way.
        backend: what ran it, with its version.
    """

    prompts: PromptSet
    plan: LongPlan
    room: Room
    texts: ModelTexts
    scores: Mapping[DecodingName, BaseScores]
    backend: str


class EngineOnDemand:
    """An engine that starts when it is first needed: what is on disk needs none.

    Args:
        spec: what it serves.
        log: where its process writes.
    """

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self._spec, self._log = spec, log
        self._engine: Engine | None = None

    @property
    def running(self) -> Engine:
        """The engine.

        Raises:
            EngineError: it refused to start.
        """
        if self._engine is None:
            self._engine = Engine(self._spec, self._log)
        return self._engine

    def __enter__(self) -> EngineOnDemand:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._engine is not None:
            self._engine.__exit__(kind, error, trace)


def texts_of(
    engine: EngineOnDemand,
    spec: EngineSpec,
    prompts: PromptSet,
    plan: LongPlan,
    room: Room,
    backend: str,
    terminal: Terminal,
) -> ModelTexts:
    """What the base writes; read where the same was written before.

    Raises:
        CheckpointError: the file cannot be read or written.
    """
    path = _texts_path(spec, prompts, plan, room, backend)
    if path.is_file():
        return _read(path)
    steps = len(plan.decodings) + plan.noise
    with terminal.phase("16-bit model writes", steps) as tick:
        texts = write_all(engine.running, prompts, plan, room.tokens, again=plan.noise, tick=tick)
    write_in_one_step(path, texts.model_dump_json())
    return texts


def scores_of(
    engine: EngineOnDemand, spec: EngineSpec, windows: Windows, backend: str, terminal: Terminal
) -> BaseScores:
    """The base's log-probabilities of what it wrote; windows that are on disk are kept.

    Raises:
        CheckpointError: the disk has no room, or the folder holds other scores.
    """
    record = fingerprint(spec, windows, backend)
    scores = BaseScores(default_folder(record), windows, backend)
    with claimed(scores.folder, record):
        missing = scores.missing()
        with about("long generation, which takes less with fewer tokens or prompts"):
            check_room(scores, vocabulary_size(spec.model))
        with terminal.phase(f"16-bit model reads its {windows.source}", len(missing)) as tick:
            for index in missing:
                EngineScorer(engine.running).score(windows.rows[index], keep=scores.path(index))
                tick()
    return scores


def _texts_path(
    spec: EngineSpec, prompts: PromptSet, plan: LongPlan, room: Room, backend: str
) -> Path:
    """In a folder of the cache that belongs to this model, these prompts and this plan."""
    # A window has two tokens or more, a prompt may have one.
    windows = Windows(tuple((*row, 0) for row in prompts.rows), prompts.source)
    record = {
        "base": fingerprint(spec, windows, backend),
        "plan": plan.model_dump(mode="json"),
        "tokens": room.tokens,
        "ends": prompts.ends,
    }
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return cache_folder("long-generation", digest[:24]) / TEXTS_FILE


def _read(path: Path) -> ModelTexts:
    try:
        return ModelTexts.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"{path} cannot be read: delete it, and it is made again.") from error
