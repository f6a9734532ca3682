"""What `quantkit compare` does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_quantkit.cache import cache_folder
from vllm_quantkit.compare.assembling import assemble
from vllm_quantkit.compare.checkpoints import Maker
from vllm_quantkit.compare.digests import Digests
from vllm_quantkit.compare.files import NAME, write_files
from vllm_quantkit.compare.notes import doubts_of, notes_below
from vllm_quantkit.compare.request import CompareRequest
from vllm_quantkit.compare.result import Comparison
from vllm_quantkit.compare.running import Runner
from vllm_quantkit.compare.store import Store, file_name
from vllm_quantkit.compare.table import readable
from vllm_quantkit.compare.timing import Stopwatch
from vllm_quantkit.compare.work import Workbench
from vllm_quantkit.compare.workbench import RealWorkbench
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.footprint import read_model
from vllm_quantkit.hardware import find_device
from vllm_quantkit.hardware.machine import describe_machine
from vllm_quantkit.quantize.hub import model_folder
from vllm_quantkit.terminal import Terminal

FAILED = 1

OUT = Path("quantkit-compare")


def run_compare(request: CompareRequest, terminal: Terminal, name: str = NAME) -> int:
    """Makes, measures, prints and writes the table; the exit status: 1 where a row failed.

    Args:
        request: what is compared.
        terminal: where to speak.
        name: of the files, without an ending.

    Raises:
        QuantkitError: what was asked cannot be, before anything is made.
    """
    with opened(request, terminal) as session:
        comparison = session.compare()
    terminal.table(readable(comparison))
    for text in notes_below(comparison):
        terminal.line(text)
    for text in doubts_of(comparison):
        terminal.warn(text)
    folder = request.out or OUT / session.store.folder.name.rpartition("-")[0]
    if lacking := write_files(comparison, folder, name):
        terminal.warn(lacking)
    terminal.note(f"written to {folder}/{name}.md, .csv, .json and .svg")
    terminal.result(comparison)
    return FAILED if any(row.failures for row in comparison.rows) else 0


@dataclass(frozen=True)
class Session:
    """One model's store, and what works for it.

    Attributes:
        request: what is compared.
        store: what was made and measured.
        workbench: what makes and measures.
        machine: that it runs on.
    """

    request: CompareRequest
    store: Store
    workbench: Workbench
    machine: str

    def compare(self) -> Comparison:
        """Everything that is not there yet, and the table."""
        outcomes = Runner(self.workbench, self.store, self.request.steps).run(self.request.rows)
        return assemble(
            outcomes,
            model=self.request.model,
            machine=self.machine,
            notes=tuple(self._notes()),
            quick=self.request.quick,
        )

    def _notes(self) -> Iterator[str]:
        """What was calibrated on, and what was left out."""
        chosen, calibration = self.request.rows, self.request.calibration
        if any(row.is_made or row.kv4 for row in chosen):
            length = f" of {calibration.length} tokens" if calibration.length else ""
            yield (
                f"Calibration, where a scheme needs it: {calibration.samples} samples{length} of "
                f"{calibration.source or 'the default data set'}."
            )
        if "quality" not in self.request.steps:
            yield "Quality was not measured."


@contextmanager
def opened(request: CompareRequest, terminal: Terminal) -> Iterator[Session]:
    """A session that has the model's store for itself.

    Raises:
        ConfigError: the model is quantised already.
        CheckpointError: there is no such model, or another process works for it.
    """
    source = model_folder(request.model)
    _refuse_quantised(request.model)
    root = request.work or cache_folder("compare")
    digests = Digests(root / "digests.json")
    digest = digests.folder(source)
    called = source.resolve().name if Path(request.model).is_dir() else request.model
    store = Store(root / f"{file_name(called)}-{digest[:8]}", terminal)
    store.folder.mkdir(parents=True, exist_ok=True)
    with store.claimed():
        if request.fresh:
            store.clear()
        machine = describe_machine()
        maker = Maker(
            request.model, source, digest, request.calibration, request.run, store, digests
        )
        workbench = RealWorkbench(
            common=EngineSpec(request.model, options=request.bench.engine),
            maker=maker,
            digests=digests,
            device=find_device(None),
            machine=machine,
            store=store,
            text=request.text,
            task_plan=request.tasks,
            stopwatch=Stopwatch(request.bench, store.folder / "logs", terminal),
        )
        yield Session(request, store, workbench, machine)


def _refuse_quantised(model: str) -> None:
    config = read_model(model).facts.quantization_config
    if config is not None:
        method = config.get("quant_method", "unnamed")
        raise ConfigError(
            f"{model} is quantised already (quant_method {method!r}): give its 16-bit model, and "
            "this one as a row, as in --add mine=FOLDER."
        )
