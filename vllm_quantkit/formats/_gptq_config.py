"""What a GPTQ config says: one scheme, overridden per layer by `dynamic`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from vllm_quantkit.errors import QuantkitError, UnsupportedScheme
from vllm_quantkit.formats._fields import Fields
from vllm_quantkit.spec import PER_CHANNEL, LayerRule, LayerRules, SchemeSpec, WeightSpec

BITS = (2, 3, 4, 8)
VERSIONS = ("gptq", "gptq_v2")

GROUP_SIZE = "a positive integer, or -1 for one scale per output channel"


class Scheme(Fields):
    """The keys that describe one layer; `dynamic` may override them by name."""

    dialect: ClassVar[str] = "gptq"
    allowed: ClassVar[Mapping[str, str]] = {
        "bits": "one of the integers 2, 3, 4, 8",
        "group_size": GROUP_SIZE,
        "sym": "true or false",
        "desc_act": "true or false",
        "static_groups": "true or false",
        "quant_method": "'gptq' or 'gptq_v2'",
        "lm_head": "true or false",
        "checkpoint_format": "'gptq' or 'gptq_v2'",
        "format": "'gptq' or 'gptq_v2'",
        "pack_dtype": "'int32'",
        "is_marlin_format": "true or false",
        "dynamic": "an object of '+:regex' or '-:regex' to an object of overrides, or null",
        "modules_in_block_to_quantize": "a list of parts of layer names, or null",
    }

    bits: int = Field(ge=1)
    group_size: int = Field(ge=-1)
    sym: bool = True
    desc_act: bool = False

    def spec(self, version: str) -> SchemeSpec:
        """These numerics, stored in format `version`.

        Raises:
            ConfigError: a group size of 0.
            UnsupportedScheme: a number of bits that is not served.
        """
        if self.group_size == 0:
            raise self.malformed("group_size", 0, GROUP_SIZE)
        weight = WeightSpec(
            bits=served_bits(self.bits),
            group_size=self.group_size,
            symmetric=self.sym,
            act_order=self.desc_act and self.group_size != PER_CHANNEL,
        )
        return SchemeSpec(dialect="gptq", weight=weight, variant=version)


class GptqFields(Scheme):
    """The keys of a GPTQ config that decide how it is stored."""

    quant_method: str = "gptq"
    lm_head: bool = False
    static_groups: bool = False
    checkpoint_format: str | None = None
    format: str | None = None
    pack_dtype: str | None = "int32"
    is_marlin_format: bool = False
    dynamic: dict[str, dict[str, Any] | None] | None = None
    modules_in_block_to_quantize: list[str | list[str]] | None = None

    def served_version(self) -> str:
        """`gptq` or `gptq_v2`.

        Raises:
            UnsupportedScheme: another layout.
        """
        if self.is_marlin_format:
            raise _unserved_version("marlin")
        if self.pack_dtype not in (None, "int32"):
            raise self.unserved(
                "pack_dtype", self.pack_dtype, "'int32'", "Quantise again with pack_dtype 'int32'."
            )
        version = self.checkpoint_format or self.format or self.quant_method
        return served_version(version.lower())

    def listed(self) -> tuple[str, ...]:
        """Every entry of `modules_in_block_to_quantize`, flat."""
        flat: list[str] = []
        for entry in self.modules_in_block_to_quantize or []:
            flat.extend([entry] if isinstance(entry, str) else entry)
        return tuple(flat)

    def rules(self) -> LayerRules:
        """The scheme of every layer, by name.

        Raises:
            ConfigError: see `Scheme.spec`; or a pattern that is no regular expression.
            UnsupportedScheme: see `Scheme.spec` and `served_version`.
        """
        version = self.served_version()
        scheme = self.spec(version)
        return LayerRules(
            rules=(*_unlisted(self), *_overrides(self, version)),
            default=scheme,
            lm_head=scheme if self.lm_head else None,
        )


def _unlisted(fields: GptqFields) -> tuple[LayerRule, ...]:
    """Rules for what stays in 16 bits whatever `dynamic` says."""
    head = r"(?:.*\.)?lm_head\Z"
    rules = []
    if fields.dynamic and not fields.lm_head:
        rules.append(LayerRule(pattern=head, scheme=None))
    if listed := fields.listed():
        any_listed = "|".join(re.escape(part) for part in listed)
        rules.append(LayerRule(pattern=f"(?!{head})(?!.*(?:{any_listed}))", scheme=None))
    return tuple(rules)


def _overrides(fields: GptqFields, version: str) -> tuple[LayerRule, ...]:
    rules = []
    base = {name: getattr(fields, name) for name in Scheme.model_fields}
    for key, overrides in (fields.dynamic or {}).items():
        pattern = fields.regex("dynamic", key, key.removeprefix("-:").removeprefix("+:"))
        if key.startswith("-:"):
            rules.append(LayerRule(pattern=pattern, scheme=None))
            continue
        try:
            scheme = Scheme.read({**base, **(overrides or {})}).spec(version)
        except QuantkitError as error:
            raise type(error)(f"In the rule {key!r} of 'dynamic': {error}") from None
        rules.append(LayerRule(pattern=pattern, scheme=scheme))
    return tuple(rules)


def served_bits(bits: int) -> int:
    """`bits` if GPTQ stores it in the layout served.

    Raises:
        UnsupportedScheme: it does not.
    """
    if bits not in BITS:
        raise GptqFields.unserved(
            "bits",
            bits,
            "GPTQ with bits 2, 3, 4 or 8",
            "Quantise again with one of these, or as 'compressed-tensors', which holds 2 to 8.",
        )
    return bits


def served_version(version: str) -> str:
    """`version` if its layout is served.

    Raises:
        UnsupportedScheme: it is not.
    """
    if version not in VERSIONS:
        raise _unserved_version(version)
    return version


def _unserved_version(version: str) -> UnsupportedScheme:
    return GptqFields.unserved(
        "checkpoint_format",
        version,
        "the layouts 'gptq' and 'gptq_v2'",
        "Quantise again with checkpoint_format 'gptq_v2'.",
    )
