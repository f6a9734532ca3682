"""Timed runs of an engine, step by step, so that every token has its time.

Prompts are random: no prefix of an earlier one is cached.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count, pairwise
from typing import Any

import torch

from vllm_quantkit.bench.plan import SHORT_PROMPT, WARM_UP_TOKENS
from vllm_quantkit.bench.samples import percentile

TOKENS = range(4, 1000)
"""Of random prompts: words in every vocabulary; special tokens come first or last."""

CALIBRATION_SIZES = {"cpu": 1024, "cuda": 4096}
"""Rows and columns of the matrices whose product tells how fast a device is just now."""

CALIBRATION_PRODUCTS = 4

_numbers = count()


class Run:
    """Requests in work, and when each got its tokens."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine.llm_engine
        self.times: dict[str, list[float]] = {}

    def add(self, prompt_tokens: int, tokens: int) -> str:
        """The name of a new request for exactly so many tokens behind a random prompt."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = f"timed-{next(_numbers)}"
        prompt = {"type": "token", "prompt_token_ids": random.choices(TOKENS, k=prompt_tokens)}
        params = SamplingParams(
            max_tokens=tokens,
            min_tokens=tokens,
            ignore_eos=True,
            temperature=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._engine.add_request(name, prompt, params)
        self.times[name] = []
        return name

    def step_until(self, enough: Callable[[], bool]) -> None:
        """Compute step after step."""
        while not enough() and self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                new = len(output.outputs[0].token_ids)
                self.times[output.request_id] += [now] * new

    def finish(self) -> None:
        """Compute until every request has its tokens."""
        self.step_until(lambda: False)

    def have(self, names: Iterable[str], tokens: int) -> bool:
        """True where each of these requests has so many tokens."""
        return all(len(self.times[name]) >= tokens for name in names)

    def stop(self) -> None:
        """Leave nothing in work, whatever happened."""
        self._engine.abort_request(list(self.times))
        while self._engine.has_unfinished_requests():
            self._engine.step()


@contextmanager
def running(engine: Any) -> Iterator[Run]:
    """A run of which nothing is left afterwards."""
    run = Run(engine)
    try:
        yield run
    finally:
        run.stop()


def decode(engine: Any, batch: int, tokens: int, context: int = SHORT_PROMPT) -> dict[str, float]:
    """Tokens per second of `batch` sequences together, and the seconds between two of one's.

    They follow prompts of `context` tokens. Counted from the moment when all of them have some
    tokens to that when the first has all.

    Raises:
        ValueError: they did not run together.
    """
    with running(engine) as run:
        names = [run.add(context, WARM_UP_TOKENS + tokens) for _ in range(batch)]
        run.finish()
        times = [run.times[name] for name in names]
    begin, end = max(t[WARM_UP_TOKENS - 1] for t in times), min(t[-1] for t in times)
    if begin >= end:
        raise ValueError(
            f"{batch} sequences do not run at the same time: the KV cache or max_num_seqs is too "
            "small for them. Give the engine more memory, or ask for a smaller batch."
        )
    inside = [[t for t in sequence if begin <= t <= end] for sequence in times]
    gaps = [later - earlier for sequence in inside for earlier, later in pairwise(sequence)]
    produced = sum(sum(t > begin for t in sequence) for sequence in inside)
    return {
        "tokens_per_second": produced / (end - begin),
        "gap": percentile(gaps, 0.5),
        "gap_tail": percentile(gaps, 0.99),
    }


def prefill(engine: Any, tokens: int) -> dict[str, float]:
    """Seconds until the first token behind a short prompt, and behind one of `tokens`."""
    return {"short": first_token(engine, SHORT_PROMPT), "full": first_token(engine, tokens)}


def first_token(engine: Any, tokens: int) -> float:
    """Seconds until the first token behind a prompt of `tokens`, nothing else running."""
    with running(engine) as run:
        begin = time.perf_counter()
        name = run.add(tokens, 1)
        run.finish()
        return run.times[name][0] - begin


def first_token_under_load(engine: Any, tokens: int, load: int) -> dict[str, float]:
    """Seconds until the first token behind a prompt of `tokens` while `load` sequences decode.

    Raises:
        ValueError: so many do not fit.
    """
    length = engine.llm_engine.model_config.max_model_len - SHORT_PROMPT
    with running(engine) as run:
        busy = [run.add(SHORT_PROMPT, length) for _ in range(load)]
        run.step_until(lambda: run.have(busy, WARM_UP_TOKENS))
        begin = time.perf_counter()
        name = run.add(tokens, 1)
        run.step_until(lambda: run.have([name], 1))
        if run.have(busy[:1], length):
            raise ValueError(
                f"a prompt of {tokens} tokens beside {load} sequences waits until one ends: give "
                "the engine more memory, or a smaller --load."
            )
        return {"seconds": run.times[name][0] - begin}


def mixed(engine: Any, requests: int, prompt: int, tokens: int) -> dict[str, float]:
    """Tokens per second, of prompts and answers, of requests that differ and come all at once.

    Prompts have up to `prompt` tokens and answers up to `tokens`; lengths are always the same.
    """
    draw = random.Random(0)
    lengths = [
        (draw.randint(SHORT_PROMPT, prompt), draw.randint(1, tokens)) for _ in range(requests)
    ]
    with running(engine) as run:
        begin = time.perf_counter()
        for length in lengths:
            run.add(*length)
        run.finish()
        seconds = time.perf_counter() - begin
    return {"tokens_per_second": sum(map(sum, lengths)) / seconds}


def peak(engine: Any) -> dict[str, int]:
    """Most bytes that a rank ever held: of its GPU, or of the host where there is none."""
    return {"bytes": max(engine.collective_rpc(_peak_bytes))}


def calibrate(engine: Any) -> dict[str, float]:
    """Seconds of fixed work on the engine's device, of its slowest rank."""
    return {"seconds": max(engine.collective_rpc(_fixed_work))}


def _peak_bytes(worker: Any) -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _fixed_work(worker: Any) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = CALIBRATION_SIZES[device]
    matrix = torch.full((size, size), 0.5, device=device)
    product = matrix @ matrix  # the first call makes room and starts threads
    begin = time.perf_counter()
    for _ in range(CALIBRATION_PRODUCTS):
        product = matrix @ matrix
    float(product[0, 0])  # waits for the device
    return time.perf_counter() - begin
