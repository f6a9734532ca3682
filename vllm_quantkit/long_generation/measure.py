"""Long continuations of a model and its base, compared: the road from prompts to a result.

    prompts ─ base ─> texts, and ln p of every position of them, on disk (once, for any model)
    prompts ─ model ─> texts                          ─> divergence, repetition, lengths
    the base's texts ─ model ─> KL at every position  ─> curve, compounding

A model that writes decodes token by token, as when it serves. The base's text is read whole by both
models, as a prompt is; keys and values of a 4-bit cache are read back from it, as decoding does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from vllm_quantkit.cache import cache_folder
from vllm_quantkit.engine import Engine, EngineSpec
from vllm_quantkit.evaluate.quality import SILENT
from vllm_quantkit.evaluate.scorers import (
    BATCH_TOKENS,
    EngineScorer,
    Scorer,
    backend_version,
    open_scorer,
    stores_kv_in_4_bits,
)
from vllm_quantkit.evaluate.window_scores import WindowScores
from vllm_quantkit.long_generation.base_run import BaseRun, EngineOnDemand, scores_of, texts_of
from vllm_quantkit.long_generation.compare import compare_decoding
from vllm_quantkit.long_generation.plan import LongPlan, Room, fit
from vllm_quantkit.long_generation.prompts import PromptSet
from vllm_quantkit.long_generation.result import DecodingName, LongGeneration
from vllm_quantkit.long_generation.texts import Answering, ModelTexts, write_all
from vllm_quantkit.terminal import Terminal

Scores = Mapping[DecodingName, list[WindowScores]]
"""The model's figures of the base's texts, prompt by prompt."""


def measure_long_generation(
    base: EngineSpec,
    model: EngineSpec,
    prompts: PromptSet,
    plan: LongPlan,
    *,
    max_length: int,
    terminal: Terminal = SILENT,
) -> LongGeneration:
    """Everything that long continuations show of `model` beside `base`.

    Args:
        base: the 16-bit model. `max_model_len` of both is set to what is needed.
        model: the quantised one.
        prompts: of `prompts_of_windows` or `read_prompts`.
        plan: how many tokens, and how they are chosen.
        max_length: the most tokens that the models take.
        terminal: is told how far it is.

    Raises:
        ConfigError: a prompt leaves no room for a continuation.
        CheckpointError: the disk has no room for the base's log-probabilities.
        EngineError: a model cannot be run.
    """
    return measure_against(
        record_base(base, prompts, plan, max_length=max_length, terminal=terminal),
        model,
        terminal=terminal,
    )


def record_base(
    base: EngineSpec,
    prompts: PromptSet,
    plan: LongPlan,
    *,
    max_length: int,
    terminal: Terminal = SILENT,
) -> BaseRun:
    """What the base writes, and its log-probabilities on disk; starts no engine if all is there.

    Arguments and errors are those of `measure_long_generation`.
    """
    room = fit(plan, prompts.longest, max_length)
    spec, backend = writing_spec(base, room), backend_version("vllm")
    with EngineOnDemand(spec, _log(base, "base")) as engine:
        texts = texts_of(engine, spec, prompts, plan, room, backend, terminal)
        scores = {
            name: scores_of(engine, spec, written.windows(prompts, name), backend, terminal)
            for name, written in texts.by_decoding.items()
        }
    return BaseRun(prompts, plan, room, texts, scores, backend)


def measure_against(
    base: BaseRun, model: EngineSpec, *, terminal: Terminal = SILENT
) -> LongGeneration:
    """A quantised model beside a base that was recorded.

    Raises:
        EngineError: the model cannot be run.
        CheckpointError: it has another vocabulary.
    """
    texts, scores = _run(base, model, terminal)
    decodings = (
        compare_decoding(name, base, texts.by_decoding[name], scores[name])
        for name in base.texts.by_decoding
    )
    return LongGeneration(
        prompts=len(base.prompts.rows),
        tokens=base.room.tokens,
        source=base.prompts.source,
        fingerprint=base.prompts.fingerprint,
        seed=base.plan.seed,
        ends=base.prompts.ends,
        backend=base.backend,
        decodings=tuple(decodings),
        warnings=(*base.prompts.warnings, *base.room.warnings),
    )


def writing_spec(spec: EngineSpec, room: Room) -> EngineSpec:
    """The engine that writes, and reads what the base wrote.

    Cached prefixes would leave positions out, and more tokens at once would take more memory for
    their logits.
    """
    ours = {"enable_prefix_caching": False, "max_num_batched_tokens": BATCH_TOKENS}
    options = {**ours, **dict(spec.options)}
    return replace(spec, max_model_len=room.length, options=tuple(sorted(options.items())))


def _run(base: BaseRun, model: EngineSpec, terminal: Terminal) -> tuple[ModelTexts, Scores]:
    """What the model writes, and what it makes of the base's text.

    One engine does both, unless its cache has 4 bits: then prompts are served with keys and values
    that were not rounded yet, and a text is to be read with those that were.
    """
    log = _log(model, "model")
    with Engine(writing_spec(model, base.room), log) as engine:
        texts = _write(engine, base, terminal)
        if not stores_kv_in_4_bits(model):
            return texts, _read(EngineScorer(engine), base, terminal)
    with open_scorer("vllm", model, base.room.length - 1, log) as scorer:
        return texts, _read(scorer, base, terminal)


def _write(engine: Answering, base: BaseRun, terminal: Terminal) -> ModelTexts:
    plan = base.plan
    with terminal.phase("quantised model writes", len(plan.decodings)) as tick:
        return write_all(engine, base.prompts, plan, base.room.tokens, again=False, tick=tick)


def _read(scorer: Scorer, base: BaseRun, terminal: Terminal) -> Scores:
    steps = sum(len(scores.windows.rows) for scores in base.scores.values())
    found: dict[DecodingName, list[WindowScores]] = {name: [] for name in base.scores}
    with terminal.phase("quantised model reads the base's texts", steps) as tick:
        for name, scores in base.scores.items():
            for index, row in enumerate(scores.windows.rows):
                found[name].append(scorer.score(row, base=scores.path(index)))
                tick()
    return found


def _log(spec: EngineSpec, role: str) -> Path:
    return cache_folder("logs") / f"long-generation-{role}-{Path(spec.model).name}.log"
