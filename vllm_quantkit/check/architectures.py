"""Which models the installed vLLM can build, read from its registry's file without importing it."""

from __future__ import annotations

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from vllm_quantkit.errors import UnsupportedScheme

REGISTRY = "model_executor/models/registry.py"
FORMER = "_PREVIOUSLY_SUPPORTED_MODELS"
ELSEWHERE = "_OOT_SUPPORTED_MODELS"
"""Of models that need another plugin."""

MODELS = "_MODELS"
"""How the names of the registry's tables of models end."""


def check_architecture(architecture: str) -> bool:
    """The installed vLLM can build the model; False where none is installed, so nobody knows.

    vLLM runs a causal model that it does not know through transformers, if that does.

    Raises:
        UnsupportedScheme: it cannot.
    """
    tables = _tables()
    if tables is None:
        return False
    known, former = tables
    if architecture in known or _transformers_has(architecture):
        return True
    last = (
        f"; vLLM {former[architecture]} was the last that had it" if architecture in former else ""
    )
    raise UnsupportedScheme(
        f"the architecture {architecture!r} is known neither to the installed vLLM nor to "
        f"transformers{last}. Correct `architectures` in config.json, or install a vLLM that has "
        f"it."
    )


@cache
def _tables() -> tuple[frozenset[str], dict[str, str]] | None:
    """Architectures, and former ones with their last release; None without vLLM."""
    found = find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        return None
    file = Path(next(iter(found.submodule_search_locations))) / REGISTRY
    if not file.is_file():
        return None
    known: set[str] = set()
    former: dict[str, str] = {}
    for name, table in _assigned_tables(ast.parse(file.read_text())):
        keys, values = map(_text, table.keys), map(_text, table.values)
        entries = {key: value for key, value in zip(keys, values, strict=True) if key}
        if name == FORMER:
            former |= entries
        elif name.endswith(MODELS) and name != ELSEWHERE:
            known |= entries.keys()
    return frozenset(known), former


def _assigned_tables(tree: ast.Module) -> list[tuple[str, ast.Dict]]:
    """Names and dictionaries of the module's assignments."""
    found = []
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if len(targets) == 1 and isinstance(targets[0], ast.Name) and isinstance(value, ast.Dict):
            found.append((targets[0].id, value))
    return found


def _text(node: ast.expr | None) -> str:
    """The string that is written there; empty for anything else."""
    value = node.value if isinstance(node, ast.Constant) else None
    return value if isinstance(value, str) else ""


def _transformers_has(architecture: str) -> bool:
    import transformers

    return hasattr(transformers, architecture)
