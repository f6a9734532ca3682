"""Correctness on a GPU, in one go: every public operation, its tiles and dtypes.

    python -m benchmarks.gpu.check
    compute-sanitizer --tool memcheck python -m benchmarks.gpu.check --small

and the same with the tools racecheck and initcheck. Each call is compared with its definition on
poisoned memory; it must give the same bits again, the same from a CUDA graph, and, where batches
are made invariant, the same to its first token alone.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from benchmarks.gpu.check_cases import Case, cases, small, whole
from benchmarks.gpu.inputs import poisoned
from benchmarks.gpu.timing import capture
from quantkit_kernels.tuning import batch_invariant, set_batch_invariant
from vllm_quantkit.hardware.machine import describe_machine


def faults(case: Case, *, sanitized: bool = False) -> Iterator[str]:
    """What is wrong with a call, as sentences.

    Under a sanitizer, memory is not poisoned, since it would look written, and no graph is made.
    """
    try:
        with nullcontext() if sanitized else poisoned():
            result = case.call()
        case.verify(result)
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason is given"]
        yield f"{case.name}: {type(error).__name__}: {lines[0]}"
        return
    if not same_bits(result, case.call()):
        yield f"{case.name}: a second call gives other bits"
    if result.is_cuda and not sanitized and not same_bits(result, replay(case.call)):
        yield f"{case.name}: a CUDA graph gives other bits"
    if case.alone is not None:
        with invariant():
            if not same_bits(case.call()[:1], case.alone()):
                yield f"{case.name}: the first token alone gives other bits"


def replay(call: Callable[[], Tensor]) -> Tensor:
    """What the second replay of a graph gives; the call has been made before."""
    graph, result = capture(call)
    graph.replay()
    result.view(torch.uint8).fill_(255)
    graph.replay()
    torch.cuda.synchronize()
    return result


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bit by bit, NaN too."""
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@contextmanager
def invariant() -> Iterator[None]:
    """Let a token's result be the same in every batch."""
    before = batch_invariant()
    set_batch_invariant(True)
    try:
        yield
    finally:
        set_batch_invariant(before)


def check(found: Iterable[Case], *, sanitized: bool = False) -> tuple[int, list[str]]:
    """How many calls were checked, and what is wrong with them; prints as it goes."""
    count, wrong, family = 0, [], ""
    start = time.monotonic()
    for case in found:
        if case.name.split()[0] != family:
            family = case.name.split()[0]
            print(f"{time.monotonic() - start:5.0f} s  {family}", flush=True)
        count += 1
        for fault in faults(case, sanitized=sanitized):
            wrong.append(fault)
            print(fault, flush=True)
    return count, wrong


def main() -> int:
    """1 where anything is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="a little of everything, for sanitizers"
    )
    parser.add_argument("--only", default="", help="cases whose name begins with this")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(describe_machine())
    extent = (small if options.small else whole)(device)
    found = (case for case in cases(extent) if case.name.startswith(options.only))
    count, wrong = check(found, sanitized=options.small)
    print(f"{count} calls on {device}; {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
