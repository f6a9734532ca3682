"""What quantising cost, by one yardstick for every quantiser: a written checkpoint is read.

Weights are those that the checkpoint stores, in float32, and activations are rounded as its scheme
says; so only codes, scales and 16-bit parameters tell quantisers apart, and no engine's arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer, PreTrainedModel

from vllm_quantkit.evaluate.window_scores import compare


@dataclass(frozen=True)
class Quality:
    """What a quantised model says of a text, against its 16-bit original.

    Attributes:
        perplexity: exp(mean negative log-likelihood).
        increase: perplexity over the original's, less 1.
        divergence: mean KL(original || quantised) of the next token, in nats.
    """

    perplexity: float
    increase: float
    divergence: float


def text_windows(model_folder: Path, text: str, length: int = 512) -> Tensor:
    """int64 [S, length]: the text's tokens in order, a window's worth after each BOS token.

    The last, incomplete window is left out.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rows = tokens[: tokens.numel() // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat([torch.full((len(rows), 1), int(tokenizer.bos_token_id)), rows], dim=1)


@dataclass(frozen=True)
class Reference:
    """What the 16-bit model says of a text, once for all that is compared with it.

    Attributes:
        windows: int64 [S, T], the text's tokens.
        log_probs: float32 [S, T, V], ln p of the next token at every position.
    """

    windows: Tensor
    log_probs: Tensor

    @property
    def perplexity(self) -> float:
        """exp(mean negative log-likelihood) of every token but each window's first."""
        return math.exp(_mean_loss(self.windows, self.log_probs))

    def compare(self, model: PreTrainedModel) -> Quality:
        """How a quantised model differs on the windows."""
        found = predict(model, self.windows)
        before, after = (_mean_loss(self.windows, p) for p in (self.log_probs, found))
        return Quality(math.exp(after), math.expm1(after - before), self.divergence(found))

    def divergence(self, log_probs: Tensor) -> float:
        """Mean KL(p || q) = sum p (ln p - ln q) over positions, of ln q [S, T, V], in nats."""
        rows = zip(self.log_probs, log_probs, strict=True)
        by_window = [compare(p.double(), q.double())[0] for p, q in rows]
        return float(torch.stack(by_window).mean())


@torch.no_grad()
def predict(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """ln p of the next token at every position of windows [S, T], float32 [S, T, V]."""
    return torch.cat([log_softmax(model(row[None]).logits.float(), dim=-1) for row in windows])


def make_reference(model: PreTrainedModel, windows: Tensor) -> Reference:
    """The 16-bit model's predictions of windows, int64 [S, T]."""
    return Reference(windows, predict(model, windows))


def _mean_loss(windows: Tensor, log_probs: Tensor) -> float:
    chosen = log_probs[:, :-1].gather(-1, windows[:, 1:, None])
    return -float(chosen.double().mean())
