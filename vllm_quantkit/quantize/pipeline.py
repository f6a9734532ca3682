"""From a 16-bit model folder to a quantised one, a decoder block at a time.

Each block is calibrated on what the quantised blocks before it make of the text, so later layers
see, and may repair, the errors of earlier ones. Only one block has its weights in memory; the rest
of the model stays in its files. A finished block is on disk before the next begins.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from vllm_quantkit.errors import ConfigError, about
from vllm_quantkit.quantize.block_quantizer import BlockQuantizer, Calibration
from vllm_quantkit.quantize.calibration import TokenSet, TokenSets
from vllm_quantkit.quantize.fingerprint import fingerprint
from vllm_quantkit.quantize.finishing import Finisher
from vllm_quantkit.quantize.layer_rounding import install_layer
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.quantize.observation.streams import Stream
from vllm_quantkit.quantize.output.records import BlockRecord
from vllm_quantkit.quantize.output.report import CalibrationSummary, Quality, Report
from vllm_quantkit.quantize.output.verify import decode_layer
from vllm_quantkit.quantize.output.workspace import Workspace
from vllm_quantkit.quantize.plan import BlockPlan, Plan, make_plan
from vllm_quantkit.quantize.progress import Silent, Watcher
from vllm_quantkit.quantize.quality import compare
from vllm_quantkit.quantize.recipes.recipe_file import Recipe
from vllm_quantkit.quantize.run_options import GIB, RunOptions
from vllm_quantkit.terminal import Tick


def quantize(
    source: Path,
    out: Path,
    recipe: Recipe,
    sets: TokenSets | None = None,
    *,
    run: RunOptions | None = None,
    summary: CalibrationSummary | None = None,
    model_name: str | None = None,
    watcher: Watcher | None = None,
) -> Report:
    """`out` = `source` with the layers that the recipe names quantised, and a report beside them.

    Memory holds one block in float32, the sums of one pass over the calibration set, and the
    hidden states of the sets unless they wait on disk.

    Args:
        source: a transformers model folder with safetensors weights.
        out: must not exist.
        recipe: what to do with which layer.
        sets: token ids to calibrate on and to measure quality on; None where the recipe needs
            none and quality is not to be measured.
        run: how to go about it.
        summary: what the report says of `sets`.
        model_name: the model's name on the hub; None where it has none.
        watcher: is told how far the run is.

    Raises:
        ConfigError: the recipe does not fit the model, or needs text and `sets` is None.
        UnsupportedScheme: the dialect cannot store what the recipe asks for.
        CheckpointError: `source` cannot be read, `out` exists, or the disk is full.
        QuantkitError: a weight is not finite, or a static scale cannot be trusted.
    """
    run = run or RunOptions()
    device = run.torch_device()
    shell = ModelShell.open(source, device=device, trust_remote_code=run.trust_remote_code)
    plan = make_plan(shell, recipe)
    if plan.needs_data and sets is None:
        raise ConfigError(
            f"scheme {recipe.scheme!r} needs calibration text, but none was given: pass "
            "--calibration FILE, or choose rtn, mse, int8 or fp8."
        )
    decides = fingerprint(source, recipe, sets, run, run.torch_precision(shell.stored_dtype))
    with Workspace.create(out, decides, resume=run.resume) as space:
        finisher = Finisher(source, model_name or source.name, model_name, summary, device)
        return _Run(shell, plan, space, sets, run, watcher or Silent()).finish(finisher)


class _Run:
    """The blocks of one model, in order."""

    def __init__(
        self,
        shell: ModelShell,
        plan: Plan,
        workspace: Workspace,
        sets: TokenSets | None,
        run: RunOptions,
        watcher: Watcher,
    ) -> None:
        self._shell = shell
        self._plan = plan
        self._workspace = workspace
        self._run = run
        self._watcher = watcher
        self._seconds: dict[str, float] = {}
        self._streams: dict[str, Stream] = {}
        self._sets = sets

    def finish(self, finisher: Finisher) -> Report:
        """Everything that is left to do, and the report."""
        done = [block.index for block in self._plan.blocks if self._done(block.index)]
        self._watcher.start(len(self._plan.blocks), len(done))
        quality = self._known_quality()
        if quality is None or len(done) < len(self._plan.blocks):
            self._enter()
            if not done:
                self._rehearse()
            for block in self._plan.blocks:
                self._pass(block)
            quality = self._measure()
        records = [self._workspace.record(block.index) for block in self._plan.blocks]
        seconds = self._all_seconds(records)
        with self._phase("assemble", 1) as tick:
            return finisher.write(self._plan, self._workspace, records, quality, seconds, tick)

    def _done(self, index: int) -> bool:
        return self._workspace.block_done(index)

    def _enter(self) -> None:
        """Starts the streams: what calibrates, and held-out text for both models."""
        if self._sets is None:
            return
        precision = self._run.torch_precision(self._shell.stored_dtype)
        self._add_stream("calibration", self._sets.calibration, precision)
        for name in ("original", "quantized"):
            self._add_stream(name, self._sets.held_out, torch.float32)
        steps = sum(stream.steps for stream in self._streams.values())
        with self._phase("enter", steps) as tick, self._shell.open_ends():
            for stream in self._streams.values():
                stream.enter(tick)

    def _add_stream(self, name: str, tokens: TokenSet, precision: torch.dtype) -> None:
        size = max(1, self._run.batch_tokens // tokens.input_ids.shape[1])
        folder = self._workspace.folder / "hidden" / name
        self._streams[name] = Stream(
            self._shell, tokens, size, self._run.hidden_states, folder, precision=precision
        )

    def _rehearse(self) -> None:
        """Tries blocks on what enters the first one; only their errors matter."""
        for index in self._run.rehearse:
            if index == 0:
                continue
            with self._shell.block(index) as block, about(f"rehearsal of block {index}"):
                self._quantizer(self._plan.blocks[index], block).run()

    def _pass(self, plan: BlockPlan) -> None:
        """Quantises a block, or takes it as it is on disk, and sends the streams through it."""
        index = plan.index
        if not self._streams and self._done(index):
            return
        with self._shell.block(index) as block:
            self._advance("original", index, block)
            if self._done(index):
                self._restore(plan, block)
            else:
                self._quantize(plan, block)
            if index + 1 < len(self._plan.blocks):
                self._advance("calibration", index, block)
            self._advance("quantized", index, block)

    def _quantize(self, plan: BlockPlan, block: nn.Module) -> None:
        before = dict(self._seconds)
        quantizer = self._quantizer(plan, block)
        quantizer.run()
        seconds = {
            name: self._seconds[name] - before.get(name, 0.0)
            for name in self._seconds
            if self._seconds[name] != before.get(name)
        }
        record = BlockRecord(
            index=plan.index,
            layers=tuple(quantizer.records.values()),
            coverage=quantizer.coverage,
            seconds=seconds,
        )
        with self._phase("write", 1) as tick:
            self._workspace.write_block(plan.index, quantizer.tensors, record)
            tick()
        self._watcher.block_done(record)

    def _quantizer(self, plan: BlockPlan, block: nn.Module) -> BlockQuantizer:
        calibration = None
        if self._sets is not None:
            calibration = Calibration(
                stream=self._streams["calibration"],
                tokens=self._sets.calibration,
                room=int(self._run.statistics_gib * GIB),
                route_all=self._plan.recipe.route_all,
                true_sequential=self._plan.recipe.true_sequential,
            )
        return BlockQuantizer(self._shell, plan, block, calibration, self._phase)

    def _restore(self, plan: BlockPlan, block: nn.Module) -> None:
        """The block as an earlier run left it: it computes bit for bit what it did then."""
        with self._phase("restore", 1) as tick:
            tensors = self._workspace.read_block(plan.index)
            restore_block(self._shell, plan, block, tensors)
            tick()

    def _advance(self, name: str, index: int, block: nn.Module) -> None:
        if name in self._streams:
            stream = self._streams[name]
            with self._phase("advance", stream.steps) as tick:
                stream.advance(index, block, tick)

    def _all_seconds(self, records: Sequence[BlockRecord]) -> dict[str, float]:
        """By phase: of the blocks as they were noted, of the rest as this run took."""
        seconds = dict(self._seconds)
        for name in {name for record in records for name in record.seconds}:
            seconds[name] = sum(record.seconds.get(name, 0.0) for record in records)
        return seconds

    def _known_quality(self) -> Quality | None:
        note = self._workspace.load_note("quality")
        return None if note is None else Quality.model_validate(note)

    def _measure(self) -> Quality | None:
        if not self._streams:
            return None
        original, quantized = self._streams["original"], self._streams["quantized"]
        with self._phase("measure", 1) as tick, self._shell.open_ends():
            quality = compare(original.logits(), quantized.logits())
            tick()
        self._workspace.note("quality", quality.model_dump(mode="json"))
        for stream in self._streams.values():
            stream.discard()
        return quality

    @contextmanager
    def _phase(self, name: str, steps: int) -> Iterator[Tick]:
        """Tells the watcher, and adds up the time."""
        start = time.perf_counter()
        with self._watcher.phase(name, steps) as tick:
            yield tick
        elapsed = time.perf_counter() - start
        self._seconds[name] = self._seconds.get(name, 0.0) + elapsed


@torch.no_grad()
def restore_block(
    shell: ModelShell,
    plan: BlockPlan,
    block: nn.Module,
    tensors: dict[str, torch.Tensor],
) -> None:
    """Gives a 16-bit block what quantising made of it.

    Args:
        shell: the model of the block.
        plan: what became of the block.
        block: with its 16-bit weights; changed in place.
        tensors: by checkpoint name, what the block's quantised and changed parameters became.

    Raises:
        CheckpointError: a tensor is missing or cannot be decoded.
    """
    encoded = set()
    for layer in plan.layers.values():
        if layer.scheme is not None:
            prefix = f"{layer.stored}."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            weight, inputs = decode_layer(own, layer.stored, layer.scheme)
            install_layer(block, layer, weight, inputs)
            encoded.add(f"{layer.stored}.weight")
    prefix = shell.block_name(plan.index)
    for name, parameter in block.named_parameters():
        module, _, key = name.rpartition(".")
        stored = f"{shell.stored_name(f'{prefix}.{module}')}.{key}"
        if stored in tensors and stored not in encoded:
            parameter.copy_(tensors[stored])
