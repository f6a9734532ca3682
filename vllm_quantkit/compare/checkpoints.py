"""Checkpoints that rows need: made by the quantiser once, found again by all that decides them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_quantkit.compare.digests import Digests
from vllm_quantkit.compare.rows import Row
from vllm_quantkit.compare.store import Key, Store, remove
from vllm_quantkit.errors import ConfigError, QuantkitError
from vllm_quantkit.kv_calibration import read_kv_calibration, write_kv_calibration
from vllm_quantkit.quantize.calibration import CalibrationOptions, TokenSets
from vllm_quantkit.quantize.fingerprint import fingerprint
from vllm_quantkit.quantize.hub import hub_name
from vllm_quantkit.quantize.job import Job
from vllm_quantkit.quantize.kv_cache.calibrating import KVOptions, calibrate_kv_cache
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.quantize.output.report import REPORT_FILE, read_report
from vllm_quantkit.quantize.output.workspace import partial_folder
from vllm_quantkit.quantize.progress import watching
from vllm_quantkit.quantize.recipes.presets import KEEP
from vllm_quantkit.quantize.recipes.recipe_file import Recipe, make_recipe, read_recipe
from vllm_quantkit.quantize.run_options import RunOptions
from vllm_quantkit.spec import Frozen

CHECKPOINTS, CALIBRATIONS = "checkpoints", "kv-calibrations"

NOTHING = Recipe(scheme=KEEP)
"""Of a job that makes no checkpoint."""


class Made(Frozen):
    """A folder that was made for a row.

    Attributes:
        folder: where it is.
        digest: of its content.
        seconds: that making it took, those of runs that were cut off included.
    """

    folder: Path
    digest: str
    seconds: float


@dataclass
class Maker:
    """Makes what rows need, or finds it.

    Attributes:
        model: folder or hub name.
        source: its folder.
        digest: of its content.
        calibration: what the quantiser calibrates on.
        run: how it goes about it.
        store: where everything lies.
        digests: of folders.
    """

    model: str
    source: Path
    digest: str
    calibration: CalibrationOptions
    run: RunOptions
    store: Store
    digests: Digests
    _sets: dict[CalibrationOptions, TokenSets] = field(default_factory=dict)

    def checkpoint(self, row: Row) -> Made:
        """The checkpoint of a row's scheme or recipe.

        A run that was cut off goes on; one that was finished is found, if its folder still holds
        what was written.

        Raises:
            QuantkitError: see `Job` and `pipeline.quantize`.
        """
        job = self._job(row)
        sets = None if job.calibration is None else self.token_sets(job.calibration)
        decides = self._decides(job, sets)
        key = self._key(decides)
        name = row.scheme or row.name.removesuffix("+kv4")
        out = self.store.path(CHECKPOINTS, name, key)
        made = self._found(CHECKPOINTS, name, key, out)
        if made is not None:
            return made
        if not self._is_whole(out):
            self._discard_other(partial_folder(out), decides)
            with watching(self.store.terminal) as watcher:
                job.quantize(out, sets, watcher)
        seconds = sum(read_report(out / REPORT_FILE).resources.seconds.values())
        return self._keep(CHECKPOINTS, name, key, out, seconds)

    def kv_calibration(self) -> Made:
        """What the 16-bit model's keys need in 4 bits; weights of fewer bits need the same.

        Raises:
            QuantkitError: see `calibrate_kv_cache`.
        """
        job = Job(self.model, self.source, NOTHING, self.calibration, self.run)
        sets = self.token_sets(self.calibration)
        options = KVOptions()
        key = {**self._key(self._decides(job, sets)), "kv": options.model_dump()}
        out = self.store.path(CALIBRATIONS, "kv4", key)
        made = self._found(CALIBRATIONS, "kv4", key, out)
        if made is not None:
            return made
        remove(out)
        begin = time.perf_counter()
        with watching(self.store.terminal) as watcher:
            found = calibrate_kv_cache(
                self.source,
                sets,
                run=self.run,
                options=options,
                watcher=watcher,
                model_name=hub_name(self.model),
            )
        write_kv_calibration(found, out)
        read_kv_calibration(out)
        return self._keep(CALIBRATIONS, "kv4", key, out, time.perf_counter() - begin)

    def _job(self, row: Row) -> Job:
        """The quantiser's job; text is read where the recipe needs it.

        Raises:
            ConfigError: the recipe is malformed.
        """
        keys: dict[str, Any] = {"scheme": row.scheme}
        if row.recipe is not None:
            keys = read_recipe(row.recipe)
            if "calibration" in keys:
                raise ConfigError(
                    f"{row.recipe} names its own calibration, but rows are compared on one: take "
                    "the key out, and give --calibration."
                )
        recipe = make_recipe(keys)
        needed = self.calibration if recipe.needs_data else None
        resumed = self.run.model_copy(update={"resume": True})
        return Job(self.model, self.source, recipe, needed, resumed)

    def token_sets(self, options: CalibrationOptions) -> TokenSets:
        """Calibration and held-out text, read once.

        Raises:
            QuantkitError: it cannot be read, or is too little.
        """
        if options not in self._sets:
            job = Job(self.model, self.source, NOTHING, options, self.run)
            sets = job.token_sets()
            assert sets is not None, "a job with options for its text has one"
            for warning in sets.warnings:
                self.store.terminal.warn(warning)
            self._sets[options] = sets
        return self._sets[options]

    def _decides(self, job: Job, sets: TokenSets | None) -> dict[str, Any]:
        """What the quantiser says decides every bit of its result."""
        trust = job.run.trust_remote_code
        shell = ModelShell.open(job.source, trust_remote_code=trust)
        precision = job.run.torch_precision(shell.stored_dtype)
        return fingerprint(job.source, job.recipe, sets, job.run, precision)

    def _key(self, decides: Mapping[str, Any]) -> Key:
        """The same with the model by its content, and without the order in which threads add."""
        kept = {name: value for name, value in decides.items() if name != "threads"}
        return {**kept, "model": self.digest}

    def _discard_other(self, partial: Path, decides: Mapping[str, Any]) -> None:
        """Deletes what a cut-off run left, where this one would not end as that would have."""
        plan = partial / "plan.json"
        if not plan.is_file():
            return
        try:
            same = json.loads(plan.read_text(encoding="utf-8")) == json.loads(json.dumps(decides))
        except (OSError, ValueError):
            same = False
        if not same:
            self.store.discard(partial, "it was begun under other conditions")

    def _found(self, kind: str, name: str, key: Key, out: Path) -> Made | None:
        """What an earlier run made and noted; None where there is none, or it has changed."""
        made = self.store.read(kind, name, key, Made)
        if made is None:
            return None
        try:
            if self.digests.folder(out) == made.digest:
                return made.model_copy(update={"folder": out})  # the store may have been moved
            why = "its files are not those that were written"
        except QuantkitError as error:
            why = str(error)
        remove(self.store.path(kind, name, key, ".json"))
        self.store.discard(out, why)
        return None

    def _is_whole(self, out: Path) -> bool:
        """True for a checkpoint that was finished, and only not noted; others are deleted."""
        if not out.exists():
            return False
        try:
            read_report(out / REPORT_FILE)
        except QuantkitError as error:
            self.store.discard(out, str(error))
            return False
        return True

    def _keep(self, kind: str, name: str, key: Key, out: Path, seconds: float) -> Made:
        made = Made(folder=out, digest=self.digests.folder(out), seconds=seconds)
        self.store.write(kind, name, key, made)
        return made
