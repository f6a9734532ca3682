"""What `quantkit bench` does."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from vllm_quantkit.bench.fitting import Fit, fit
from vllm_quantkit.bench.gate import Gate, gate_text
from vllm_quantkit.bench.noise import Noise, load_average
from vllm_quantkit.bench.offline import OfflineBench
from vllm_quantkit.bench.requests import BenchRequest
from vllm_quantkit.bench.results import BenchResult, rows_of
from vllm_quantkit.bench.schemes import make_spec, model_config, parse_schemes
from vllm_quantkit.bench.servers import Server, measure_servers, parse_servers
from vllm_quantkit.bench.tables import doubts, result_table, sentences
from vllm_quantkit.bench.writing import refuse_folder, write_result
from vllm_quantkit.engine.client import EngineSpec
from vllm_quantkit.hardware import find_device
from vllm_quantkit.hardware.machine import describe_machine
from vllm_quantkit.terminal import Terminal

FAILED = 1

APART_COSTS = (
    "engines start anew for every turn, so the two sides of a ratio are minutes apart: what the "
    "machine does in between is in the ratio, and intervals become wider."
)


def run_bench(request: BenchRequest, terminal: Terminal) -> int:
    """Measures, prints and writes; the exit status: 1 where nothing could be measured.

    With `strict`, 1 also where a scheme failed or a difference could not be told from noise.

    Raises:
        QuantkitError: what was asked cannot be, before anything is started.
    """
    if request.out is not None:
        refuse_folder(request.out)
    result = bench_servers(request, terminal) if request.servers else bench(request, terminal)
    terminal.table(result_table(result))
    for text in sentences(result):
        terminal.line(text)
    for text in doubts(result):
        terminal.warn(text)
    terminal.result(result)
    if request.out is not None:
        write_result(result, request.out)
        terminal.note(f"written to {request.out}")
    complete = result.conclusive and not any(row.failure for row in result.rows)
    return FAILED if result.base is None or (request.strict and not complete) else 0


def bench(request: BenchRequest, terminal: Terminal) -> BenchResult:
    """Speeds in engines that this process starts.

    Raises:
        QuantkitError: a scheme is not served, or there is no such model.
    """
    specs = engine_specs(request)
    chosen = fit(specs, request.plan, find_device(None), request.together)
    _tell(chosen, len(specs), terminal)
    specs = {label: chosen.apply(spec) for label, spec in specs.items()}
    gate = Gate(text=gate_text(request.text), tolerance=request.gate)
    load = load_average()
    with _logs() as logs:
        found = OfflineBench(specs, request.plan, gate, logs, terminal)
        if chosen.together:
            found.run_together()
        else:
            found.run_one_at_a_time()
        if not found.rounds.failures:
            shutil.rmtree(logs)
    return found.result(load, together=chosen.together)


def bench_servers(request: BenchRequest, terminal: Terminal) -> BenchResult:
    """Speeds of servers that run already; what they answer is not checked.

    Raises:
        ConfigError: one does not answer, or `vllm bench serve` is not there.
    """
    servers = {name: Server.at(url) for name, url in parse_servers(request.servers).items()}
    rounds = request.plan.rounds
    load = load_average()
    with _logs() as folder:
        found = measure_servers(servers, request.sent, rounds, request.model, folder, terminal)
        if not found.failures:
            shutil.rmtree(folder)
    served = {name: {"address": s.address, "model": s.model} for name, s in servers.items()}
    return BenchResult(
        machine=describe_machine(),
        base=next(iter(found.alive(servers)), None),
        rounds=rounds,
        conditions=request.sent.model_dump(),
        rows=tuple(rows_of(found, served)),
        noise=Noise(seconds=tuple(found.seconds), load=load),
    )


def engine_specs(request: BenchRequest) -> dict[str, EngineSpec]:
    """The engine of each scheme.

    Raises:
        QuantkitError: as `parse_schemes` and `make_spec`.
    """
    configs = cache(model_config)
    options = {"max_num_seqs": request.plan.most_sequences, **dict(request.engine)}
    base = EngineSpec(
        request.model,
        max_model_len=request.max_model_len or request.plan.longest,
        options=tuple(options.items()),
    )
    schemes = parse_schemes(request.schemes, configs(request.model))
    return {s.label: make_spec(s, request.model, base, configs) for s in schemes}


def _tell(chosen: Fit, engines: int, terminal: Terminal) -> None:
    """How engines run, where there is more than one."""
    if engines > 1:
        how = "run at the same time and take turns" if chosen.together else "run one at a time"
        terminal.note(f"{engines} engines {how}: {chosen.why}.")
    if not chosen.together:
        terminal.warn(APART_COSTS)


@contextmanager
def _logs() -> Iterator[Path]:
    """A new folder for logs, which is left where they say why something failed."""
    folder = Path(tempfile.mkdtemp(prefix="quantkit-bench-"))
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder)
        raise
