"""Lists of layer names in few words, exact for the layers of one model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence

REGEX = "re:"
"""Starts an entry that is a regular expression."""

ANY_NUMBER = r"\d+"

FUSED = {
    frozenset({"q_proj", "k_proj", "v_proj"}): "qkv_proj",
    frozenset({"gate_proj", "up_proj"}): "gate_up_proj",
}
"""Layers that engines merge, to the name of what they merge them into."""

Template = tuple[str | None, ...]
"""A name's components, None for each that is a number."""

Numbers = tuple[str, ...]


def compact(
    names: Iterable[str], others: Collection[str], *, merged: bool = False
) -> tuple[str, ...]:
    """Whole names, and `re:` expressions, that match all of `names` and none of `others`.

    Layers that differ in numbers, or besides in the last component, share an expression. Entries of
    `names` that are expressions already stay as they are.

    Args:
        names: what is to be matched.
        others: all other layers of the model.
        merged: True also matches the layers that engines make of q, k and v, or of gate and up:
            for readers that ask for the merged layer's name.
    """
    unique = dict.fromkeys(names)
    numbered = [name for name in unique if not name.startswith(REGEX) and _has_number(name)]
    outside = [name for name in others if name not in unique]
    runs = _merge_leaves(_by_template(numbered), _by_template(outside))
    entries = [_entry(prefix, leaves, outside, merged=merged) for prefix, leaves in runs.items()]
    return (*(name for name in unique if name not in set(numbered)), *entries)


def merged_names(names: Iterable[str]) -> set[str]:
    """The names of the layers that engines merge some of `names` into."""
    split = (name.rpartition(".") for name in names)
    return {
        f"{parent}.{merged}"
        for parent, _, leaf in split
        for group, merged in FUSED.items()
        if leaf in group
    }


def exact_pattern(entry: str) -> str:
    """The regular expression of an entry, made for matching from the name's start."""
    if entry.startswith(REGEX):
        return entry.removeprefix(REGEX)
    return f"{re.escape(entry)}$"


def _has_number(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


def _by_template(names: Iterable[str]) -> dict[Template, list[Numbers]]:
    found: dict[Template, list[Numbers]] = defaultdict(list)
    for name in names:
        parts = name.split(".")
        template = tuple(None if part.isdecimal() else part for part in parts)
        found[template].append(tuple(part for part in parts if part.isdecimal()))
    return found


def _merge_leaves(
    wanted: dict[Template, list[Numbers]], others: dict[Template, list[Numbers]]
) -> dict[tuple[str, ...], list[str]]:
    """Expressions of all components but the last, to the last components behind them."""
    runs: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for template, numbers in wanted.items():
        for allowed in _number_sets(numbers, others.get(template, [])):
            found = iter(allowed)
            parts = [next(found) if part is None else re.escape(part) for part in template]
            runs[tuple(parts[:-1])].append(parts[-1])
    return runs


def _number_sets(wanted: Sequence[Numbers], others: Sequence[Numbers]) -> list[tuple[str, ...]]:
    """Expressions for each number, so that all of `wanted` match and none of `others`."""
    sets = [frozenset(column) for column in zip(*wanted, strict=True)]
    if not any(all(o in s for o, s in zip(other, sets, strict=True)) for other in others):
        columns = list(zip(*others, strict=True)) or [()] * len(sets)
        return [tuple(_numbers(s, column) for s, column in zip(sets, columns, strict=True))]
    position = next(i for i, values in enumerate(sets) if len(values) > 1)
    found = []
    for value in sorted(sets[position], key=int):
        inside = [numbers for numbers in wanted if numbers[position] == value]
        found += _number_sets(inside, [other for other in others if other[position] == value])
    return found


def _numbers(wanted: frozenset[str], others: Iterable[str]) -> str:
    """Any number where no other layer has one that is not wanted."""
    if len(wanted) > 1 and wanted.issuperset(others):
        return ANY_NUMBER
    ordered = sorted(wanted, key=int)
    return ordered[0] if len(ordered) == 1 else f"(?:{'|'.join(ordered)})"


def _entry(
    prefix: tuple[str, ...], leaves: Sequence[str], others: Iterable[str], *, merged: bool
) -> str:
    """A whole name, or an expression; the modules around the numbered list only where needed."""
    parts = (*prefix, *leaves)
    if len(leaves) == 1 and not any("\\d" in part or "(" in part for part in parts):
        return re.sub(r"\\(.)", r"\1", ".".join(parts))
    names = list(leaves)
    if merged:
        names += [name for group, name in FUSED.items() if group <= set(leaves)]
    leaf = names[0] if len(names) == 1 else f"(?:{'|'.join(names)})"
    first = next((i for i, part in enumerate(prefix) if part[0] in "(\\0123456789"), 0)
    tail = r"\.".join((*prefix[max(first - 1, 0) :], leaf))
    short = re.compile(rf"(?:.*\.)?{tail}$")
    if first > 1 and not any(short.match(other) for other in others):
        return REGEX + short.pattern
    return REGEX + r"\.".join((*prefix, leaf)) + "$"
