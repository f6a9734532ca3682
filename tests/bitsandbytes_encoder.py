"""4-bit layers as bitsandbytes stores them, written from the format's definition."""

from __future__ import annotations

import json

import torch

from quantkit_kernels.code_types import code_values

BLOCK, NESTED_BLOCK = 64, 256


def nested_map():
    """Any 256 ordered values: 8-bit scales are read through the map that is stored."""
    return torch.linspace(-1, 1, 256).sign() * torch.linspace(-1, 1, 256).square()


def encode(weight, code_type, *, double, block=BLOCK):
    """The tensors of a layer, and the weight that they stand for, computed on the way."""
    N, K = weight.shape
    book = code_values(code_type)
    blocks = weight.reshape(-1, block)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax[:, None])[..., None] - book).abs().argmin(-1)
    state = {"quant_type": code_type, "blocksize": block, "dtype": "bfloat16", "shape": [N, K]}
    stored = {"weight.quant_map": book.clone(), "weight.absmax": absmax}
    if double:
        offset = float(absmax.mean())
        pieces = (absmax - offset).split(NESTED_BLOCK)
        maxima = torch.stack([piece.abs().max() for piece in pieces])
        small = [
            ((piece / top)[:, None] - nested_map()).abs().argmin(1)
            for piece, top in zip(pieces, maxima, strict=True)
        ]
        absmax = torch.cat(
            [nested_map()[i] * top + offset for i, top in zip(small, maxima, strict=True)]
        )
        stored["weight.absmax"] = torch.cat(small).to(torch.uint8)
        stored["weight.nested_absmax"] = maxima
        stored["weight.nested_quant_map"] = nested_map()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_offset": offset}
        state |= {"nested_dtype": "float32"}
    flat = codes.flatten().tolist()
    pairs = [16 * first + second for first, second in zip(flat[::2], flat[1::2], strict=True)]
    stored["weight"] = torch.tensor(pairs, dtype=torch.uint8)[:, None]
    stored[f"weight.quant_state.bitsandbytes__{code_type}"] = as_bytes(state)
    return stored, (book[codes] * absmax[:, None]).reshape(N, K)


def as_bytes(state):
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
