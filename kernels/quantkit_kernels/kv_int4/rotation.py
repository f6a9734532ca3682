"""Signed Hadamard rotations of heads: k' = ((k - mu) / lambda) R, q' = (lambda * q) R, o = o' R^T.

R R^T = I, so q' . k' = q . k - q . mu. A rotation spreads a large coordinate over a whole head,
whose groups then need small scales only (arXiv 2404.00456).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quantkit_kernels.kv_int4.layout import DIMENSIONS
from quantkit_kernels.kv_int4.treatment import KeyTreatment

_PRIME = 257
"""Signs are Legendre symbols of it: no row of a Hadamard matrix comes near them, so that a vector
whose coordinates are all alike is spread too. Larger than the largest head."""

_PALEY = {1: 1, 3: 12, 5: 20, 7: 28}
"""The odd part of a padded head to the order of the matrix that has it."""


@cache
def head_rotation(head_size: int, device: torch.device) -> Tensor:
    """R, float32 [D, P]: the first D rows of a signed orthonormal Hadamard matrix of order P.

    P is D padded to a multiple of 32. The same numbers on every machine: caches may be shared.
    Call it before a CUDA graph is captured: the first call copies from the host.
    """
    order = -(-head_size // DIMENSIONS) * DIMENSIONS
    with torch.inference_mode(False):
        signs = torch.tensor([_legendre(i + 1, _PRIME) for i in range(head_size)])
        rotation: Tensor = _hadamard(order)[:head_size] * signs[:, None] / order**0.5
        return rotation.to(device, torch.float32)


def rotate_keys(key: Tensor, treatment: KeyTreatment, dtype: torch.dtype = torch.float32) -> Tensor:
    """k' = ((k - mu) / lambda) R.

    Args:
        key: float [T, kv_heads, D].
        treatment: mu and lambda.
        dtype: of the result; float32 within.

    Returns:
        [T, kv_heads, P].
    """
    treated = key.float()
    if treatment.shift is not None:
        treated = treated - treatment.shift
    if treatment.scale is not None:
        treated = treated / treatment.scale
    return _rotated(treated, dtype)


def rotate_values(value: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """v' = v R, [T, kv_heads, P] of value [T, kv_heads, D]."""
    return _rotated(value.float(), dtype)


def rotate_queries(
    query: Tensor, treatment: KeyTreatment, dtype: torch.dtype = torch.float32
) -> Tensor:
    """q' = (lambda * q) R, [T, heads, P] of query [T, heads, D], lambda that of its KV head."""
    treated = query.float()
    if treatment.scale is not None:
        treated = treated * _per_query_head(treatment.scale, query.shape[1])
    return _rotated(treated, dtype)


def shift_products(query: Tensor, treatment: KeyTreatment) -> Tensor | None:
    """q . mu, float32 [T, heads]: q . k = q' . k' + q . mu. None without a shift."""
    if treatment.shift is None:
        return None
    return (query.float() * _per_query_head(treatment.shift, query.shape[1])).sum(-1)


def unrotate(rotated: Tensor, head_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """o = o' R^T, [..., D] of rotated [..., P]."""
    return (rotated.float() @ head_rotation(head_size, rotated.device).T).to(dtype)


def _rotated(heads: Tensor, dtype: torch.dtype) -> Tensor:
    return (heads @ head_rotation(heads.shape[-1], heads.device)).to(dtype)


def _per_query_head(per_kv_head: Tensor, heads: int) -> Tensor:
    return per_kv_head.repeat_interleave(heads // per_kv_head.shape[0], 0)


def _hadamard(order: int) -> Tensor:
    """H, int64 [n, n] of +-1 with H H^T = n I: Paley's of the odd part, doubled by Sylvester's."""
    base = _PALEY[order // (order & -order)]
    matrix = _paley(base)
    while matrix.shape[0] < order:
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]]), matrix)
    return matrix


def _paley(order: int) -> Tensor:
    """A Hadamard matrix of order 1, 12, 20 or 28 (R. E. A. C. Paley, 1933).

    With chi the quadratic character of a prime q and C the matrix of chi(i - j) bordered by ones,
    I + C has order q + 1 where q = 3 mod 4, and where q = 1 mod 4
    C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]] has order 2 (q + 1).
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    if order != 28:
        return _conference(order - 1) + torch.eye(order, dtype=torch.int64)
    half = order // 2
    identity = torch.eye(half, dtype=torch.int64)
    doubled = torch.kron(_conference(half - 1), torch.tensor([[1, 1], [1, -1]]))
    return doubled + torch.kron(identity, torch.tensor([[1, -1], [-1, -1]]))


def _conference(prime: int) -> Tensor:
    """C, [q + 1, q + 1] with C C^T = q I: skew where q = 3 mod 4, else symmetric."""
    rows = [[_legendre(i - j, prime) for j in range(prime)] for i in range(prime)]
    border = 1 if prime % 4 == 1 else -1
    return torch.tensor([[0] + [1] * prime, *([border, *row] for row in rows)])


def _legendre(a: int, prime: int) -> int:
    """(a / p): 1 for a square, -1 for none, 0 for a multiple of p."""
    power = pow(a % prime, (prime - 1) // 2, prime)
    return power - prime if power > 1 else power
