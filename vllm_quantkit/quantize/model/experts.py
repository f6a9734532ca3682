"""A mixture of experts, taken apart into linear layers that can be watched and quantised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

FUSED = frozenset({"gate_up_proj", "down_proj"})
"""Parameters of transformers' experts: [E, 2I, H], of which gate comes first, and [E, H, I]."""


class _Unset(nn.Linear):
    """A linear layer whose weight comes from a checkpoint: a model may have 50,000 of them."""

    def reset_parameters(self) -> None:
        """Sets nothing."""


class Expert(nn.Module):
    """The linear layers of one expert; `LinearExperts` runs them.

    Args:
        hidden: H, channels of the block.
        inner: I, channels between up and down.
        like: has the weights' dtype and device.
    """

    def __init__(self, hidden: int, inner: int, like: Tensor) -> None:
        super().__init__()
        self.gate_proj = _linear(hidden, inner, like)
        self.up_proj = _linear(hidden, inner, like)
        self.down_proj = _linear(inner, hidden, like)


class LinearExperts(nn.Module):
    """y[t] = sum over t's experts e of weight[t, e] * down_e(act(gate_e(x[t])) * up_e(x[t])).

    Stands for a fused experts module of transformers and computes the same. Expert e is the child
    named by its number, so `experts.3.gate_proj` is a linear layer.

    Args:
        fused: gives sizes and activation function; loses its parameters.

    Attributes:
        route_all: True runs every expert on all tokens, so that hooks see them; each token's output
            is still made by the experts it was sent to.
        counts: int64 [E], tokens sent to each expert since it was last set to zero.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        down = fused.get_parameter("down_proj")
        self.size, hidden, inner = down.shape
        for index in range(self.size):
            self.add_module(str(index), Expert(hidden, inner, down))
        for name in FUSED:
            delattr(fused, name)
        # Without parameters, it is the activation function between gate, up and down.
        self.between = fused
        self.route_all = False
        self.counts = torch.zeros(self.size, dtype=torch.int64)

    def experts(self) -> Iterator[Expert]:
        """All experts in order."""
        for index in range(self.size):
            yield self.get_submodule(str(index))  # type: ignore[misc]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' outputs for every token.

        Args:
            hidden_states: float [T, H].
            top_k_index: int64 [T, k], the experts each token is sent to.
            top_k_weights: float [T, k].

        Returns:
            [T, H], as `hidden_states`.
        """
        output = torch.zeros_like(hidden_states)
        sent = torch.bincount(top_k_index.flatten(), minlength=self.size).cpu()
        self.counts += sent
        for index, expert in enumerate(self.experts()):
            if not (self.route_all or sent[index]):
                continue
            token, choice = torch.where(top_k_index == index)
            if self.route_all:
                mine = self._run(expert, hidden_states)[token]
            else:
                mine = self._run(expert, hidden_states[token])
            weighted = mine * top_k_weights[token, choice, None]
            output.index_add_(0, token, weighted.to(output.dtype))
        return output

    def _run(self, expert: Expert, x: Tensor) -> Tensor:
        gate, up = expert.gate_proj(x), expert.up_proj(x)
        apply: Any = getattr(self.between, "_apply_gate", None)
        if apply is None:
            inner: Tensor = self.between.act_fn(gate) * up  # type: ignore[operator]
        else:
            inner = apply(torch.cat([gate, up], dim=-1))
        result: Tensor = expert.down_proj(inner)
        return result


def can_be_taken_apart(module: nn.Module) -> bool:
    """True for fused experts of the layout that `LinearExperts` stands for.

    Any class of the layout says how gate and up are combined in `_apply_gate`; one that does not is
    taken apart only if it has a plain `act_fn`.
    """
    parameters = {name: value.shape for name, value in module.named_parameters()}
    if parameters.keys() != FUSED or any(len(shape) != 3 for shape in parameters.values()):
        return False
    experts, hidden, inner = parameters["down_proj"]
    usual = getattr(module, "is_concatenated", True) and not getattr(module, "is_transposed", False)
    return (
        usual
        and hasattr(module, "act_fn")
        and parameters["gate_up_proj"] == (experts, 2 * inner, hidden)
    )


def _linear(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    return _Unset(inputs, outputs, bias=False, dtype=like.dtype, device=like.device)
