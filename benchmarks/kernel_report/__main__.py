"""Compile every Triton kernel, ours and vLLM's, and write down what became of it.

    make kernel-report                 # with both compilers, all kernels
    python -m benchmarks.kernel_report --only kv_int4

Needs no GPU. Instructions are counted per thread and weight, channel or cached value: in the main
loop, or in the whole kernel where there is none. The record is what tests compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from benchmarks.kernel_report.cuda_peers import cuda_gates
from benchmarks.kernel_report.kv_peers import kv_gates
from benchmarks.kernel_report.linear_peers import linear_gates
from benchmarks.kernel_report.quant_peers import quant_gates
from benchmarks.kernel_report.sources import vllm_folder
from tests.kernels.gates import RECORD, TRITON, Gate

FAMILIES = ("wna16", "scaled_mm", "llm_int8", "act_quant", "kv_int4")
PEERS, CUDA = "peers", "cuda"


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        family: of `FAMILIES`; or `PEERS`, or `CUDA`.
        name: the gate's.
        per_value: instructions per thread for each weight, channel or cached value; None where
            nothing is counted.
        registers: per thread.
        stack: bytes per thread that spill.
        shared: bytes per program.
    """

    family: str
    name: str
    per_value: float | None
    registers: int
    stack: int
    shared: int


def gates_of(family: str, library: Path | None) -> list[Gate]:
    """Every kernel of a family, or vLLM's."""
    if family == CUDA:
        assert library is not None
        return list(cuda_gates(library))
    if family != PEERS:
        found: list[Gate] = import_module(f"tests.kernels.{family}_builds").gates()
        return found
    folder = vllm_folder()
    return [*linear_gates(folder), *quant_gates(folder), *kv_gates(folder)]


def compile_family(family: str, library: Path | None = None) -> list[Row]:
    """What becomes of all its kernels."""
    return [_row(family, gate) for gate in gates_of(family, library)]


def _row(family: str, gate: Gate) -> Row:
    compiled = gate.build()
    counted = None if gate.per_value is None else round(gate.per_value(compiled), 2)
    return Row(family, gate.name, counted, compiled.registers, compiled.stack, compiled.shared)


def table(rows: Iterable[Row]) -> str:
    """Rows as Markdown."""
    head = ("kernel", "instructions/value", "registers", "spilled", "shared")
    lines = [head, ("---",) * len(head), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row) -> tuple[str, ...]:
    counted = "" if row.per_value is None else f"{row.per_value:.2f}"
    return row.name, counted, str(row.registers), str(row.stack), str(row.shared)


def merge(record: Path, families: Iterable[str], rows: Iterable[Row]) -> None:
    """Put the rows in the place of those of these families and of this compiler; in one rename."""
    report = json.loads(record.read_text()) if record.exists() else {"compilers": {}}
    before = report["compilers"].get(TRITON, {"kernels": []})["kernels"]
    kept = [row for row in before if row["family"] not in families]
    kernels = sorted([*kept, *map(asdict, rows)], key=_order)
    report["compilers"] = dict(
        sorted({**report["compilers"], TRITON: {"kernels": kernels}}.items())
    )
    written = record.with_suffix(".tmp")
    written.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(written, record)


def _order(row: dict[str, object]) -> tuple[int, str]:
    return [*FAMILIES, PEERS, CUDA].index(str(row["family"])), str(row["name"])


def _compile_all(families: list[str], workers: int, library: Path | None) -> Iterator[Row]:
    with ProcessPoolExecutor(workers) as pool:
        for rows in pool.map(partial(compile_family, library=library), families):
            yield from rows


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = [*FAMILIES, PEERS, CUDA]
    parser.add_argument("--only", nargs="+", choices=choices, default=[*FAMILIES, PEERS])
    parser.add_argument("--cuda-library", type=Path, help="vLLM's compiled CUDA kernels (_C*.so)")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, default=RECORD)
    args = parser.parse_args()
    if (CUDA in args.only) != (args.cuda_library is not None):
        parser.error("--only cuda and --cuda-library FILE go together")
    return args


def main() -> int:
    """Compile, print and write the report."""
    args = _parse_arguments()
    rows = list(_compile_all(args.only, args.workers, args.cuda_library))
    print(f"Triton {TRITON}, vLLM's kernels for sm_90; compiled only\n\n{table(rows)}")
    merge(args.json, args.only, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
