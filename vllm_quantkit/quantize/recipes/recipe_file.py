"""A recipe as a user writes it: options for the model, and rules for layers by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.quantize.recipes.presets import KEEP, PRESETS, LayerOptions
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe

OutputFormat = Literal["compressed-tensors", "awq", "gptq", "quantkit"]
"""Dialects that can be written."""


class LayerRule(LayerOptions):
    """Options of the layers whose checkpoint name matches.

    Attributes:
        match: whole names, or regular expressions behind `re:` that match from the start.
    """

    match: tuple[str, ...] = Field(min_length=1)

    @field_validator("match", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            try:
                re.compile(entry.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"{entry!r} is no regular expression: {error}") from error
        return value

    def matches(self, name: str) -> bool:
        """True where an entry is the name, or its expression matches it from the start."""
        return any(
            re.match(entry[3:], name) is not None if entry.startswith("re:") else entry == name
            for entry in self.match
        )


class Recipe(LayerOptions):
    """How a model is quantised.

    Attributes:
        layers: rules, of which the first that matches a layer wins; they change the options above.
        format: dialect of the checkpoint.
        true_sequential: inside a block, each stage is calibrated on what the quantised stages
            before it make of the text; else only the blocks before it are quantised.
        route_all: mixture of experts: during calibration every expert sees every token.
    """

    layers: tuple[LayerRule, ...] = ()
    format: OutputFormat = "compressed-tensors"
    true_sequential: bool = False
    route_all: bool = False

    @property
    def needs_data(self) -> bool:
        """True where the options or a rule ask for what is made from activations."""
        recipes = (options.recipe() for options in (self, *(r.over(self) for r in self.layers)))
        return any(recipe is not None and recipe.uses_data for recipe in recipes)

    def layer_options(self, name: str) -> LayerOptions:
        """The options of the layer with this checkpoint name."""
        for rule in self.layers:
            if rule.matches(name):
                return rule.over(self)
        return LayerOptions().over(self)

    def layer_recipe(self, name: str) -> LayerRecipe | None:
        """What to do with the layer of this checkpoint name; None leaves it in 16 bits.

        Raises:
            ConfigError: an option does not fit its scheme.
        """
        return self.layer_options(name).recipe()


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a YAML recipe, not yet validated: command-line options go over them.

    Raises:
        ConfigError: the file cannot be read, or is no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"the recipe {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"the recipe {path} holds {type(content).__name__}, but must be a mapping such as "
            "'scheme: awq'."
        )
    return content


def make_recipe(keys: dict[str, Any]) -> Recipe:
    """A validated recipe.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    try:
        recipe = Recipe(**keys)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the recipe"
        known = ", ".join(Recipe.model_fields)
        hint = f" Known keys: {known}." if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{where} = {first['input']!r}: {first['msg']}.{hint}") from error
    if recipe.scheme is None:
        raise ConfigError(
            f"no scheme was chosen: give one of {', '.join(PRESETS)} (or {KEEP}, with rules that "
            "choose one for some layers)."
        )
    for options in (recipe, *(rule.over(recipe) for rule in recipe.layers)):
        options.recipe()
    return recipe
