"""Whether a model fits a device, and the smallest changes that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from vllm_quantkit.check.report import MemoryCheck
from vllm_quantkit.check.request import CheckRequest
from vllm_quantkit.check.tensor_parallel import allowed_ranks
from vllm_quantkit.errors import ConfigError, QuantkitError
from vllm_quantkit.footprint import Footprint, ModelFacts, Workload
from vllm_quantkit.hardware.catalogue import DEVICES
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.kv_rules import INT4
from vllm_quantkit.schemes.served_layers import MIN_CAPABILITY
from vllm_quantkit.spec import Frozen

GIB = 1 << 30

LENGTH_STEP = 256
"""A shorter length that is proposed is a multiple of it."""

USEFUL_LENGTH = 4096
"""Tokens that another change is to leave room for, where nobody asked for a length."""

DTYPES = {
    **{word: word for word in ("auto", "bfloat16", "float16", "float32")},
    "half": "float16",
    "float": "float32",
}
"""Words of `--dtype` to what they mean."""

AT_LOAD = ("quantkit-int8", "quantkit-int4")
"""Methods that make a 16-bit model smaller while it loads, the more precise first."""

AT_LOAD_FP8 = "quantkit-fp8"
"""Tried before, where the device multiplies FP8."""


class Change(Frozen):
    """Another way to ask for the model.

    Attributes:
        words: what to do.
        flags: fields of the request that it sets.
        applies: False where it changes what was asked for, so that nobody does it unasked.
    """

    words: str
    flags: dict[str, Any]
    applies: bool = True


Weigh = Callable[[CheckRequest], MemoryCheck]
"""Memory of a request; raises a `QuantkitError` where it would not be served at all."""


def workload_of(request: CheckRequest, device: Device) -> Workload:
    """What the engine is started for.

    Raises:
        ConfigError: `--dtype` is no word that vLLM takes.
    """
    if request.dtype not in DTYPES:
        raise ConfigError(
            f"--dtype {request.dtype} is none of vLLM's words, which are {', '.join(DTYPES)}; use "
            f"one of them."
        )
    return Workload.model_validate(
        {
            "max_model_len": request.max_model_len,
            "max_num_seqs": request.max_num_seqs,
            "dtype": DTYPES[request.dtype],
            "memory_utilization": request.memory_utilization,
            "cache_bytes": _given_cache(request, device),
            "enforce_eager": request.enforce_eager,
        }
    )


def _given_cache(request: CheckRequest, device: Device) -> int | None:
    """Bytes that the user gives the KV cache; None for what is left."""
    if request.cache_bytes is None and device.kind == "cpu" and request.cpu_cache_space:
        return request.cpu_cache_space * GIB
    return request.cache_bytes


def memory_check(
    found: Footprint, facts: ModelFacts, request: CheckRequest, device: Device
) -> MemoryCheck:
    """The footprint against the device."""
    ranks = 1 if device.kind == "cuda" else request.tp
    allowed = int(device.memory_bytes * request.memory_utilization / ranks)
    taken = found.weight_bytes + found.activation_bytes + found.overhead_bytes
    given = _given_cache(request, device)
    room = given is None or taken + given <= device.memory_bytes // ranks
    length = found.max_model_len
    return MemoryCheck(
        device_bytes=device.memory_bytes,
        allowed_bytes=allowed,
        weight_bytes=found.weight_bytes,
        weight_bytes_16bit=found.weight_bytes_16bit,
        activation_bytes=found.activation_bytes,
        overhead_bytes=found.overhead_bytes,
        cache_bytes=found.free_for_cache,
        cache_tokens=found.cache_tokens,
        max_model_len=length,
        sequences=found.sequences,
        room=room,
        fits=room and found.free_for_cache >= max(1, sequence_bytes(found, facts)),
        notes=found.notes,
    )


def sequence_bytes(found: Footprint, facts: ModelFacts) -> int:
    """Bytes of the cache of one sequence of the longest length; windowed layers keep a window."""
    length = found.max_model_len
    if not facts.windowed_layers or facts.sliding_window is None or not facts.attention_layers:
        return found.kv_bytes_per_token * length
    windowed = min(1.0, facts.windowed_layers / facts.attention_layers)
    kept = min(length, facts.sliding_window)
    return int(found.kv_bytes_per_token * ((1 - windowed) * length + windowed * kept))


def does_not_fit(check: MemoryCheck, request: CheckRequest, device: Device) -> str:
    """What is needed and what there is, in a sentence."""
    rank = " on each rank" if request.tp > 1 else ""
    needed = (
        f"weights take {gib(check.weight_bytes)}{rank}, activations "
        f"{gib(check.activation_bytes)} and the runtime {gib(check.overhead_bytes)}"
    )
    if not check.room:
        return (
            f"a KV cache of {gib(check.cache_bytes)}{rank} does not fit beside the model: {needed} "
            f"of {gib(check.device_bytes)} on {device.name}."
        )
    if check.cache_bytes <= 0:
        return (
            f"the model does not fit: {needed}, but {device.name} gives an engine "
            f"{gib(check.allowed_bytes)}."
        )
    return (
        f"the KV cache holds {check.cache_tokens} tokens, fewer than one sequence of "
        f"{check.max_model_len}: {needed} of {gib(check.allowed_bytes)} on {device.name}."
    )


def changes(
    request: CheckRequest,
    check: MemoryCheck,
    facts: ModelFacts,
    device: Device,
    weigh: Weigh,
    *,
    ours: bool,
) -> list[Change]:
    """Changes that make the model fit: of every kind the smallest, the least intrusive kind first.

    Args:
        request: what does not fit.
        check: why.
        facts: of the model.
        device: where.
        weigh: tells the memory of another request.
        ours: True where the plugin serves, and with it INT4 caches.
    """
    kinds = (
        _left_cache(check),
        _shorter(request, check),
        _smaller_cache(ours=ours),
        _more_ranks(request, facts, device),
        _fewer_bits(request, facts, device),
        _other_devices(device),
    )
    fitting = (filter(None, (_fitting(request, c, weigh) for c in kind)) for kind in kinds)
    found = (next(kind, None) for kind in fitting)
    return [change for change in found if change is not None]


def gib(size: float) -> str:
    """Bytes as people read them, three digits of them."""
    unit, name = (GIB, "GiB") if abs(size) >= GIB / 10 else (1 << 20, "MiB")
    return f"{size / unit:.{1 if abs(size) >= 10 * unit else 2}f} {name}"


def _fitting(request: CheckRequest, change: Change, weigh: Weigh) -> Change | None:
    """The change if it makes the model fit, maybe with shorter sequences than the model's own."""
    try:
        found = weigh(request.model_copy(update=change.flags))
    except QuantkitError:
        return None
    if found.fits:
        return change
    length = found.cache_tokens // LENGTH_STEP * LENGTH_STEP
    if request.max_model_len is not None or length < USEFUL_LENGTH or not found.room:
        return None
    flags = {**change.flags, "max_model_len": length}
    words = f"{change.words} with --max-model-len {length}"
    return change.model_copy(update={"words": words, "flags": flags})


def _left_cache(check: MemoryCheck) -> Iterator[Change]:
    if not check.room:
        words = "no --kv-cache-memory-bytes and no VLLM_CPU_KVCACHE_SPACE"
        yield Change(words=words, flags={"cache_bytes": None, "cpu_cache_space": None})


def _shorter(request: CheckRequest, check: MemoryCheck) -> Iterator[Change]:
    length = check.cache_tokens // LENGTH_STEP * LENGTH_STEP
    if check.room and 0 < length < check.max_model_len:
        flags = {"max_model_len": length}
        unasked = request.max_model_len is None
        yield Change(words=f"--max-model-len {length}", flags=flags, applies=unasked)


def _smaller_cache(*, ours: bool) -> Iterator[Change]:
    for word in ("fp8", INT4) if ours else ("fp8",):
        yield Change(words=f"--kv-cache-dtype {word}", flags={"kv_cache_dtype": word})


def _more_ranks(request: CheckRequest, facts: ModelFacts, device: Device) -> Iterator[Change]:
    for ranks in allowed_ranks(facts) if device.kind == "cuda" else ():
        if ranks > request.tp:
            words = f"--tensor-parallel-size {ranks} (on {ranks} of these GPUs)"
            yield Change(words=words, flags={"tp": ranks})


def _fewer_bits(request: CheckRequest, facts: ModelFacts, device: Device) -> Iterator[Change]:
    if facts.quantization_config is not None:
        return
    first = (AT_LOAD_FP8,) if device.multiplies_fp8 else ()
    for method in (*first, *AT_LOAD):
        if method != request.quantization:
            yield Change(words=f"--quantization {method}", flags={"quantization": method})


def _other_devices(device: Device) -> Iterator[Change]:
    larger = [
        (other.memory_bytes, name, other)
        for name, other in DEVICES.items()
        if other.kind == "cuda" and _modern(other) and other.memory_bytes > device.memory_bytes
    ]
    for _, name, other in sorted(larger, key=lambda entry: entry[:2]):
        yield Change(words=f"a GPU such as {other.name}", flags={"gpu": name}, applies=False)


def _modern(device: Device) -> bool:
    major, minor = device.capability or (0, 0)
    return 10 * major + minor >= MIN_CAPABILITY
