"""Three ways to find out what each group of layers costs: see `sensitivity.SensitivityMethod`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vllm_quantkit.evaluate.layer_pairs import LayerGroup, LayerPair
from vllm_quantkit.evaluate.sensitivity import SensitivityMethod
from vllm_quantkit.evaluate.window_scores import ROWS, compare
from vllm_quantkit.terminal import Tick

LABELS = 4
"""Tokens drawn from each of the base's distributions: the more, the less the estimate spreads."""

Groups = Sequence[LayerGroup]
Rows = Sequence[Sequence[int]]

Measure = Callable[[PreTrainedModel, PreTrainedModel, Groups, Rows, Tick], list[float]]
"""The 16-bit model, the quantised one, what to measure and on which tokens: nats for each group."""


def _restore(
    plain: PreTrainedModel, served: PreTrainedModel, groups: Groups, rows: Rows, tick: Tick
) -> list[float]:
    """KL of the whole quantised model, less that with a group restored."""
    costs = [0.0] * len(groups)
    for row in rows:
        base = _log_probs(plain, row)
        whole = _divergence(base, _log_probs(served, row))
        for index, group in enumerate(groups):
            with _swapped(served, {pair.name: pair.restored for pair in group.pairs}):
                costs[index] += whole - _divergence(base, _log_probs(served, row))
            tick()
    return _per_token(costs, rows)


def _quantise(
    plain: PreTrainedModel, served: PreTrainedModel, groups: Groups, rows: Rows, tick: Tick
) -> list[float]:
    """KL of the 16-bit model with a group quantised."""
    costs = [0.0] * len(groups)
    for row in rows:
        base = _log_probs(plain, row)
        for index, group in enumerate(groups):
            with _swapped(plain, {pair.name: pair.quantised for pair in group.pairs}):
                costs[index] += _divergence(base, _log_probs(plain, row))
            tick()
    return _per_token(costs, rows)


def _approximate(
    plain: PreTrainedModel, served: PreTrainedModel, groups: Groups, rows: Rows, tick: Tick
) -> list[float]:
    """KL ~ 1/2 E[sum over tokens of (g . dy)^2], the gradient g of ln p(drawn token) by outputs y.

    dy is the error that a group's layers make of the same input. This is the Fisher information's
    quadratic form, errors at different tokens taken for independent.
    """
    generator = torch.Generator().manual_seed(0)
    costs = [0.0] * len(groups)
    for row in rows:
        outputs, errors, log_probs = _observed(plain, groups, row)
        for label in range(LABELS):
            drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=generator)
            chosen = log_probs.gather(1, drawn).sum()
            keep = label < LABELS - 1
            gradients = torch.autograd.grad(chosen, list(outputs.values()), retain_graph=keep)
            moved = {
                name: (gradient * errors[name]).sum(-1)
                for name, gradient in zip(outputs, gradients, strict=True)
            }
            for index, group in enumerate(groups):
                by_token = torch.stack([moved[pair.name] for pair in group.pairs]).sum(0)
                costs[index] += float(by_token.square().sum()) / (2 * LABELS)
        tick()
    return _per_token(costs, rows)


MEASURES: dict[SensitivityMethod, Measure] = {
    "exact restore": _restore,
    "exact quantise": _quantise,
    "fisher approximation": _approximate,
}


def _observed(
    plain: PreTrainedModel, groups: Groups, row: Sequence[int]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Each layer's output and error, by name, and ln p with a graph to differentiate."""
    outputs: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}

    def observe(pair: LayerPair) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[pair.name] = output
            with torch.no_grad():
                errors[pair.name] = pair.quantised(inputs[0]) - output

        return hook

    pairs = {pair.name: pair for group in groups for pair in group.pairs}
    hooks = [pair.plain.register_forward_hook(observe(pair)) for pair in pairs.values()]
    try:
        embedded = plain.get_input_embeddings()(torch.tensor([row])).detach().requires_grad_()
        logits = plain(inputs_embeds=embedded).logits[0, :-1]
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, errors, logits.float().log_softmax(-1)


@contextmanager
def _swapped(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other modules in these places, for a while."""
    before = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)


def _log_probs(model: PreTrainedModel, row: Sequence[int]) -> Tensor:
    """ln p of every token but the first, float32 [T - 1, V]."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([row])).logits[0, :-1]
    return logits.float().log_softmax(-1)


def _divergence(p: Tensor, q: Tensor) -> float:
    """Sum over positions of KL(p || q), in float64, a few rows at a time."""
    pairs = zip(p.split(ROWS), q.split(ROWS), strict=True)
    return sum(float(compare(a.double(), b.double())[0].sum()) for a, b in pairs)


def _per_token(costs: Sequence[float], rows: Rows) -> list[float]:
    tokens = sum(len(row) - 1 for row in rows)
    return [cost / tokens for cost in costs]
