"""Who may import whom, read from the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_quantkit.schemes import SCHEMES, get_method
from vllm_quantkit.schemes.base import Method

ROOT = Path(__file__).parents[1]
PLUGIN, KERNELS = ROOT / "vllm_quantkit", ROOT / "kernels" / "quantkit_kernels"
SOURCES = [*PLUGIN.rglob("*.py"), *KERNELS.rglob("*.py")]


def imports(file: Path) -> Iterator[str]:
    """Every module a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import, which this test cannot follow"
            yield str(node.module)


def importers(package: str, files: list[Path]) -> set[str]:
    """Files, by their path in the repository, that import anything of `package`."""
    return {
        str(file.relative_to(ROOT))
        for file in files
        if any(name == package or name.startswith(f"{package}.") for name in imports(file))
    }


def within(*folders: str) -> list[Path]:
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    assert files
    return files


def test_vllm_is_imported_in_the_integration_only():
    found = importers("vllm", SOURCES)
    assert found
    assert all(file.startswith("vllm_quantkit/integration/") for file in found)


def test_kernels_know_neither_vllm_nor_the_plugin():
    kernels = within("kernels/quantkit_kernels")
    assert importers("vllm", kernels) | importers("vllm_quantkit", kernels) == set()


INDEPENDENT = sorted(
    folder.name
    for folder in PLUGIN.iterdir()
    if (folder / "__init__.py").exists() and folder.name != "integration"
)
"""Folders that work without vLLM; those that ask engines ask a process."""


@pytest.mark.parametrize("package", INDEPENDENT)
def test_what_is_not_integration_knows_neither_vllm_nor_triton(package):
    files = within(f"vllm_quantkit/{package}")
    assert importers("vllm", files) | importers("triton", files) == set()
    assert importers("vllm_quantkit.integration", files) == set()


TELLING_IMPORTS = {"version", "metadata", "packaging", "inspect"}
TELLING_ATTRIBUTES = {"__version__", "__version_tuple__"}


def tells_versions_apart(file: Path) -> bool:
    """True where a file asks which vLLM it runs with, or expects that something is not there."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ExceptHandler) and "ImportError" in ast.unparse(node):
            return True
        if isinstance(node, ast.Attribute) and node.attr in TELLING_ATTRIBUTES:
            return True
        if isinstance(node, ast.ImportFrom):
            words = {*str(node.module).split("."), *(alias.name for alias in node.names)}
            if words & TELLING_IMPORTS:
                return True
    return False


ASKING = {
    "integration/compat.py",
    "plugin.py",  # may meet a vLLM that lacks what we import, to say so
    "hardware/machine.py",  # names what a figure was measured with
    "check/release.py",  # which vLLM a checkpoint is checked for
}


def test_versions_are_told_apart_in_compat_only():
    files = within("vllm_quantkit")
    telling = {str(file.relative_to(PLUGIN)) for file in files if tells_versions_apart(file)}
    assert "integration/compat.py" in telling
    assert telling <= ASKING


@pytest.mark.parametrize("name", SCHEMES)
def test_every_registered_method_resolves(name):
    method = get_method(name)
    assert issubclass(method, Method)
    assert method.name == name


def public_functions(file: Path) -> Iterator[ast.FunctionDef]:
    """Functions and methods whose name, and whose class's name, is public."""
    tree = ast.parse(file.read_text())
    bodies = [tree.body]
    bodies += [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
    for body in bodies:
        yield from (
            node
            for node in body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        )


def unannotated(function: ast.FunctionDef) -> list[str]:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
    return missing + (["return"] if function.returns is None else [])


def test_every_public_function_is_annotated():
    missing = {
        f"{file.relative_to(ROOT)}:{function.name}": unannotated(function)
        for file in SOURCES
        for function in public_functions(file)
        if unannotated(function) and not is_compiled(function)
    }
    assert missing == {}


def is_compiled(function: ast.FunctionDef) -> bool:
    """Kernels, whose language has no annotations for tensors."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)
