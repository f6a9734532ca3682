"""What vLLM without the plugin does with a checkpoint, group by group."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_quantkit.check.plain import PlainLayer, choose
from vllm_quantkit.check.release import Release
from vllm_quantkit.check.report import Answer, PlainCheck, PlainGroup
from vllm_quantkit.footprint import LayerGroup, Model
from vllm_quantkit.hardware.device import Device
from vllm_quantkit.kv_rules import SERVED_ON_CPU


def plain_check(
    model: Model,
    groups: Sequence[LayerGroup],
    device: Device,
    release: Release,
    dtype: str,
    cache_dtype: str,
) -> PlainCheck:
    """Whether plain vLLM serves the checkpoint as it is stored, and with which kernels.

    Args:
        model: any.
        groups: its layers as stored.
        device: where.
        release: of vLLM.
        dtype: of activations.
        cache_dtype: `--kv-cache-dtype`.
    """
    method = str((model.facts.quantization_config or {}).get("quant_method", "")).lower()
    told = tuple(plain_group(group, method, device, release, dtype) for group in groups)
    if device.kind == "cpu" and cache_dtype not in SERVED_ON_CPU[:-1]:
        summary = (
            f"no: vLLM {release} stores 16 bits on a CPU for --kv-cache-dtype {cache_dtype} and "
            f"reads something else (vllm/platforms/cpu.py)."
        )
        return PlainCheck(serves="no", summary=summary, groups=told)
    return PlainCheck(serves=_answer(told), summary=_summary(told, release), groups=told)


def plain_group(
    group: LayerGroup, method: str, device: Device, release: Release, dtype: str
) -> PlainGroup:
    """What plain vLLM does with layers that are alike, stored by `quant_method` `method`."""
    layer = PlainLayer(
        spec=group.spec,
        method=method,
        shape=group.shape,
        rank_shape=group.rank_shape,
        rank_rows=group.rank_rows,
        dtype=dtype,
        expert=group.expert,
    )
    choice = choose(layer, device, release)
    return PlainGroup(
        layers=group.name,
        serves=choice.serves,
        kernel=choice.kernel,
        reason=choice.reason,
        source=choice.source,
    )


def unread(reason: str) -> PlainCheck:
    """Nobody can tell, because the checkpoint's quantisation is none that is known here."""
    return PlainCheck(serves="unknown", summary=f"unknown: {reason}")


def _answer(groups: Sequence[PlainGroup]) -> Answer:
    answers = {group.serves for group in groups}
    if "no" in answers:
        return "no"
    return "unknown" if "unknown" in answers else "yes"


def _summary(groups: Sequence[PlainGroup], release: Release) -> str:
    answer = _answer(groups)
    if answer == "yes":
        families = dict.fromkeys(group.kernel for group in groups)
        return f"yes: vLLM {release} serves it with {', '.join(families)}."
    deciding = next(group for group in groups if group.serves == answer)
    source = f" ({deciding.source})" if deciding.source else ""
    return f"{answer}: in vLLM {release}, {deciding.layers}: {deciding.reason}{source}."
