"""The real work: the quantiser, the engines, and what decides their results."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_quantkit.compare.checkpoints import Made, Maker
from vllm_quantkit.compare.digests import Digests
from vllm_quantkit.compare.result import Facts, Step
from vllm_quantkit.compare.rows import Row
from vllm_quantkit.compare.serving import engine_of, facts_of
from vllm_quantkit.compare.store import Key, Store, file_name
from vllm_quantkit.compare.texts import held_out_windows
from vllm_quantkit.compare.timing import Stopwatch
from vllm_quantkit.compare.work import Scores, Served, SpeedRun
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.evaluate.quality import (
    BaseScores,
    Perplexity,
    Quality,
    measure_base,
    measure_perplexity,
    measure_quality,
)
from vllm_quantkit.evaluate.scorers import backend_version
from vllm_quantkit.evaluate.tasks import TaskPlan, read_scores, require_lm_eval, run_tasks
from vllm_quantkit.evaluate.text import TextOptions
from vllm_quantkit.evaluate.windows import Windows
from vllm_quantkit.hardware.device import Device

DECIDE_SPEEDS = {"plan", "engine", "max_model_len", "gate", "text", "together"}
"""Of what `quantkit bench` is asked."""


@dataclass
class RealWorkbench:
    """Makes checkpoints and measures them in engines.

    Attributes:
        common: the 16-bit model, and what all engines have in common.
        maker: of checkpoints.
        digests: of folders.
        device: that the engines run on.
        machine: in words, with versions.
        store: whose folder takes logs.
        text: held out.
        task_plan: of lm-eval.
        stopwatch: of speeds.
    """

    common: EngineSpec
    maker: Maker
    digests: Digests
    device: Device
    machine: str
    store: Store
    text: TextOptions
    task_plan: TaskPlan
    stopwatch: Stopwatch
    _base: BaseScores | None = field(default=None, init=False)

    @cached_property
    def windows(self) -> Windows:
        """The held-out text, read when it is first needed."""
        return held_out_windows(self.maker, self.text)

    def check(self, steps: frozenset[Step]) -> None:
        """That steps can be done at all, before the first checkpoint is made.

        Raises:
            QuantkitError: vLLM, lm-eval or the held-out text is missing.
        """
        if steps:
            backend_version("vllm")
        if "tasks" in steps:
            require_lm_eval()
        if "quality" in steps:
            self.store.terminal.note(f"{len(self.windows.rows)} windows of {self.windows.source}.")

    def serve(self, row: Row) -> Served:
        """Makes or finds the row's checkpoint, and the calibration of its KV cache."""
        checkpoint = self.maker.checkpoint(row) if row.is_made else None
        cache = self.maker.kv_calibration() if row.kv4 else None
        made = [part for part in (checkpoint, cache) if part is not None]
        spec = engine_of(row, self.common, _folder(checkpoint), _folder(cache))
        return Served(
            spec=spec,
            identity=self._identity(row, spec, checkpoint, cache),
            seconds=sum(part.seconds for part in made) if made else None,
        )

    def facts(self, served: Served) -> Facts:
        """See `facts_of`."""
        return facts_of(served.spec, self.device)

    def quality_key(self, served: Served) -> Key:
        """The row, the text, and what runs them."""
        return {
            **served.identity,
            "base": self.maker.digest,
            "windows": self.windows.fingerprint,
            "backend": backend_version("vllm"),
        }

    def open_base(self, base: Served) -> None:
        """Scores are kept by `measure_base`, for `quantkit eval` too."""
        self._base = measure_base(
            base.spec, self.windows, log=self._log("base"), terminal=self.store.terminal
        )

    def quality(self, served: Served) -> Quality:
        """On the windows of the base."""
        assert self._base is not None, "the base was opened before"
        log, terminal = self._log("quality"), self.store.terminal
        return measure_quality(served.spec, self._base, log=log, terminal=terminal)

    def base_quality(self, base: Served) -> Perplexity:
        """On the same windows."""
        log, terminal = self._log("quality"), self.store.terminal
        return measure_perplexity(base.spec, self.windows, log=log, terminal=terminal)

    def tasks_key(self, served: Served) -> Key:
        """The row, the questions, and who asks them."""
        asked = self.task_plan.model_dump(mode="json")
        return {
            **served.identity,
            "asked": asked,
            "lm-eval": importlib.metadata.version("lm-eval"),
            "backend": backend_version("vllm"),
        }

    def tasks(self, name: str, served: Served, base: Scores | None) -> Scores:
        """lm-eval's own files stay in the store."""
        out = self.store.folder.resolve() / "lm-eval" / file_name(name)
        results = run_tasks(served.spec, self.task_plan, out)
        against = None if base is None else Path(base.scores[0].results)
        return Scores(scores=read_scores(self.task_plan, results, against))

    def speed_key(self, served: Served) -> Key:
        """The row, the machine, and what is asked."""
        asked = self.stopwatch.request.model_dump(mode="json", include=DECIDE_SPEEDS)
        return {**served.identity, "machine": self.machine, "asked": asked}

    def speeds(self, rows: Mapping[str, Served]) -> Iterator[SpeedRun]:
        """See `Stopwatch.time`."""
        return self.stopwatch.time(rows)

    def _identity(
        self, row: Row, spec: EngineSpec, checkpoint: Made | None, cache: Made | None
    ) -> dict[str, Any]:
        """What the engine computes with: contents, not places."""
        weights = self.maker.digest
        if checkpoint is not None:
            weights = checkpoint.digest
        elif row.folder is not None:
            weights = self.digests.folder(row.folder)
        return {
            "weights": weights,
            "cache": None if cache is None else cache.digest,
            "kv4": row.kv4,
            "quantization": spec.quantization,
            "options": self.common.options,
            "vllm-quantkit": importlib.metadata.version("vllm-quantkit"),
        }

    def _log(self, name: str) -> Path:
        return self.store.folder / "logs" / f"{name}.log"


def _folder(made: Made | None) -> Path | None:
    return None if made is None else made.folder
