"""What a compressed-tensors config says: groups of layers, and what they leave out."""

from __future__ import annotations

from typing import Any

from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.formats._compressed_tensors_activations import ActivationFields
from vllm_quantkit.formats._compressed_tensors_weights import (
    CODE_TYPES,
    DIALECT,
    FORMAT_WORDS,
    PACKED,
    CtFields,
    WeightFields,
)
from vllm_quantkit.formats._fields import as_pattern
from vllm_quantkit.spec import LayerRule, LayerRules, SchemeSpec

LINEAR = "Linear"
"""The one module class that targets may name."""

IN_TREE = "Serve the checkpoint without --quantization."


class GroupFields(CtFields):
    """A scheme and the layers that have it."""

    targets: list[str]
    weights: WeightFields
    input_activations: ActivationFields | None = None
    output_activations: dict[str, Any] | None = None
    format: str | None = None

    def spec(self, default_format: str) -> SchemeSpec:
        """The group's scheme.

        Raises:
            ConfigError: see `WeightFields.spec` and `ActivationFields.spec`.
            UnsupportedScheme: another format, or numerics that are not served in this one.
        """
        stored = self.format or default_format
        if self.output_activations is not None:
            raise self.unserved(
                "output_activations", self.output_activations, "null for it", IN_TREE
            )
        if stored not in CODE_TYPES:
            fix = (
                f"Save the model again with format {PACKED!r}, or serve it without --quantization."
            )
            raise self.unserved("format", stored, FORMAT_WORDS, fix)
        weight, activation = self.weights.spec(stored), None
        if self.input_activations is not None:
            if stored == PACKED:
                seen = self.input_activations.model_dump(exclude_unset=True)
                served = f"16-bit activations (null) in format {PACKED!r}"
                raise self.unserved("input_activations", seen, served, IN_TREE)
            activation = self.input_activations.spec(weight)
        return SchemeSpec(dialect=DIALECT, weight=weight, variant=stored, activation=activation)


class ConfigFields(CtFields):
    """The keys of a config that decide what is stored how."""

    config_groups: dict[str, GroupFields]
    format: str = PACKED
    ignore: list[str] | None = None
    kv_cache_scheme: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None

    def refuse_extras(self) -> None:
        """Refuse what changes the meaning of the weights and is not served.

        Raises:
            UnsupportedScheme: a KV cache scheme, transforms, or weights stored sparsely.
        """
        advice = {
            "kv_cache_scheme": "Remove the key and choose the KV cache with --kv-cache-dtype.",
            "transform_config": IN_TREE,
            "sparsity_config": "Save the model again without sparse compression.",
        }
        for key, fix in advice.items():
            value = getattr(self, key)
            if value and not (key == "sparsity_config" and value.get("format") == "dense"):
                raise self.unserved(key, value, "null for it", fix)

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
        raise CtFields.unserved(
            key,
            name,
            "layer names, 're:' regular expressions and the class 'Linear'",
            "Name the layers instead of their class.",
        )
    return CtFields.regex(key, name, as_pattern(name))
