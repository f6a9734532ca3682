"""The range of every linear layer's inputs over a calibration set, a decoder block at a time."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from vllm_quantkit.quantize.calibration import TokenSet
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.quantize.observation.observing import Watch, observe
from vllm_quantkit.quantize.observation.statistics import Ranges
from vllm_quantkit.quantize.observation.streams import Stream
from vllm_quantkit.quantize.progress import Watcher
from vllm_quantkit.quantize.run_options import RunOptions


def collect_ranges(
    source: Path, tokens: TokenSet, *, run: RunOptions, watcher: Watcher
) -> dict[str, Ranges]:
    """By checkpoint name, the ranges of what each linear layer of the blocks reads, in 16 bits.

    Layers that saw no token are left out.

    Args:
        source: a transformers model folder with safetensors weights.
        tokens: what to run.
        run: how to go about it.
        watcher: is told how far it is.

    Raises:
        CheckpointError, UnsupportedScheme: the model cannot be read.
    """
    device = run.torch_device()
    shell = ModelShell.open(source, device=device, trust_remote_code=run.trust_remote_code)
    size = max(1, run.batch_tokens // tokens.input_ids.shape[1])
    found: dict[str, Ranges] = {}
    with TemporaryDirectory() as folder:
        stream = Stream(shell, tokens, size, run.hidden_states, Path(folder))
        with shell.open_ends(), watcher.phase("enter", stream.steps) as tick:
            stream.enter(tick)
        watcher.start(shell.block_count, 0)
        for index in range(shell.block_count):
            found |= _pass(shell, index, stream, tokens.tokens, watcher)
    return found


def _pass(
    shell: ModelShell, index: int, stream: Stream, tokens: int, watcher: Watcher
) -> dict[str, Ranges]:
    """The ranges in one block; the stream goes through it."""
    watches = {
        shell.stored_name(f"{shell.block_name(index)}.{name}"): Watch(
            name, shape.in_features, hessian=False
        )
        for name, shape in shell.linears(index).items()
    }
    with shell.block(index) as block, watcher.phase("observe", stream.steps) as tick:
        stats = observe(
            block,
            watches,
            lambda: stream.advance(index, block, tick),
            half=lambda: stream.half,
            expected_rows=tokens,
        )
    return {name: seen.ranges for name, seen in stats.items() if seen is not None}
