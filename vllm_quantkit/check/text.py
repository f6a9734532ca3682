"""A check in words: the verdict first, then what it rests on."""

from __future__ import annotations

from vllm_quantkit.check.memory import gib
from vllm_quantkit.check.report import CacheCheck, CheckReport, GroupCheck, MemoryCheck
from vllm_quantkit.spec import LayerShape
from vllm_quantkit.terminal import Table, Terminal


def tell(report: CheckReport, terminal: Terminal) -> None:
    """The whole report, for people."""
    terminal.line(verdict(report))
    for blocker in report.blockers:
        more = f" (So it is with {', '.join(blocker.layers[1:])}.)" if blocker.layers[1:] else ""
        terminal.line(f"  - {blocker.sentence}{more}")
    for warning in report.warnings:
        terminal.warn(warning)
    if report.groups:
        terminal.line()
        terminal.table(groups_table(report))
        for sentence in dict.fromkeys(_why(group) for group in report.groups):
            terminal.line(sentence)
    terminal.line()
    for line in _facts(report):
        terminal.line(line)
    if report.command:
        terminal.line()
        terminal.line(report.command)


def verdict(report: CheckReport) -> str:
    """Whether the model is served, where, and by whom."""
    ranks = f" x {report.tensor_parallel_size}" if report.tensor_parallel_size > 1 else ""
    where = f"on {report.device}{ranks} with vLLM {report.vllm}"
    if not report.serves:
        return f"BLOCKED: {report.model} will not be served {where}:"
    by = "vLLM itself" if report.served_by == "vllm" else "vllm-quantkit"
    flag = "" if report.quantization is None else f" (--quantization {report.quantization})"
    return f"OK: {report.model} will be served {where}, its linear layers by {by}{flag}."


def groups_table(report: CheckReport) -> Table:
    """A row for layers that are alike."""
    per_rank = report.tensor_parallel_size > 1
    columns = ("layers", "count", "scheme", "out x in", *(("a rank's",) if per_rank else ()))
    rows = tuple(
        (
            group.layers,
            str(group.count),
            group.scheme,
            _shape(group.shape),
            *((_shape(group.rank_shape),) if per_rank else ()),
            group.kernel or "refused",
        )
        for group in report.groups
    )
    return Table("", (*columns, "kernel"), rows)


def _why(group: GroupCheck) -> str:
    return f"{group.kernel or group.layers}: {group.reason}."


def _facts(report: CheckReport) -> list[str]:
    lines = []
    if report.memory is not None:
        lines += _memory(report.memory, report.tensor_parallel_size)
    if report.kv_cache is not None:
        lines.append(_cache(report.kv_cache))
    if report.plain_vllm is not None:
        lines.append(f"Without the plugin: {report.plain_vllm.summary}")
    return lines


def _memory(memory: MemoryCheck, ranks: int) -> list[str]:
    rank = " on each rank" if ranks > 1 else ""
    saved = memory.weight_bytes_16bit / memory.weight_bytes if memory.weight_bytes else 1.0
    fits = "fits" if memory.fits else "does not fit"
    return [
        f"Weights: {gib(memory.weight_bytes)}{rank}; in 16 bits {gib(memory.weight_bytes_16bit)} "
        f"({saved:.2f}x).",
        f"Memory: {gib(memory.allowed_bytes)} of {gib(memory.device_bytes)} allowed; activations "
        f"{gib(memory.activation_bytes)}, runtime {gib(memory.overhead_bytes)}, left for the KV "
        f"cache {gib(memory.cache_bytes)}.",
        f"KV cache: {memory.cache_tokens:,} tokens, {memory.sequences:,.1f} sequences of "
        f"{memory.max_model_len:,}: {fits}.",
        *(f"Note: {note}." for note in memory.notes),
    ]


def _cache(cache: CacheCheck) -> str:
    return (
        f"Keys and values: {cache.stored}, {cache.bytes_per_token} bytes a token on a rank, by "
        f"{cache.backend}: {cache.reason}."
    )


def _shape(shape: LayerShape) -> str:
    return f"{shape.out_features} x {shape.in_features}"
