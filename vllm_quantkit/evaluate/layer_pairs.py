"""A layer in 16 bits and quantised, each so that it can stand where the other one does.

AWQ and SmoothQuant fold scales of channels into norms and into the layers before, so a layer's
quantised weight is W' = diag(r) W diag(c) + error, and what it reads and writes is scaled as well.
r and c are not stored. They are the least squares fit of W' to W, which the error hardly moves: it
is averaged over a row, or a column.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.evaluate.hf_model import ServedLinear

FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
"""Layers that are served as one, which share a scheme."""

BLOCK = re.compile(r"(.+?\.\d+)\.")
"""A block's name, at the start of the names of its layers."""

FITS = 20
"""Alternations between r and c: each makes what is left of a wrong start several times smaller."""

SAME_BASIS = 1.1
"""A fit must be this much closer than a simpler one to be taken: fitting as many numbers as a
matrix has rows and columns to error alone removes a few per cent of it."""


class Rescaled(nn.Module):
    """y = W' q(c x / c) / r + b: a quantised layer among layers in 16 bits, scales undone."""

    def __init__(self, served: ServedLinear, bias: Tensor | None, r: Tensor, c: Tensor) -> None:
        super().__init__()
        self._served, self._bias, self._c = served, bias, c
        self._weight = served.weight / r[:, None] / c

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., K] to [..., N]."""
        return linear(self._served.rounded(x / self._c) * self._c, self._weight, self._bias)


@dataclass(frozen=True)
class LayerPair:
    """One layer of both models.

    Attributes:
        name: in the checkpoint.
        plain: in the 16-bit model.
        served: in the quantised one.
        restored: in 16 bits, to stand in the quantised model.
        quantised: to stand in the 16-bit model.
    """

    name: str
    plain: nn.Linear | Conv1D
    served: ServedLinear
    restored: nn.Module
    quantised: nn.Module


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are measured together.

    Attributes:
        name: of the layer that they are served as, or of their block.
        pairs: its layers.
        is_block: True for a whole block.
    """

    name: str
    pairs: tuple[LayerPair, ...]
    is_block: bool = False

    @property
    def sizes(self) -> dict[str, int]:
        """Weights in each of its layers, by name."""
        return {pair.name: pair.served.weight.numel() for pair in self.pairs}


def pair_layers(plain: PreTrainedModel, served: PreTrainedModel) -> Iterator[LayerPair]:
    """Every quantised layer with its original.

    Raises:
        CheckpointError: the models are not of the same shape.
    """
    modules = dict(plain.named_modules())
    for name, layer in served.named_modules():
        if isinstance(layer, ServedLinear):
            original = modules.get(name)
            if not isinstance(original, nn.Linear | Conv1D):
                raise CheckpointError(
                    f"{name} is quantised, but the 16-bit model has no such linear layer: compare "
                    "a model with the one it was made of."
                )
            yield make_pair(name, original, layer)


def make_pair(name: str, plain: nn.Linear | Conv1D, served: ServedLinear) -> LayerPair:
    """Both forms of a layer, each in the other's place."""
    weight = plain.weight.detach()
    weight = weight.t() if isinstance(plain, Conv1D) else weight
    if weight.shape != served.weight.shape:
        raise CheckpointError(
            f"{name} is {list(served.weight.shape)} quantised and {list(weight.shape)} in 16 bits: "
            "compare a model with the one it was made of."
        )
    r, c = fit_scales(weight, served.weight)
    restored = ServedLinear((r[:, None] * weight * c).to(weight.dtype), served.bias, None)
    bias = None if plain.bias is None else plain.bias.detach()
    quantised = Rescaled(served, bias, r.to(weight.dtype), c.to(weight.dtype))
    return LayerPair(name, plain, served, restored, quantised)


def fit_scales(weight: Tensor, scaled: Tensor) -> tuple[Tensor, Tensor]:
    """r [N] and c [K], float32, that minimise ||scaled - diag(r) weight diag(c)||.

    Both are ones, or r is, where that is as good: every number that is fitted carries some error.

    Args:
        weight, scaled: [N, K].
    """
    w, s = weight.float(), scaled.float()
    rows, columns = torch.ones(len(w)), torch.ones(w.shape[1])
    fits = [(rows, columns), (rows, _columns(w, s, rows)), _both(w, s)]
    errors = [float((s - r[:, None] * w * c).norm()) for r, c in fits]
    return next(
        fit for fit, error in zip(fits, errors, strict=True) if error <= SAME_BASIS * min(errors)
    )


def group_layers(pairs: list[LayerPair]) -> list[LayerGroup]:
    """Groups of layers that are served as one, and then whole blocks, in order."""
    groups: dict[str, list[LayerPair]] = {}
    blocks: dict[str, list[LayerPair]] = {}
    for pair in pairs:
        parent, dot, leaf = pair.name.rpartition(".")
        groups.setdefault(f"{parent}{dot}{FUSED.get(leaf, leaf)}", []).append(pair)
        if found := BLOCK.match(pair.name):
            blocks.setdefault(found[1], []).append(pair)
    fused = [LayerGroup(name, tuple(members)) for name, members in groups.items()]
    whole = [LayerGroup(name, tuple(members), is_block=True) for name, members in blocks.items()]
    return fused + whole


def _both(w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns in turn."""
    r = torch.ones(len(w))
    for _ in range(FITS):
        c = _columns(w, s, r)
        r = _columns(w.t(), s.t(), c)
    return r, c


def _columns(w: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """c [K] that minimises ||s - diag(r) w diag(c)||; 1 where a column of w is 0."""
    scaled = r[:, None] * w
    below = scaled.square().sum(0)
    return torch.where(below > 0, (s * scaled).sum(0) / below, 1.0)
