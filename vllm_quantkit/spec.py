"""What a quantised layer is: frozen descriptions that every other module speaks in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quantkit_kernels.act_quant.rows import PER_TENSOR, PER_TOKEN, RowCode
from quantkit_kernels.code_types import CodeType

Dialect = Literal[
    "awq", "gptq", "compressed-tensors", "fp8", "fbgemm_fp8", "bitsandbytes", "quantkit", "16-bit"
]
"""How the checkpoint names and lays out a layer's tensors; `16-bit` is quantised on arrival."""

PER_CHANNEL = -1
"""`group_size` of a weight with one scale per output channel."""

ALL_ROWS = -1
"""`scale_rows` of a weight whose output channels all share their scales."""


class Frozen(BaseModel):
    """Immutable, hashable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class WeightSpec(Frozen):
    """W[n, k] = scale[n, g(k)] * value(code[n, k]), code in 0 .. 2**bits - 1.

    The value of an `int` is code - zero[n, g(k)], that of others is what the code type says.

    Attributes:
        bits: bits per weight code, 2 to 8.
        group_size: input channels that share a scale; -1 means all of them.
        symmetric: True where every zero-point is 2**(bits - 1), or there is none, and none is
            stored.
        act_order: True where g(k) is an arbitrary map stored in the checkpoint (GPTQ `desc_act`).
        code_type: what a code stands for.
        scale_rows: output channels that share a scale: 1, a block's height, or -1 for all of
            them. Scales are spread over the rows when they are decoded.
    """

    bits: int = Field(ge=2, le=8)
    group_size: int = Field(ge=-1)
    symmetric: bool
    act_order: bool = False
    code_type: CodeType = "int"
    scale_rows: int = Field(default=1, ge=-1)

    @property
    def default_zero(self) -> int:
        """The zero-point where none is stored: the middle of integers, nothing for others."""
        return 2 ** (self.bits - 1) if self.code_type == "int" else 0

    def num_groups(self, in_features: int) -> int:
        """ceil(in_features / group_size), or 1 per channel."""
        return 1 if self.group_size == PER_CHANNEL else -(-in_features // self.group_size)

    def describe(self) -> str:
        """The numerics in a few words."""
        kind = f"{self.bits} bits" if self.code_type == "int" else self.code_type.upper()
        if self.group_size != PER_CHANNEL and self.scale_rows > 1:
            return f"{kind}, blocks of {self.scale_rows}x{self.group_size}"
        if self.group_size != PER_CHANNEL:
            return f"{kind}, group {self.group_size}"
        return f"{kind}, per {'tensor' if self.scale_rows == ALL_ROWS else 'channel'}"


class ActivationSpec(Frozen):
    """x[m, k] ~ scale * (code - zero): activations in 8 bits.

    Attributes:
        code: integers or E4M3 floats.
        dynamic: scales are computed from each batch; False takes the checkpoint's, per tensor.
        group_size: channels that share a scale: all of a token (-1), all of the batch (0), or so
            many of a token.
        symmetric: False has a zero-point.
        upper_bound: dynamic scales are made for at most this magnitude; None for no bound.
        outlier_threshold: columns with a larger magnitude are multiplied in 16 bits
            (LLM.int8(), arXiv 2208.07339); None for no such columns.
    """

    code: RowCode
    dynamic: bool = True
    group_size: int = Field(default=PER_TOKEN, ge=-1)
    symmetric: bool = True
    upper_bound: float | None = Field(default=None, gt=0)
    outlier_threshold: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _is_possible(self) -> ActivationSpec:
        if not self.dynamic and self.group_size != PER_TENSOR:
            raise ValueError("static activation scales are per tensor")
        if not self.symmetric and self.code != "int8":
            raise ValueError("only integers have zero-points")
        return self

    def describe(self) -> str:
        """The numerics in a few words."""
        per = {PER_TOKEN: "token", PER_TENSOR: "tensor"}.get(self.group_size)
        per = per or f"group of {self.group_size}"
        zero = "" if self.symmetric else " asymmetric"
        outliers = "" if self.outlier_threshold is None else f", outliers {self.outlier_threshold}"
        kind = "dynamic" if self.dynamic else "static"
        return f"{kind}{zero} {self.code.upper()} activations per {per}{outliers}"


class SchemeSpec(Frozen):
    """How one layer is stored: dialect, numerics and the dialect's variant.

    Attributes:
        dialect: whose tensor names and packing the checkpoint uses.
        weight: the numerics of the weight.
        variant: the dialect's own layout version, such as AWQ's `gemm` or GPTQ's `gptq_v2`; for
            `16-bit`, how grids are refined (`quantize.methods.data_free.Refinement`).
        activation: the numerics of the activations; None leaves them in 16 bits.
    """

    dialect: Dialect
    weight: WeightSpec
    variant: str = ""
    activation: ActivationSpec | None = None

    @property
    def is_packed(self) -> bool:
        """True where integer codes are packed into 32-bit words, as in AWQ and GPTQ."""
        return self.dialect in ("awq", "gptq") or self.variant == "pack-quantized"

    def describe(self) -> str:
        """The numerics in a few words."""
        weight = self.weight.describe()
        return weight if self.activation is None else f"{weight}, {self.activation.describe()}"


class LayerShape(Frozen):
    """The size of a whole (unsharded) linear layer: y[M, out] = x[M, in] W[out, in]^T."""

    out_features: int = Field(gt=0)
    in_features: int = Field(gt=0)


class LayerRule(Frozen):
    """Layers whose name matches `pattern` use `scheme`; None leaves them in 16 bits.

    Attributes:
        pattern: a regular expression that must match the whole name from its start.
        scheme: what the matching layers use.
    """

    pattern: str
    scheme: SchemeSpec | None

    def matches(self, name: str) -> bool:
        """True where the pattern matches at the start of `name`."""
        return _compiled(self.pattern).match(name) is not None


class LayerRules(Frozen):
    """Scheme by layer name: the first rule that matches wins, else `default`.

    Attributes:
        rules: tried in order.
        default: for names no rule matches.
        lm_head: scheme of the output head; heads stay in 16 bits unless a checkpoint says so.
    """

    rules: tuple[LayerRule, ...] = ()
    default: SchemeSpec | None = None
    lm_head: SchemeSpec | None = None

    def scheme_for(self, name: str) -> SchemeSpec | None:
        """The scheme of the checkpoint layer called `name`; None means 16 bits."""
        for rule in self.rules:
            if rule.matches(name):
                return rule.scheme
        return self.lm_head if name.rpartition(".")[2] == "lm_head" else self.default

    @cached_property
    def schemes(self) -> tuple[SchemeSpec, ...]:
        """Every scheme the rules mention, each once, in order of mention."""
        mentioned: Iterable[SchemeSpec | None] = (
            self.default,
            self.lm_head,
            *(rule.scheme for rule in self.rules),
        )
        return tuple(dict.fromkeys(scheme for scheme in mentioned if scheme is not None))


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
