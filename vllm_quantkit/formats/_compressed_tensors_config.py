"""What a compressed-tensors config says: groups of layers, and what they leave out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.formats._fields import Fields, as_pattern
from vllm_quantkit.spec import PER_CHANNEL, LayerRule, LayerRules, SchemeSpec, WeightSpec

DIALECT: Literal["compressed-tensors"] = "compressed-tensors"
FORMAT = "pack-quantized"
LINEAR = "Linear"
"""The one module class that targets may name."""

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


class _Fields(Fields):
    dialect: ClassVar[str] = DIALECT
    allowed: ClassVar[Mapping[str, str]] = {
        "num_bits": "an integer from 2 to 8",
        "type": "'int'",
        "symmetric": "true or false",
        "strategy": "'group' or 'channel'",
        "group_size": "a positive integer with strategy 'group', else null or -1",
        "actorder": "null, 'group' or 'weight'",
        "targets": "a list of 'Linear', layer names and 're:' regular expressions",
        "weights": "an object with num_bits, strategy and so on",
        "input_activations": "null or an object",
        "output_activations": "null or an object",
        "config_groups": "an object of groups, each with 'targets' and 'weights'",
        "format": "'pack-quantized'",
        "ignore": "a list of layer names and 're:' regular expressions, or null",
        "kv_cache_scheme": "null or an object",
    }


class WeightFields(_Fields):
    """How the weights of one group are quantised."""

    num_bits: int = Field(ge=1)
    type: str = "int"
    symmetric: bool = True
    strategy: Literal["tensor", "channel", "group", "block", "token", "tensor_group"] | None = None
    group_size: int | None = Field(None, ge=-1)
    actorder: Literal["group", "weight", "dynamic", "static"] | bool | None = None

    def spec(self) -> SchemeSpec:
        """These numerics.

        Raises:
            ConfigError: strategy and group size contradict each other.
            UnsupportedScheme: not 2 to 8 bit integers in groups or channels.
        """
        if self.type.lower() != "int":
            raise self.unserved(
                "type",
                self.type,
                "'int'",
                "Serve the checkpoint without --quantization: vLLM has float formats in-tree.",
            )
        weight = WeightSpec(
            bits=served_bits(self.num_bits),
            group_size=self._group_size(),
            symmetric=self.symmetric,
            act_order=ACT_ORDERS[self.actorder] and self._group_size() != PER_CHANNEL,
        )
        return SchemeSpec(dialect=DIALECT, weight=weight, variant=FORMAT)

    def _group_size(self) -> int:
        grouped = self.group_size is not None and self.group_size > 0
        inferred = "group" if grouped else "channel" if self.group_size == -1 else "tensor"
        strategy = self.strategy or inferred
        if strategy not in ("group", "channel"):
            raise self.unserved(
                "strategy",
                strategy,
                "'group' and 'channel'",
                "Quantise again with strategy 'channel'.",
            )
        if self.group_size == 0 or grouped != (strategy == "group"):
            raise self.malformed("group_size", self.group_size, self.allowed["group_size"])
        return self.group_size if grouped and self.group_size else PER_CHANNEL


class GroupFields(_Fields):
    """A scheme and the layers that have it."""

    targets: list[str]
    weights: WeightFields
    input_activations: dict[str, Any] | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None

    def spec(self, default_format: str) -> SchemeSpec:
        """The group's scheme.

        Raises:
            ConfigError: see `WeightFields.spec`.
            UnsupportedScheme: another format, or quantised activations.
        """
        stored = self.format or default_format
        for key in ("input_activations", "output_activations"):
            if getattr(self, key) is not None:
                raise self.unserved(
                    key,
                    getattr(self, key),
                    "16-bit activations (null) in this format",
                    "Serve the checkpoint without --quantization: vLLM has W8A8 in-tree.",
                )
        if stored != FORMAT:
            raise self.unserved(
                "format",
                stored,
                f"{FORMAT!r}",
                f"Save the model again with format {FORMAT!r}, or serve it without --quantization.",
            )
        return self.weights.spec()


class ConfigFields(_Fields):
    """The keys of a config that decide what is stored how."""

    config_groups: dict[str, GroupFields]
    format: str = FORMAT
    ignore: list[str] | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None

    def refuse_extras(self) -> None:
        """Refuse what changes the meaning of the weights and is not served.

        Raises:
            UnsupportedScheme: a KV cache scheme, transforms or sparsity.
        """
        advice = {
            "kv_cache_scheme": "Remove the key and choose the KV cache with --kv-cache-dtype.",
            "transform_config": "Serve the checkpoint without --quantization.",
            "sparsity_config": "Save the model again without sparse compression.",
        }
        for key, fix in advice.items():
            if getattr(self, key):
                raise self.unserved(key, getattr(self, key), "null for it", fix)

    def rules(self) -> LayerRules:
        """Each group's scheme for its targets, but 16 bits for what `ignore` names.

        Raises:
            ConfigError: see `GroupFields.spec`; or an entry that is no regular expression.
            UnsupportedScheme: see `GroupFields.spec` and `refuse_extras`.
        """
        self.refuse_extras()
        ignore = self.ignore or []
        targets = _targets(self)
        linear = None if LINEAR in ignore else targets.pop(LINEAR, None)
        kept = [LayerRule(pattern=_pattern("ignore", name), scheme=None) for name in ignore]
        chosen = [
            LayerRule(pattern=_pattern("targets", name), scheme=targets[name])
            for name in sorted(targets, key=lambda name: name.startswith("re:"))
        ]
        return LayerRules(rules=(*kept, *chosen), default=linear, lm_head=linear)


def _targets(fields: ConfigFields) -> dict[str, SchemeSpec]:
    """Target to scheme; the last group that names a target has it, as in the library."""
    found: dict[str, SchemeSpec] = {}
    for name, group in fields.config_groups.items():
        if all(target.endswith("Attention") for target in group.targets):
            continue  # such a group describes the KV cache
        try:
            spec = group.spec(fields.format)
        except QuantkitError as error:
            raise type(error)(f"In the group {name!r} of 'config_groups': {error}") from None
        for target in group.targets:
            found[target] = spec
    return found


def _pattern(key: str, name: str) -> str:
    if name[:1].isupper() and "." not in name and name != LINEAR:
        raise _Fields.unserved(
            key,
            name,
            "layer names, 're:' regular expressions and the class 'Linear'",
            "Name the layers instead of their class.",
        )
    return _Fields.regex(key, name, as_pattern(name))


def served_bits(bits: int) -> int:
    """`bits` if the dialect stores it.

    Raises:
        UnsupportedScheme: it does not.
    """
    if not 2 <= bits <= 8:
        raise _Fields.unserved("num_bits", bits, "2 to 8 bits", "Quantise again with 4 or 8 bits.")
    return bits
