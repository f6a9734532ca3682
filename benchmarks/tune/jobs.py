"""What is tuned: products of layers, by kernel and bucket of tokens."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from quantkit_kernels.tile_choice import LLM_INT8, scaled_kernel
from quantkit_kernels.tuning import TILE_K
from quantkit_kernels.tuning_tables import Product

PER_ROW = 0
"""Group size that stands for one scale per row."""

WEIGHT_ONLY_GROUP = 128
"""Of a model's layers, where no other is asked for."""


class Layer(NamedTuple):
    """A linear layer.

    Attributes:
        n, k: channels out and in.
        group: channels that share a scale, `PER_ROW` for all; None as is usual for the kernel.
    """

    n: int
    k: int
    group: int | None = None


@dataclass(frozen=True, order=True)
class Job:
    """A product at the largest number of tokens of a bucket."""

    product: Product
    bucket: int

    def __str__(self) -> str:
        kernel, n, k, group = self.product
        return f"{kernel} n={n} k={k} group={group} m<={self.bucket}"


def jobs_of(kernels: Sequence[str], layers: Iterable[Layer], buckets: Sequence[int]) -> list[Job]:
    """Every kernel in every layer at every bucket, each once; a layer's jobs follow each other."""
    products = dict.fromkeys(product_of(kernel, layer) for layer in layers for kernel in kernels)
    return [Job(product, bucket) for product in products for bucket in buckets]


def product_of(kernel: str, layer: Layer) -> Product:
    """The product by which tables know a layer, its columns padded as the kernel's packing does."""
    if kernel in (LLM_INT8, scaled_kernel("int")):
        return Product(kernel, layer.n, layer.k, PER_ROW)
    if kernel.startswith("scaled"):
        return Product(kernel, layer.n, layer.k, layer.group or PER_ROW)
    columns = -(-layer.k // TILE_K) * TILE_K
    group = WEIGHT_ONLY_GROUP if layer.group is None else layer.group
    return Product(kernel, layer.n, columns, group)


def parse_layer(text: str) -> Layer:
    """`N,K` or `N,K,GROUP`.

    Raises:
        ArgumentTypeError: it is neither.
    """
    parts = text.split(",")
    numbers = [int(part) for part in parts if part.isdecimal()]
    if len(parts) not in (2, 3) or len(numbers) < len(parts) or min(numbers[:2]) < 1:
        raise ArgumentTypeError(f"{text!r} is no shape; give N,K or N,K,GROUP, as 4096,14336,128")
    return Layer(*numbers)


def layers_of(config: Any, group: int | None, ranks: int) -> Iterator[Layer]:
    """The linear layers of a decoder, merged as vLLM merges them, of one tensor-parallel rank.

    Args:
        config: of a Hugging Face model.
        group: channels that share a scale, None as is usual for the kernel.
        ranks: tensor-parallel size.
    """
    text = config.get_text_config()
    hidden, heads = text.hidden_size, text.num_attention_heads
    size = getattr(text, "head_dim", None) or hidden // heads
    own, shared = heads // ranks, max(text.num_key_value_heads // ranks, 1)
    inner = text.intermediate_size // ranks
    yield Layer((own + 2 * shared) * size, hidden, group)
    yield Layer(hidden, own * size, group)
    yield Layer(2 * inner, hidden, group)
    yield Layer(hidden, inner, group)
