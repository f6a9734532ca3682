"""What the writing halves of the dialects share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.spec import ActivationSpec, Dialect, LayerRules, SchemeSpec, WeightSpec

ANY_LAYER = "model.layers.0.mlp.down_proj"
"""Stands for a layer where a scheme is rendered on its own."""


def most_frequent(layers: Mapping[str, SchemeSpec]) -> SchemeSpec:
    """The scheme that most layers have, the first of them where several are as frequent."""
    return Counter(layers.values()).most_common(1)[0][0]


def only_scheme(dialect: Dialect, layers: Mapping[str, SchemeSpec]) -> SchemeSpec:
    """The one scheme of all layers.

    Raises:
        UnsupportedScheme: they have several, which the dialect cannot say.
    """
    first = next(iter(layers))
    for name, scheme in layers.items():
        if scheme != layers[first]:
            raise UnsupportedScheme(
                f"{dialect} holds one scheme for all layers, but {first} has "
                f"{layers[first].describe()} and {name} {scheme.describe()}. Quantise all layers "
                "alike, or use the dialect 'compressed-tensors' or 'quantkit'."
            )
    return layers[first]


def confirmed(scheme: SchemeSpec, rules: LayerRules) -> SchemeSpec:
    """`scheme`, if `rules`, read from what was rendered for `ANY_LAYER`, say all of it.

    Raises:
        UnsupportedScheme: they say something else.
    """
    if rules.scheme_for(ANY_LAYER) != scheme:
        raise cannot_store(scheme.dialect, scheme.weight, scheme.activation)
    return scheme


def cannot_store(
    dialect: Dialect, weight: WeightSpec, activation: ActivationSpec | None, holds: str = ""
) -> UnsupportedScheme:
    """The error of numerics that a dialect has no words for."""
    seen = ", ".join(f"{key} {value!r}" for key, value in weight)
    inputs = "16-bit activations" if activation is None else activation.describe()
    reason = f": it holds {holds}" if holds else ""
    return UnsupportedScheme(
        f"{dialect} cannot store weights of {seen} with {inputs}{reason}. Choose other numerics, "
        "or the dialect 'quantkit', which stores all that quantkit serves."
    )


def not_written(dialect: Dialect) -> UnsupportedScheme:
    """The error of a dialect that is read, but that nothing is quantised to."""
    return UnsupportedScheme(
        f"{dialect} checkpoints are read, but not written by the quantiser. Use the dialect "
        "'compressed-tensors', 'gptq', 'awq' or 'quantkit'."
    )
