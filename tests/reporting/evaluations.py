"""Evaluations to report."""

from __future__ import annotations

import numpy as np

from vllm_quantkit.evaluate.intervals import Interval
from vllm_quantkit.evaluate.quality import Quality
from vllm_quantkit.evaluate.sensitivity import LayerSensitivity
from vllm_quantkit.evaluate.tasks import TaskScore
from vllm_quantkit.evaluate.window_scores import WindowScores
from vllm_quantkit.long_generation.curve import compounding, kl_curve
from vllm_quantkit.long_generation.divergence import diverge
from vllm_quantkit.long_generation.result import Decoding, LongGeneration
from vllm_quantkit.long_generation.texts import Texts
from vllm_quantkit.reporting.distribution import Distribution
from vllm_quantkit.reporting.evaluation import Evaluation, Served


def around(value: float, reach: float = 0.1) -> Interval:
    return Interval(value=value, low=value - reach, high=value + reach)


QUALITY = Quality(
    tokens=4000,
    perplexity=around(17.5),
    base_perplexity=around(17.2),
    increase=around(0.015, 0.003),
    divergence=around(0.013, 0.001),
    divergence_tail=0.11,
    top1_agreement=around(0.93, 0.01),
    backend="vllm 0.32.0",
    source="held_out.txt",
    windows=8,
    length=500,
    warnings=("Few windows.",),
)
SCORES = tuple(
    WindowScores(
        losses=np.linspace(0, 8, 101) + window,
        base_losses=np.linspace(0, 7, 101) + window,
        divergences=np.linspace(0, 0.5, 101) * (window + 1),
        agreements=np.ones(101),
    )
    for window in range(2)
)
LAYERS = (
    LayerSensitivity(
        group="model.layers.0.self_attn.qkv_proj",
        members=("model.layers.0.self_attn.q_proj",),
        kl=0.004,
        method="exact restore",
        bits=4.25,
    ),
    LayerSensitivity(
        group="model.layers.0.mlp.down_proj", members=(), kl=-0.001, method="exact restore", bits=8
    ),
    LayerSensitivity(
        group="model.layers.0", members=(), kl=0.003, method="exact restore", bits=5, is_block=True
    ),
)


def decoding(name: str) -> Decoding:
    base = [[1, 2, 3] * 20, list(range(60)), [5] * 60]
    model = [[1, 2, 3] * 20, [*range(30), 9, *range(31, 60)], [5] * 4 + [6] * 56]
    again = [base[0], base[1], [5] * 50 + [7] * 10]
    curves = [[0.01 * (1 + place / 60) * factor for place in range(60)] for factor in (1, 2, 3)]
    greedy = name == "greedy"
    return Decoding.model_validate(
        {
            "name": name,
            "temperature": 0.0 if greedy else 0.6,
            "top_p": 1.0 if greedy else 0.95,
            "base": texts(base).described(),
            "model": texts(model).described(),
            "divergence": diverge(base, model),
            "noise": diverge(base, again) if greedy else None,
            "curve": kl_curve(curves),
            "compounding": compounding(curves),
            "parting_probability": 0.4 if greedy else None,
        }
    )


def texts(rows: list[list[int]]) -> Texts:
    return Texts(rows=tuple(map(tuple, rows)), ended=(True, False, False))


LONG = LongGeneration(
    prompts=3,
    tokens=60,
    source="held_out.txt",
    fingerprint="cd" * 32,
    seed=0,
    ends=True,
    backend="vllm 0.32.0",
    decodings=(decoding("greedy"), decoding("sampled")),
    warnings=("Continuations are short.",),
)
TASK = TaskScore(
    task="gsm8k",
    metric="exact_match,strict-match",
    score=around(0.5, 0.02),
    base=around(0.55, 0.02),
    drop=around(0.05, 0.03),
    results="results/model.json",
    base_results="results/base.json",
)
EVALUATION = Evaluation(
    model=Served(
        model="models/tiny-awq",
        quantization="quantkit-awq",
        max_model_len=512,
        options={"additional_config": {"quantkit": {"ignore": ["lm_head"]}}},
    ),
    base=Served(model="models/tiny", max_model_len=512),
    backend="vllm 0.32.0",
    versions={"torch": "2.13.0", "vllm-quantkit": "0.1"},
    machine="a CPU of 2 cores",
    source="held_out.txt",
    fingerprint="ab" * 32,
    quality=QUALITY,
    distribution=Distribution.of(SCORES),
    by_layer=LAYERS,
    tasks=(TASK,),
    long_generation=LONG,
    warnings=("The machine was busy.",),
)
