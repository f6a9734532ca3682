"""What a compressed-tensors config says of the weights of one group of layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field

from quantkit_kernels.code_types import CodeType
from vllm_quantkit.formats._fields import Fields
from vllm_quantkit.spec import ALL_ROWS, PER_CHANNEL, WeightSpec

DIALECT: Literal["compressed-tensors"] = "compressed-tensors"
PACKED = "pack-quantized"

CODE_TYPES: Mapping[str, Mapping[str, CodeType]] = {
    PACKED: {"int": "int"},
    "int-quantized": {"int": "int"},
    "float-quantized": {"float": "e4m3"},
    "naive-quantized": {"int": "int", "float": "e4m3"},
}
"""Format to what `type` may be in it, and the codes that stands for."""

FORMAT_WORDS = "'pack-quantized', 'int-quantized', 'float-quantized' or 'naive-quantized'"

ACT_ORDERS = {
    None: False,
    False: False,
    "weight": False,
    "static": False,
    True: True,
    "group": True,
    "dynamic": True,
}
"""`actorder` to whether the order is stored: `weight` and `static` only steer calibration."""

Strategy = Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"]


class CtFields(Fields):
    """Words of a compressed-tensors config."""

    dialect: ClassVar[str] = DIALECT
    allowed: ClassVar[Mapping[str, str]] = {
        "num_bits": "an integer from 2 to 8",
        "type": "'int' or 'float'",
        "symmetric": "true or false",
        "strategy": "'group' or 'channel', or outside 'pack-quantized' 'tensor', 'block', 'token'",
        "group_size": "a positive integer with strategy 'group', else null or -1",
        "block_structure": "two positive integers with strategy 'block', else null",
        "actorder": "null, 'group' or 'weight'",
        "dynamic": "true, false or 'local'",
        "targets": "a list of 'Linear', layer names and 're:' regular expressions",
        "weights": "an object with num_bits, strategy and so on",
        "input_activations": "null or an object",
        "output_activations": "null or an object",
        "config_groups": "an object of groups, each with 'targets' and 'weights'",
        "format": FORMAT_WORDS,
        "ignore": "a list of layer names and 're:' regular expressions, or null",
        "kv_cache_scheme": "null or an object",
    }


class Args(CtFields):
    """Numerics that weights and activations share."""

    num_bits: int = Field(8, ge=1)
    type: str = "int"
    symmetric: bool = True
    strategy: Strategy | None = None
    group_size: int | None = Field(None, ge=-1)

    @property
    def kind(self) -> str:
        """`type` in lower case, as the library reads it."""
        return self.type.lower()

    @property
    def chosen_strategy(self) -> str:
        """`strategy`, or what the library infers from the group size."""
        grouped = self.group_size is not None and self.group_size > 0
        inferred = "group" if grouped else "channel" if self.group_size == -1 else "tensor"
        return self.strategy or inferred

    def check_group_size(self) -> None:
        """Pass a group size that the strategy has.

        Raises:
            ConfigError: strategy and group size contradict each other.
        """
        grouped = self.group_size is not None and self.group_size > 0
        if self.group_size == 0 or grouped != (self.chosen_strategy == "group"):
            raise self.malformed("group_size", self.group_size, self.allowed["group_size"])


class WeightFields(Args):
    """How the weights of one group are quantised."""

    num_bits: int = Field(ge=1)
    block_structure: list[int] | str | None = None
    actorder: Literal["group", "weight", "dynamic", "static"] | bool | None = None

    def spec(self, stored: str) -> WeightSpec:
        """These numerics, stored in the format `stored`.

        Raises:
            ConfigError: type and format, or strategy and sizes, contradict each other.
            UnsupportedScheme: numerics that the format has, but we do not serve.
        """
        strategy = self._served_strategy(stored)
        self.check_group_size()
        group_size, scale_rows = self._extent(strategy)
        return WeightSpec(
            bits=self._served_bits(stored),
            group_size=group_size,
            symmetric=self.symmetric,
            act_order=ACT_ORDERS[self.actorder] and strategy == "group",
            code_type=self._code_type(stored),
            scale_rows=scale_rows,
        )

    def _code_type(self, stored: str) -> CodeType:
        if self.kind not in ("int", "float"):
            raise self.malformed("type", self.type, self.allowed["type"])
        served = CODE_TYPES[stored]
        if self.kind not in served:
            raise self.unserved(
                "type",
                self.type,
                f"{' and '.join(repr(kind) for kind in served)} in format {stored!r}",
                "Correct the format, or serve the checkpoint without --quantization.",
            )
        if self.kind == "float" and not self.symmetric:
            raise self.unserved(
                "symmetric", False, "symmetric floats", "Quantise again with symmetric true."
            )
        return served[self.kind]

    def _served_bits(self, stored: str) -> int:
        if self.kind == "float" and "float" in CODE_TYPES[stored] and self.num_bits != 8:
            raise self.unserved(
                "num_bits", self.num_bits, "floats of 8 bits", "Quantise again with num_bits 8."
            )
        return served_bits(self.num_bits)

    def _served_strategy(self, stored: str) -> str:
        strategy = self.chosen_strategy
        served = ("group", "channel") if stored == PACKED else (*PLAIN_STRATEGIES,)
        if strategy not in served:
            raise self.unserved(
                "strategy",
                strategy,
                f"{', '.join(repr(name) for name in served)} in format {stored!r}",
                "Quantise again with strategy 'channel'.",
            )
        return strategy

    def _extent(self, strategy: str) -> tuple[int, int]:
        """(group_size, scale_rows)."""
        block = self._block()
        if (block is not None) != (strategy == "block"):
            words = self.allowed["block_structure"]
            raise self.malformed("block_structure", self.block_structure, words)
        if block is not None:
            return block[1], block[0]
        group_size = self.group_size if strategy == "group" and self.group_size else PER_CHANNEL
        return group_size, ALL_ROWS if strategy == "tensor" else 1

    def _block(self) -> tuple[int, int] | None:
        """Rows and columns of a block; older configs write '128x128'."""
        match self.block_structure:
            case None:
                return None
            case str(text):
                sizes = [int(part) if part.isdecimal() else 0 for part in text.split("x")]
            case sizes:
                pass
        if len(sizes) != 2 or min(sizes) < 1:
            words = self.allowed["block_structure"]
            raise self.malformed("block_structure", self.block_structure, words)
        return sizes[0], sizes[1]


PLAIN_STRATEGIES = ("tensor", "channel", "group", "block")
"""Strategies of weights that are stored an element each."""


def served_bits(bits: int) -> int:
    """`bits` if the dialect stores it.

    Raises:
        UnsupportedScheme: it does not.
    """
    if not 2 <= bits <= 8:
        raise CtFields.unserved("num_bits", bits, "2 to 8 bits", "Quantise again with 4 or 8 bits.")
    return bits
