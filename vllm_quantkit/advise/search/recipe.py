"""A mixture as a recipe that `quantkit quantize --recipe` takes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from vllm_quantkit.advise.search.units import Unit, UnitOption
from vllm_quantkit.one_step import write_in_one_step
from vllm_quantkit.quantize.recipes.recipe_file import OutputFormat

NUMBER = re.compile(r"\.(\d+)\.")
"""The first is a block's, in the names of its layers."""

Taken = Sequence[tuple[Unit, UnitOption]]


def recipe_of(taken: Taken, fmt: OutputFormat) -> dict[str, Any]:
    """Keys of the recipe: what most weights have by default, and a rule for each other way."""
    sizes: Counter[str] = Counter()
    for unit, option in taken:
        sizes[_key(option)] += unit.weights
    options = {_key(option): option.options for _, option in taken}
    default = sizes.most_common(1)[0][0]
    rules = [
        {"match": list(_patterns(taken, key)), **_given(options[key])}
        for key in sizes
        if key != default
    ]
    recipe = {**_given(options[default]), "format": fmt}
    return {**recipe, "layers": rules} if rules else recipe


def write_recipe(recipe: dict[str, Any], path: Path, comment: Sequence[str]) -> None:
    """A YAML file that appears in one step, with comments above.

    Raises:
        CheckpointError: it cannot be written.
    """
    head = "".join(f"# {line}\n" for line in comment)
    body = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
    write_in_one_step(path, head + body)


def _key(option: UnitOption) -> str:
    return option.options.model_dump_json(exclude_none=True)


def _given(options: Any) -> dict[str, Any]:
    found: dict[str, Any] = options.model_dump(exclude_none=True)
    return found


def _patterns(taken: Taken, key: str) -> Iterator[str]:
    """An expression for each kind of layer, which lists the blocks that have it so."""
    blocks: dict[tuple[str, str], list[str]] = defaultdict(list)
    plain = []
    for unit, option in taken:
        for layer in unit.layers if _key(option) == key else ():
            found = NUMBER.search(layer.name)
            if found is None:
                plain.append(layer.name)
            else:
                around = (layer.name[: found.start(1)], layer.name[found.end(1) :])
                blocks[around].append(found[1])
    yield from plain
    for (before, after), numbers in blocks.items():
        yield f"re:{re.escape(before)}({'|'.join(numbers)}){re.escape(after)}$"
