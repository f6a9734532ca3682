"""What an AWQ config says: one scheme, and parts of the names that stay in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import AliasChoices, Field

from vllm_quantkit.formats._fields import Fields, containing
from vllm_quantkit.spec import LayerRule, LayerRules, SchemeSpec, WeightSpec

BITS = 4
VERSIONS = ("gemm", "gemv")


class AwqFields(Fields):
    """The keys of an AWQ config that decide how it is stored."""

    dialect: ClassVar[str] = "awq"
    allowed: ClassVar[Mapping[str, str]] = {
        "bits": "the integer 4",
        "w_bit": "the integer 4",
        "group_size": "a positive integer, or -1 for one scale per output channel",
        "q_group_size": "a positive integer, or -1 for one scale per output channel",
        "zero_point": "true or false",
        "version": "'gemm' or 'gemv'",
        "format": "'gemm' or 'gemv'",
        "modules_to_not_convert": "a list of parts of layer names, or null",
        "lm_head": "true or false",
        "dynamic": "an object or null",
    }

    bits: int = Field(ge=1, validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(ge=-1, validation_alias=AliasChoices("group_size", "q_group_size"))
    zero_point: bool = True
    version: str | None = None
    format: str | None = None
    modules_to_not_convert: list[str] | None = None
    lm_head: bool = False
    dynamic: dict[str, Any] | None = None

    def scheme(self) -> SchemeSpec:
        """The one scheme that an AWQ checkpoint has.

        Raises:
            ConfigError: a group size of 0.
            UnsupportedScheme: not 4 bits, not `gemm` or `gemv`, rules per layer.
        """
        if self.group_size == 0:
            raise self.malformed("group_size", 0, self.allowed["group_size"])
        if self.dynamic:
            raise self.unserved(
                "dynamic",
                self.dynamic,
                "AWQ with one scheme for all layers",
                "List the layers kept in 16 bits in 'modules_to_not_convert' instead.",
            )
        weight = WeightSpec(
            bits=served_bits(self.bits),
            group_size=self.group_size,
            symmetric=not self.zero_point,
        )
        version = (self.version or self.format or "gemm").lower()
        return SchemeSpec(dialect="awq", weight=weight, variant=served_version(version))

    def rules(self) -> LayerRules:
        """The scheme for all layers but those whose name contains an entry of the skip list.

        Raises:
            ConfigError: see `scheme`; or an entry that is part of every name.
            UnsupportedScheme: see `scheme`.
        """
        scheme = self.scheme()
        skipped = self.modules_to_not_convert or []
        if "" in skipped:
            raise self.malformed(
                "modules_to_not_convert", skipped, "a list without '', which is part of every name"
            )
        return LayerRules(
            rules=tuple(LayerRule(pattern=containing(part), scheme=None) for part in skipped),
            default=scheme,
            lm_head=scheme if self.lm_head else None,
        )


def served_bits(bits: int) -> int:
    """`bits` if AWQ stores it.

    Raises:
        UnsupportedScheme: it does not.
    """
    if bits != BITS:
        raise AwqFields.unserved(
            "bits",
            bits,
            "AWQ with bits 4 only",
            "Quantise again with bits 4, or as 'compressed-tensors', which holds 2 to 8 bits.",
        )
    return bits


def served_version(version: str) -> str:
    """`version` if its layout is served.

    Raises:
        UnsupportedScheme: it is not.
    """
    if version not in VERSIONS:
        raise AwqFields.unserved(
            "version",
            version,
            "the versions 'gemm' and 'gemv'",
            "Quantise again with version 'gemm' ('gemv_fast' stores zero-points as rounded "
            "products with the scale, which no integer kernel can use).",
        )
    return version
