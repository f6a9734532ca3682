"""A model's linear layers as vLLM merges them, cuts them over ranks, and a method stores them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.footprint.facts import LayerGroup, Model, Parallel
from vllm_quantkit.footprint.layers import (
    BLOCK,
    OTHER_TOWERS,
    Layer,
    block_of,
    is_head,
    linear_layers,
)
from vllm_quantkit.footprint.merging import (
    check_heads,
    divided,
    member_rows,
    merge,
    parallel_of,
    rank_rows,
)
from vllm_quantkit.options import Options
from vllm_quantkit.schemes import SCHEMES, get_method
from vllm_quantkit.schemes.at_load import load_rules, refuse_load_options
from vllm_quantkit.schemes.served_layers import common_scheme, experts_refused
from vllm_quantkit.spec import LayerRules, LayerShape, SchemeSpec

NO_OPTIONS = Options()

EXPERT = re.compile(r"\bexperts\.(\d+|\*)(\.|$)")
"""Where a name says which expert of a mixture it is."""

ORDER = (
    *("qkv_proj", "fused_qkv_a_proj", "q_proj", "q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"),
    *("gate", "gate_up_proj", "w13", "down_proj", "w2"),
)
"""What a token passes, by the last part of names."""

VOCABULARY_PADDING = 64
"""vLLM pads the vocabulary to a multiple of it, so that it divides among ranks."""


def layer_groups(
    model: Model, method: str | None, options: Options = NO_OPTIONS, tp: int = 1
) -> tuple[LayerGroup, ...]:
    """The linear layers, the output head included, that are alike; in the order of the model.

    Args:
        model: any.
        method: the name one would give to `--quantization`; None for no flag, which serves a
            quantised checkpoint as it is stored.
        options: of `--additional-config`.
        tp: tensor-parallel size.

    Raises:
        ConfigError: no such method, an option it does not take, or a malformed
            quantization_config.
        UnsupportedScheme: the method is not for this checkpoint, or heads do not divide by `tp`.
        CheckpointError: the tensors do not fit the quantization_config.
    """
    check_heads(model.facts, tp)
    layers = linear_layers(model, scheme_rules(model, method, options))
    return group_layers(model, layers, method, tp)


def scheme_rules(model: Model, method: str | None, options: Options) -> LayerRules:
    """Which scheme each layer has: as the checkpoint says, or as the method quantises at load.

    Raises:
        ConfigError, UnsupportedScheme: see `layer_groups`.
    """
    config = model.facts.quantization_config
    if method is None:
        return LayerRules() if config is None else get_method("quantkit").rules(config)
    if method not in SCHEMES:
        raise ConfigError(
            f"the method {method!r} is none of vllm-quantkit's; use one of "
            f"{', '.join(SCHEMES)}, or none for what vLLM itself does with the checkpoint."
        )
    chosen = get_method(method)
    if config is None:
        return load_rules(chosen, options)
    refuse_load_options(chosen, options)
    return chosen.rules(config)


def group_layers(
    model: Model, layers: list[Layer], method: str | None, tp: int
) -> tuple[LayerGroup, ...]:
    """The layers merged, cut, and gathered over blocks and experts; the head last.

    Raises:
        UnsupportedScheme: sizes do not divide by `tp`.
    """
    alike: dict[_Alike, list[list[Layer]]] = defaultdict(list)
    for name, members in _merged_layers(layers):
        alike[_alike(name, members)].append(members)
    groups = [_group(model, kind, found, method, tp) for kind, found in alike.items()]
    return tuple(sorted(groups, key=_order))


def padded_vocabulary(size: int) -> int:
    """Rows of vLLM's embedding and output head over all ranks."""
    return -(-size // VOCABULARY_PADDING) * VOCABULARY_PADDING


class _Alike(NamedTuple):
    """What merged layers of a group have in common.

    Attributes:
        name: starred, of the merged layer.
        leaf: its last part.
        members: last part of the name, size, scheme and bias of each.
    """

    name: str
    leaf: str
    members: tuple[tuple[str, int, int, SchemeSpec | None, bool], ...]


def _merged_layers(layers: list[Layer]) -> Iterator[tuple[str, list[Layer]]]:
    """Every layer as vLLM has it: its name, and the layers it merges."""
    modules: dict[str, dict[str, Layer]] = defaultdict(dict)
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        modules[parent][leaf] = layer
    for parent, inside in modules.items():
        for leaf, members in merge(list(inside)):
            name = f"{parent}.{leaf}" if parent else leaf
            yield name, [inside[member] for member in members]


def _alike(name: str, members: list[Layer]) -> _Alike:
    starred = _starred(name)
    parts = tuple(
        (
            member.name.rpartition(".")[2],
            member.shape.out_features,
            member.shape.in_features,
            member.spec,
            member.bias,
        )
        for member in members
    )
    return _Alike(starred, starred.rpartition(".")[2], parts)


def _group(
    model: Model, kind: _Alike, found: list[list[Layer]], method: str | None, tp: int
) -> LayerGroup:
    """The group of merged layers that are alike, each a list of members."""
    members = found[0]
    if is_head(kind.name):
        return _head(model, members[0], tp)
    # The towers of models that also see or hear are small, and often on every rank whole.
    tower = OTHER_TOWERS.search(kind.name)
    parallel: Parallel = "replicated" if tower else parallel_of(kind.leaf)
    rows = {leaf: out_features for leaf, out_features, *_ in kind.members}
    parts = member_rows(kind.leaf, rows, model.facts)
    share = rank_rows(parts, parallel, model.facts, tp)
    columns = members[0].shape.in_features
    own = divided(columns, tp, kind.name) if parallel == "row" else columns
    numbers = {block_of(layer.name) for merged in found for layer in merged}
    specs = {member.name: member.spec for member in members}
    return LayerGroup(
        name=kind.name,
        members=tuple(specs),
        count=len(found),
        blocks=tuple(sorted(number for number in numbers if number is not None)),
        shape=LayerShape(out_features=sum(parts.values()), in_features=columns),
        rank_shape=LayerShape(out_features=sum(share), in_features=own),
        rank_rows=share,
        parallel=parallel,
        spec=members[0].spec,
        bias=any(member.bias for member in members),
        expert=EXPERT.search(kind.name) is not None,
        refused=_refusal(kind.name, specs, method),
    )


def _head(model: Model, head: Layer, tp: int) -> LayerGroup:
    """The output head, whose rows vLLM pads and cuts as the embedding's."""
    rows = padded_vocabulary(head.shape.out_features)
    share = divided(rows, tp, "the padded vocabulary")
    columns = head.shape.in_features
    return LayerGroup(
        name=head.name,
        members=(head.name,),
        count=1,
        shape=LayerShape(out_features=rows, in_features=columns),
        rank_shape=LayerShape(out_features=share, in_features=columns),
        rank_rows=(share,),
        parallel="column",
        spec=head.spec,
        bias=head.bias,
        head=True,
    )


def _refusal(name: str, specs: Mapping[str, SchemeSpec | None], method: str | None) -> str:
    """Why the plugin does not serve these members as one layer; empty where it does."""
    if method is not None and EXPERT.search(name) and any(specs.values()):
        return str(experts_refused(method, name))
    try:
        common_scheme(name, specs)
    except UnsupportedScheme as refusal:
        return str(refusal)
    return ""


def _starred(name: str) -> str:
    """The name with `*` for the numbers of block and expert."""
    return EXPERT.sub(r"experts.*\2", BLOCK.sub(r"\1.*", name))


def _order(group: LayerGroup) -> tuple[bool, int, int]:
    """The head last, blocks in order, and in a block what comes first."""
    leaf = group.name.rpartition(".")[2]
    place = ORDER.index(leaf) if leaf in ORDER else len(ORDER)
    return group.head, min(group.blocks, default=-1), place
