"""Engines of a model of eight tokens, which write and read as real ones do, without vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.evaluate.window_scores import open_stream

VOCABULARY = 8
END = 7
"""The token that ends a text."""

LIKELY = torch.tensor(
    [
        [0, 6, 2, 1, 0, 0, 0, 0.0],
        [0, 0, 6, 2, 1, 0, 0, 0.0],
        [0, 0, 0, 6, 2, 1, 0, 0.0],
        [0, 0, 0, 0, 6, 2, 1, 0.0],
        [0, 0, 0, 0, 0, 6, 2, 1.0],
        [0, 1, 0, 0, 0, 0, 6, 2.0],
        [6, 1, 0, 0, 0, 0, 0, 2.0],
        [6, 1, 0, 0, 0, 0, 0, 0.0],
    ]
)
"""Logits of the next token by the last: 0 1 2 ... 6 0 1 ... is the likeliest text."""


class ToyEngine:
    """What `Engine` is to who asks it.

    Its model's name says what it is: `base`; `drifting`, whose logits of token 1 rise by a
    hundredth with every position; `other`, with another likeliest token after a 3.

    Attributes:
        started: specs of all that were started, in order.
    """

    started: list[EngineSpec] = []  # noqa: RUF012 - emptied by the fixture

    def __init__(self, spec: EngineSpec, log: Path) -> None:
        self.spec = spec
        self._kind = Path(spec.model).name
        ToyEngine.started.append(spec)

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        return {"write_texts": self._write, "score_window": self._score}[op](**request)

    def logits(self, tokens: list[int]) -> Tensor:
        """float32 [T, V]."""
        found = LIKELY[torch.tensor(tokens)].clone()
        if self._kind == "drifting":
            found[:, 1] += 0.01 * torch.arange(len(tokens))
        if self._kind == "other":
            found[torch.tensor(tokens) == 3, 5] = 7.0
        return found

    def _write(
        self,
        prompts: list[list[int]],
        tokens: int,
        seeds: list[int],
        ends: bool,
        batch: int | None,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> dict[str, Any]:
        rows = [
            self._continued(prompt, tokens, seed, ends, temperature)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return {"tokens": rows, "ended": [ends and row[-1] == END for row in rows]}

    def _continued(
        self, prompt: list[int], tokens: int, seed: int, ends: bool, temperature: float
    ) -> list[int]:
        drawn = torch.Generator().manual_seed(seed)
        text: list[int] = []
        while len(text) < tokens and not (ends and text[-1:] == [END]):
            logits = self.logits(prompt + text)[-1]
            if temperature:
                noise = torch.rand(VOCABULARY, generator=drawn).log().neg().log().neg()
                logits = logits / temperature + noise
            text.append(int(logits.argmax()))
        return text

    def _score(self, tokens: list[int], base: str | None, keep: str | None) -> dict[str, Any]:
        files = {"base": base and Path(base), "keep": keep and Path(keep)}
        with open_stream(tokens, **files) as stream:
            stream.add(self.logits(tokens).log_softmax(-1))
            return stream.finish().to_json()

    def __enter__(self) -> ToyEngine:
        return self

    def __exit__(self, *error: object) -> None:
        pass
