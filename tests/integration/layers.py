"""Single layers of a served model, compared with what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROWS = 5

MULTIPLY_TOLERANCE = 2e-6
"""Relative error of a layer: both sides sum the same products in float32, in another order."""


def check_layers(found: Any, expected: Mapping[str, Tensor]) -> None:
    """Each layer's output [ROWS, N] is what it should be."""
    for (name, output), answer in zip(expected.items(), found, strict=True):
        error = (torch.tensor(answer) - output).norm() / output.norm()
        assert error <= MULTIPLY_TOLERANCE, f"{name} is off by {error:.1e}"
