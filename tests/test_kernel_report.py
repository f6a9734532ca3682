"""The report of compiled kernels: sources without their imports, rows that replace rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.kernel_report.__main__ import Row, merge, table
from benchmarks.kernel_report.sources import kernels_of
from tests.kernels.gates import TRITON

SOURCE = """
import a_module_that_is_nowhere as nowhere
from vllm.triton_utils import tl, triton

SIZE = tl.constexpr(8)
NAME = nowhere.name()

if nowhere.is_rocm():

    @triton.jit
    def rounded(x):
        return x - 1

else:

    @triton.jit
    def rounded(x):
        return x + SIZE


@triton.autotune(nowhere.configs)
@triton.jit
def kernel(x_ptr):
    tl.store(x_ptr, rounded(tl.load(x_ptr)))


def launch(x):
    kernel[(1,)](x)
"""


def row(name: str, per_value: float | None, family: str = "wna16") -> Row:
    return Row(family, name, per_value, 100, 0, 2048)


def test_kernels_come_without_what_their_file_imports(tmp_path: Path) -> None:
    file = tmp_path / "file.py"
    file.write_text(SOURCE)
    module = kernels_of(file)
    assert module.kernel.arg_names == ["x_ptr"]
    assert "x + SIZE" in module.rounded.src
    assert module.SIZE.value == 8
    assert not hasattr(module, "launch")
    assert not hasattr(module, "NAME")


def test_rows_replace_those_of_their_family_and_compiler(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    other = {"compilers": {"0.0": {"kernels": [{"family": "wna16", "name": "kept"}]}}}
    record.write_text(json.dumps(other))
    merge(record, ["wna16", "peers"], [row("old", 2.0), row("a peer", 16.0, "peers")])
    merge(record, ["wna16"], [row("new", 3.0)])
    compilers = json.loads(record.read_text())["compilers"]
    assert [found["name"] for found in compilers[TRITON]["kernels"]] == ["new", "a peer"]
    assert compilers["0.0"] == other["compilers"]["0.0"]
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(("counted", "cell"), [(2.5, "2.50"), (None, "")])
def test_a_kernel_without_a_count_has_an_empty_cell(counted: float | None, cell: str) -> None:
    assert table([row("a", counted)]).splitlines()[-1] == f"| a | {cell} | 100 | 0 | 2048 |"
