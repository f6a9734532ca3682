"""What a quantkit config says: groups of layers, each with all its numerics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from vllm_quantkit.formats._fields import Fields
from vllm_quantkit.formats._patterns import exact_pattern
from vllm_quantkit.spec import ActivationSpec, LayerRule, LayerRules, SchemeSpec, WeightSpec

VERSION = 1
"""Of the layout; a reader refuses later ones."""

DIALECT: Literal["quantkit"] = "quantkit"


class QuantkitWords(Fields):
    """Words of a quantkit config."""

    dialect: ClassVar[str] = DIALECT
    allowed: ClassVar[Mapping[str, str]] = {
        "version": "the integer 1",
        "groups": "a list of objects, each with 'layers' and 'weight'",
        "layers": "a list of layer names and 're:' regular expressions",
        "weight": "an object with bits, group_size and symmetric",
        "activation": "null or an object with code",
        "bits": "an integer from 2 to 8",
        "group_size": "a positive integer, or -1 for all input channels",
        "symmetric": "true or false",
        "act_order": "true or false",
        "code_type": "'int', 'e4m3', 'e5m2', 'nf4' or 'fp4'",
        "scale_rows": "a positive integer, or -1 for all output channels",
    }


class WeightFields(QuantkitWords):
    """The numerics of the weights of one group."""

    bits: int = Field(ge=2, le=8)
    group_size: int = Field(ge=-1)
    symmetric: bool
    act_order: bool = False
    code_type: Literal["int", "e4m3", "e5m2", "nf4", "fp4"] = "int"
    scale_rows: int = Field(1, ge=-1)

    def spec(self) -> WeightSpec:
        """These numerics.

        Raises:
            ConfigError: a size of 0.
        """
        for key in ("group_size", "scale_rows"):
            if getattr(self, key) == 0:
                raise self.malformed(key, 0, self.allowed[key])
        return WeightSpec(**self.model_dump())


class GroupFields(QuantkitWords):
    """Numerics, and the layers that have them."""

    layers: list[str]
    weight: WeightFields
    activation: dict[str, Any] | None = None

    def spec(self) -> SchemeSpec:
        """The group's scheme.

        Raises:
            ConfigError: numerics that nothing can mean.
        """
        return SchemeSpec(dialect=DIALECT, weight=self.weight.spec(), activation=self._inputs())

    def _inputs(self) -> ActivationSpec | None:
        if self.activation is None:
            return None
        try:
            return ActivationSpec.model_validate(self.activation)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(("activation", *(str(part) for part in first["loc"])))
            raise self.malformed(key, first["input"], f"valid ({first['msg']})") from None


class QuantkitFields(QuantkitWords):
    """The keys of a config."""

    version: int
    groups: list[GroupFields]

    def rules(self) -> LayerRules:
        """Each group's scheme for the layers it lists, 16 bits for all others.

        Raises:
            ConfigError: an entry that is no regular expression; see `GroupFields.spec`.
            UnsupportedScheme: a later version.
        """
        if self.version != VERSION:
            fix = "Serve the checkpoint with the vllm-quantkit that wrote it, or a later one."
            raise self.unserved("version", self.version, f"version {VERSION}", fix)
        return LayerRules(
            rules=tuple(
                LayerRule(pattern=self.regex("layers", name, exact_pattern(name)), scheme=scheme)
                for group in self.groups
                for scheme in (group.spec(),)
                for name in group.layers
            )
        )
