"""What a cache of 4 bits should take from a model's keys, and which layers it does for.

Block by block: the calibration set gives a layer's moments, the held-out set its errors with every
treatment of keys that these suggest, and the best is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from pydantic import Field, ValidationError
from torch import nn

from quantkit_kernels.kv_int4 import CacheLayout, KeyTreatment
from quantkit_kernels.kv_int4.layout import BLOCK_TOKENS, LARGEST_HEAD
from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.kv_calibration import (
    KeyChoice,
    KVCalibration,
    KVErrors,
    KVLayer,
    KVLayerRecord,
    KVSummary,
)
from vllm_quantkit.quantize.calibration import TokenSet, TokenSets
from vllm_quantkit.quantize.kv_cache.attention import AttentionCall, Listener, observed_attention
from vllm_quantkit.quantize.kv_cache.errors import ErrorMeter
from vllm_quantkit.quantize.kv_cache.formats import CacheFormat, e4m3, int4_keys, int4_values
from vllm_quantkit.quantize.kv_cache.moments import CHOICES, KeyMoments
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.quantize.observation.streams import Stream
from vllm_quantkit.quantize.output.records import BlockRecord
from vllm_quantkit.quantize.progress import Watcher
from vllm_quantkit.quantize.run_options import RunOptions
from vllm_quantkit.spec import Frozen

FP8 = "fp8"

BOUND = 0.25
"""Of a layer's output error: where 4 bits do, and where they do not. Heads of 128 dimensions over
256 to 2048 keys, logits spread by 1 to 6, calibrated; in brackets the total variation of softmax:

    no bias of keys, or moderate outliers           0.11 to 0.23 (0.03 to 0.09)
    bias of norm 609 on slow dimensions             0.14 to 0.16 (0.06 to 0.07), 1.4 uncalibrated
    bias of norm 100 to 200, 400 to 800 on fast     0.12 to 0.35, 0.15 to 0.54 (0.04 to 0.23)
    the demo model's layers                         0.05 to 0.09 (0.02 to 0.05)

No mean takes a bias away from fast dimensions, which RoPE turns about within the context. The total
variation does not tell these apart: it was 0.145 where the output was off by 0.49.
"""

GAIN = 0.015
"""Share of a lesser treatment's output error that another must take off to be taken. In the demo
model's layers, taken alone, what gained 2 % and more also brought the whole model nearer to 16 bits
(KL divergence), and what gained less changed it by 1.1 % at most, either way."""


class KVOptions(Frozen):
    """What a calibration asks of a layer.

    Attributes:
        bound: a layer whose output error in 4 bits is beyond it keeps 16 bits.
    """

    bound: float = Field(default=BOUND, gt=0, le=1)


def kv_options(bound: float | None) -> KVOptions:
    """The options, checked; None is the default.

    Raises:
        ConfigError: the bound is not in (0, 1].
    """
    try:
        return KVOptions() if bound is None else KVOptions(bound=bound)
    except ValidationError as error:
        raise ConfigError(
            f"--bound {bound}: it bounds a layer's output error, as a share of its output, so it "
            f"must be greater than 0 and at most 1; the default is {KVOptions().bound}."
        ) from error


def calibrate_kv_cache(
    source: Path,
    sets: TokenSets,
    *,
    run: RunOptions,
    options: KVOptions,
    watcher: Watcher,
    model_name: str | None = None,
) -> KVCalibration:
    """The calibration of the KV cache of the model in `source`.

    Args:
        source: a transformers model folder with safetensors weights in 16 or 32 bits.
        sets: to calibrate on, and to measure errors on.
        run: how to go about it.
        options: see `KVOptions`.
        watcher: is told how far it is.
        model_name: on the hub; None takes the folder's.

    Raises:
        CheckpointError: the model cannot be read.
        UnsupportedScheme: it keeps no keys and values that 4 bits serve, or they cannot be seen.
        QuantkitError: keys or values are not finite.
    """
    shell = ModelShell.open(
        source, device=run.torch_device(), trust_remote_code=run.trust_remote_code
    )
    _refuse_latent(shell)
    layers: dict[str, KVLayer] = {}
    with _streams(shell, sets, run, watcher) as streams:
        watcher.start(shell.block_count, 0)
        for index in range(shell.block_count):
            layers |= _Block(shell, index, options, watcher).layers(streams)
            watcher.block_done(BlockRecord(index=index, layers=()))
    if not layers:
        raise UnsupportedScheme(
            f"{source} ran no attention layer that keeps keys and values, so there is no KV cache "
            "to calibrate."
        )
    summary = _summary(model_name or source.resolve().name, sets, options, layers)
    return KVCalibration(summary, layers)


class _Streams(NamedTuple):
    """The two sets of samples on their way through the blocks."""

    calibration: Stream
    held_out: Stream


@contextmanager
def _streams(
    shell: ModelShell, sets: TokenSets, run: RunOptions, watcher: Watcher
) -> Iterator[_Streams]:
    """Both sets before the first block; errors are always measured in float32."""
    with TemporaryDirectory() as folder:

        def stream(name: str, tokens: TokenSet, precision: torch.dtype) -> Stream:
            size = max(1, run.batch_tokens // tokens.input_ids.shape[1])
            place = Path(folder) / name
            return Stream(shell, tokens, size, run.hidden_states, place, precision=precision)

        precision = run.torch_precision(shell.stored_dtype)
        streams = _Streams(
            stream("calibration", sets.calibration, precision),
            stream("held_out", sets.held_out, torch.float32),
        )
        steps = sum(stream.steps for stream in streams)
        with shell.open_ends(), watcher.phase("enter", steps) as tick:
            for entering in streams:
                entering.enter(tick)
        yield streams


class _Block:
    """The attention layers of one block, usually one."""

    def __init__(self, shell: ModelShell, index: int, options: KVOptions, watcher: Watcher) -> None:
        self._shell = shell
        self._index = index
        self._options = options
        self._watcher = watcher

    def layers(self, streams: _Streams) -> dict[str, KVLayer]:
        """By checkpoint name; both streams go through the block."""
        moments: dict[str, KeyMoments] = {}
        meters: dict[str, ErrorMeter] = {}
        observe = _sum_into(moments, lambda: streams.calibration.half)
        with self._shell.block(self._index) as block:
            self._advance(block, streams.calibration, "observe", observe)
            names = {name: self._stored_name(block, name) for name in moments}
            for name, seen in moments.items():
                seen.check(names[name])
                meters[name] = ErrorMeter(_formats(seen), self._shell.stored_dtype)
            self._advance(
                block, streams.held_out, "measure", lambda name, call: meters[name].add(call)
            )
        return {
            names[name]: _layer(names[name], seen, meters[name].errors(), self._options)
            for name, seen in moments.items()
        }

    def _advance(self, block: nn.Module, stream: Stream, phase: str, listen: Listener) -> None:
        with (
            observed_attention(block, listen),
            self._watcher.phase(phase, stream.steps) as tick,
        ):
            stream.advance(self._index, block, tick)

    def _stored_name(self, block: nn.Module, name: str) -> str:
        """What the checkpoint calls the attention module `name` of the block."""
        inner = block.get_submodule(name).named_modules()
        child = next(child for child, module in inner if isinstance(module, nn.Linear))
        full = f"{self._shell.block_name(self._index)}.{name}.{child}"
        return self._shell.stored_name(full).rsplit(".", child.count(".") + 1)[0]


def _sum_into(moments: dict[str, KeyMoments], half: Callable[[], int]) -> Listener:
    """A listener that sums what it sees of each layer."""

    def listen(name: str, call: AttentionCall) -> None:
        if name not in moments:
            _refuse_heads(name, call)
            heads, size = call.key.shape[1], call.key.shape[3]
            moments[name] = KeyMoments(heads, size, call.key.device)
        moments[name].add(call.query, call.key, call.value, half())

    return listen


def _formats(moments: KeyMoments) -> dict[str, CacheFormat]:
    """4 bits with each treatment, and E4M3."""
    layout = _layout(moments.head_size)
    keys, values = (e4m3(scale) for scale in moments.fp8_scales)
    formats = {FP8: CacheFormat(keys, values)}
    narrow = int4_values(layout)
    for choice in CHOICES:
        formats[choice] = CacheFormat(int4_keys(layout, moments.treatment(choice)), narrow)
    return formats


def _layer(
    name: str, moments: KeyMoments, errors: Mapping[str, KVErrors], options: KVOptions
) -> KVLayer:
    choice = _best({choice: errors[choice].output for choice in CHOICES})
    record = KVLayerRecord(
        name=name,
        dtype="int4" if errors[choice].output <= options.bound else "auto",
        kv_heads=moments.kv_heads,
        head_size=moments.head_size,
        treatment=choice,
        uncalibrated=errors["none"],
        calibrated=errors[choice],
        fp8=errors[FP8],
        disagreement=moments.disagreement(choice),
        drift=moments.drift(),
    )
    treatment: KeyTreatment = moments.treatment(choice)
    return KVLayer(record, treatment.shift, treatment.scale, *moments.fp8_scales)


def _best(errors: Mapping[KeyChoice, float]) -> KeyChoice:
    """The treatment with the least error, of those that are worth more than the ones before."""
    best = CHOICES[0]
    for choice in CHOICES[1:]:
        if errors[choice] < (1 - GAIN) * errors[best]:
            best = choice
    return best


def _summary(
    model: str, sets: TokenSets, options: KVOptions, layers: Mapping[str, KVLayer]
) -> KVSummary:
    tokens, layout = sets.calibration, _layout(1)
    return KVSummary(
        model=model,
        source=tokens.source,
        samples=tokens.samples,
        length=tokens.input_ids.shape[1],
        tokens=tokens.tokens,
        held_out_tokens=sets.held_out.tokens,
        fingerprint=tokens.fingerprint,
        key_group=layout.key_group,
        value_group=layout.value_group,
        bound=options.bound,
        layers=tuple(layer.record for layer in layers.values()),
    )


def _layout(head_size: int) -> CacheLayout:
    """The layout that engines use unless told otherwise; how tokens lie in blocks is no matter."""
    return CacheLayout(head_size, BLOCK_TOKENS)


def _refuse_latent(shell: ModelShell) -> None:
    rank = getattr(shell.config.get_text_config(), "kv_lora_rank", None)
    if rank is not None:
        raise UnsupportedScheme(
            f"models of type {shell.config.model_type!r} cache {rank} latent dimensions, no keys "
            "and values (multi-head latent attention), which 4 bits do not serve: leave this "
            "model's cache in 16 bits."
        )


def _refuse_heads(name: str, call: AttentionCall) -> None:
    keys, values = call.key.shape[3], call.value.shape[3]
    if keys != values or keys > LARGEST_HEAD:
        raise UnsupportedScheme(
            f"{name} has keys of {keys} and values of {values} dimensions; a cache of 4 bits takes "
            f"keys and values of the same size, at most {LARGEST_HEAD}: leave this model's cache "
            "in 16 bits."
        )
