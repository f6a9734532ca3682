"""What quantising cost on held-out text: perplexity, and divergence from the 16-bit model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss

from vllm_quantkit.quantize.output.report import Quality

TAIL = 0.99
"""Quantile of the divergence that is reported beside the mean."""

ROWS = 256
"""Tokens whose distributions are compared at a time: 16 distributions of a large vocabulary would
take as much memory as a block."""


def compare(
    original: Iterable[tuple[Tensor, Tensor]], quantized: Iterable[tuple[Tensor, Tensor]]
) -> Quality:
    """exp(mean -log p(x_t)) of both, and KL(p || q) = sum_v p_v log(p_v / q_v) token by token.

    Args:
        original: token ids int64 [B, T] and 16-bit logits float [B, T, V], batch by batch.
        quantized: the same ids and the quantised model's logits.
    """
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    divergences: list[Tensor] = []
    agreements: list[Tensor] = []
    for (ids, reference), (_, candidate) in zip(original, quantized, strict=True):
        for targets, p, q in _next_tokens(ids, reference, candidate):
            losses[0].append(nll_loss(p, targets, reduction="none"))
            losses[1].append(nll_loss(q, targets, reduction="none"))
            divergences.append((p.exp() * (p - q)).sum(-1).clamp_min(0))
            agreements.append(p.argmax(-1) == q.argmax(-1))
    divergence = torch.cat(divergences).double()
    before, after = (float(torch.cat(part).double().mean().exp()) for part in losses)
    return Quality(
        tokens=len(divergence),
        perplexity_before=before,
        perplexity_after=after,
        divergence_mean=float(divergence.mean()),
        divergence_tail=float(divergence.kthvalue(max(1, round(TAIL * len(divergence)))).values),
        top1_agreement=float(torch.cat(agreements).double().mean()),
    )


def _next_tokens(
    ids: Tensor, reference: Tensor, candidate: Tensor
) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    """Next tokens [R], log-probabilities [R, V] of both, a few rows at a time."""
    targets = ids[:, 1:].flatten().to(reference.device)
    both = [logits[:, :-1].flatten(0, 1).split(ROWS) for logits in (reference, candidate)]
    for wanted, p, q in zip(targets.split(ROWS), *both, strict=True):
        yield wanted, log_softmax(p.float(), -1), log_softmax(q.float(), -1)
