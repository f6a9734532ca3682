"""What configs of the methods `fp8` and `fbgemm_fp8` say: one scheme, and what they leave out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from quantkit_kernels.act_quant.rows import PER_TENSOR, PER_TOKEN
from quantkit_kernels.code_types import CodeType
from vllm_quantkit.formats._fields import Fields, within
from vllm_quantkit.spec import (
    ALL_ROWS,
    PER_CHANNEL,
    ActivationSpec,
    LayerRule,
    LayerRules,
    SchemeSpec,
    WeightSpec,
)

SKIPPED = "a list of layer names, or null"

CODE_TYPES: Mapping[str, CodeType] = {"e4m3": "e4m3", "e5m2": "e5m2"}
"""`fmt` to code type."""


class Fp8Fields(Fields):
    """The keys of an `fp8` config that decide how it is stored."""

    dialect: ClassVar[str] = "fp8"
    allowed: ClassVar[Mapping[str, str]] = {
        "activation_scheme": "'static' or 'dynamic'",
        "weight_block_size": "two positive integers, or null",
        "fmt": "'e4m3' or 'e5m2'",
        "scale_fmt": "'float' or 'ue8m0'",
        "ignored_layers": SKIPPED,
        "modules_to_not_convert": SKIPPED,
        "modules_to_convert": "null",
        "store_dtype": "null",
    }

    activation_scheme: Literal["static", "dynamic"] = "dynamic"
    weight_block_size: list[int] | None = None
    fmt: str | None = "e4m3"
    scale_fmt: Literal["float", "ue8m0"] | None = None
    ignored_layers: list[str] | None = None
    modules_to_not_convert: list[str] | None = None
    modules_to_convert: list[str] | None = None
    store_dtype: str | None = None

    def rules(self) -> LayerRules:
        """One scheme for all layers but the head and those of the skip lists.

        Raises:
            ConfigError: a block size that nothing can mean, or a bad regular expression.
            UnsupportedScheme: another float, static scales with blocks, converted embeddings.
        """
        self._refuse_extras()
        weight = self._weight()
        activation = ActivationSpec(
            code="e4m3",
            dynamic=self.activation_scheme == "dynamic",
            group_size=self._activation_group(),
        )
        scheme = SchemeSpec(dialect="fp8", weight=weight, activation=activation)
        return LayerRules(rules=(*self._skipped(),), default=scheme)

    def _refuse_extras(self) -> None:
        for key in ("modules_to_convert", "store_dtype"):
            if value := getattr(self, key):
                fix = "Save the model again without it, or serve it without --quantization."
                raise self.unserved(key, value, "null for it", fix)
        if self.weight_block_size and self.activation_scheme == "static":
            raise self.unserved(
                "activation_scheme",
                "static",
                "'dynamic' where 'weight_block_size' is set",
                "Set it to 'dynamic'.",
            )

    def _weight(self) -> WeightSpec:
        code_type = CODE_TYPES.get((self.fmt or "e4m3").lower())
        if code_type is None:
            raise self.unserved(
                "fmt", self.fmt, "'e4m3' and 'e5m2'", "Quantise again with fmt 'e4m3'."
            )
        block = self.weight_block_size
        if block is not None and (len(block) != 2 or min(block) < 1):
            raise self.malformed("weight_block_size", block, self.allowed["weight_block_size"])
        rows, columns = block or (ALL_ROWS, PER_CHANNEL)
        return WeightSpec(
            bits=8, group_size=columns, symmetric=True, code_type=code_type, scale_rows=rows
        )

    def _activation_group(self) -> int:
        if self.weight_block_size:
            return self.weight_block_size[1]
        return PER_TOKEN if self.activation_scheme == "dynamic" else PER_TENSOR

    def _skipped(self) -> tuple[LayerRule, ...]:
        return (
            *skip(self, "ignored_layers", self.ignored_layers),
            *skip(self, "modules_to_not_convert", self.modules_to_not_convert),
        )


class FbgemmFields(Fields):
    """The keys of an `fbgemm_fp8` config that decide how it is stored."""

    dialect: ClassVar[str] = "fbgemm_fp8"
    allowed: ClassVar[Mapping[str, str]] = {
        "activation_scale_ub": "a positive number, or null",
        "modules_to_not_convert": SKIPPED,
    }

    activation_scale_ub: float | None = Field(1200.0, gt=0)
    modules_to_not_convert: list[str] | None = None

    def rules(self) -> LayerRules:
        """One scheme for all layers but the head and those of the skip list.

        Raises:
            ConfigError: an entry that is no regular expression.
        """
        scheme = SchemeSpec(
            dialect="fbgemm_fp8",
            weight=WeightSpec(bits=8, group_size=PER_CHANNEL, symmetric=True, code_type="e4m3"),
            activation=ActivationSpec(code="e4m3", upper_bound=self.activation_scale_ub),
        )
        skipped = skip(self, "modules_to_not_convert", self.modules_to_not_convert)
        return LayerRules(rules=(*skipped,), default=scheme)


def skip(fields: Fields, key: str, names: Iterable[str] | None) -> list[LayerRule]:
    """Rules that leave the modules of a skip list in 16 bits, and all inside them.

    All names share one rule, as lists may hold hundreds; `re:` starts a regular expression.

    Raises:
        ConfigError: an entry behind `re:` is no regular expression.
    """
    entries = list(names or ())
    plain = [name for name in entries if not name.startswith("re:")]
    written = [name for name in entries if name.startswith("re:")]
    patterns = [fields.regex(key, name, name.removeprefix("re:")) for name in written]
    if plain:
        patterns.append(within(plain))
    return [LayerRule(pattern=pattern, scheme=None) for pattern in patterns]


def skip_list(ignore: tuple[str, ...]) -> list[Any]:
    """A skip list that names the head, too."""
    return list(dict.fromkeys((*ignore, "lm_head")))
