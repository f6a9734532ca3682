"""What will be done to each layer, decided and checked before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.formats import get_format
from vllm_quantkit.quantize.model.model_map import Stage
from vllm_quantkit.quantize.output.checkpoint import quantization_config
from vllm_quantkit.quantize.recipes.presets import GROUP, LayerOptions
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe
from vllm_quantkit.quantize.recipes.recipe_file import Recipe
from vllm_quantkit.spec import PER_CHANNEL, LayerShape, SchemeSpec

if TYPE_CHECKING:
    from vllm_quantkit.quantize.model.model_shell import ModelShell

EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the names of layers of which a block has many alike."""

GROUP_SIZES = (GROUP, 64, 32)
"""Tried in turn where the user names no group size."""


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one linear layer.

    Attributes:
        name: inside its block.
        stored: in the checkpoint.
        shape: of its weight.
        recipe: what is done; None leaves it in 16 bits.
        scheme: how it is stored.
    """

    name: str
    stored: str
    shape: LayerShape
    recipe: LayerRecipe | None
    scheme: SchemeSpec | None


@dataclass(frozen=True)
class BlockPlan:
    """What becomes of one decoder block: its layers by name, and the stages they run in."""

    index: int
    layers: Mapping[str, LayerPlan]
    stages: tuple[Stage, ...]

    def quantized(self, group: tuple[str, ...]) -> tuple[LayerPlan, ...]:
        """The layers of a group that do not stay in 16 bits."""
        return tuple(self.layers[name] for name in group if self.layers[name].recipe is not None)

    def transforming(self) -> Iterator[tuple[Stage, LayerRecipe]]:
        """Stages whose input channels are scaled, with the recipe that says how."""
        for stage in self.stages:
            for name in stage.layers:
                recipe = self.layers[name].recipe
                if recipe is not None and recipe.transform != "none":
                    yield stage, recipe
                    break


@dataclass(frozen=True)
class Plan:
    """What becomes of the whole model.

    Attributes:
        recipe: as the user gave it.
        blocks: in order.
        config: the checkpoint's `quantization_config`.
        warnings: what the user should know before it runs; full sentences.
    """

    recipe: Recipe
    blocks: tuple[BlockPlan, ...]
    config: Mapping[str, Any]
    warnings: tuple[str, ...]

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Every layer that is quantised."""
        return tuple(
            layer
            for block in self.blocks
            for layer in block.layers.values()
            if layer.recipe is not None
        )

    @property
    def schemes(self) -> dict[str, SchemeSpec]:
        """Checkpoint name of every quantised layer to how it is stored."""
        return _schemes(self.blocks)

    @property
    def needs_data(self) -> bool:
        """True where a layer cannot be quantised without calibration text."""
        return any(layer.recipe is not None and layer.recipe.uses_data for layer in self.layers)


def make_plan(shell: ModelShell, recipe: Recipe) -> Plan:
    """Decides every layer's recipe and storage.

    Raises:
        ConfigError: a rule matches nothing, cuts through layers that engines merge, or an option
            does not fit.
        UnsupportedScheme: the dialect cannot store what the recipe asks for.
    """
    group = _default_group(shell, recipe)
    blocks = tuple(_plan_block(shell, recipe, index, group) for index in range(shell.block_count))
    _refuse_idle_rules(recipe, blocks)
    inside = (
        layer.stored for block in blocks for layer in block.layers.values() if layer.recipe is None
    )
    never = (name for index in range(shell.block_count) for name in shell.kept(index))
    schemes = _schemes(blocks)
    if not schemes:
        raise ConfigError("the recipe leaves every layer in 16 bits: choose a scheme for some.")
    ignored = tuple(dict.fromkeys((*shell.outside(), *inside, *never)))
    warnings = tuple(_warnings(shell, blocks, group))
    return Plan(recipe, blocks, quantization_config(schemes, ignored), warnings)


def _schemes(blocks: tuple[BlockPlan, ...]) -> dict[str, SchemeSpec]:
    return {
        layer.stored: layer.scheme
        for block in blocks
        for layer in block.layers.values()
        if layer.scheme is not None
    }


def _plan_block(shell: ModelShell, recipe: Recipe, index: int, group: int) -> BlockPlan:
    layers = {}
    for name, stored, shape in _named(shell, index):
        chosen = _with_group(recipe.layer_options(stored), group).recipe()
        layers[name] = LayerPlan(name, stored, shape, chosen, _storage(recipe, stored, chosen))
    stages = shell.stages(index)
    for stage in stages:
        _check_stage(stage, layers)
    _check_experts(layers)
    return BlockPlan(index, layers, stages)


def _named(shell: ModelShell, index: int) -> Iterator[tuple[str, str, LayerShape]]:
    """Name in the block, name in the checkpoint and shape of each linear layer of a block."""
    prefix = shell.block_name(index)
    for name, shape in shell.linears(index).items():
        yield name, shell.stored_name(f"{prefix}.{name}"), shape


def _has_default_group(options: LayerOptions) -> bool:
    """True where groups of the default size were not asked for, but come with the scheme."""
    chosen = options.recipe()
    if chosen is None or options.group_size is not None or chosen.weight.code_type != "int":
        return False
    return chosen.weight.group_size != PER_CHANNEL


def _with_group(options: LayerOptions, group: int) -> LayerOptions:
    return options.model_copy(update={"group_size": group} if _has_default_group(options) else {})


def _default_group(shell: ModelShell, recipe: Recipe) -> int:
    """The first of `GROUP_SIZES` that divides the width of every layer that uses the default."""
    widths = {
        shape.in_features
        for index in range(shell.block_count)
        for _, stored, shape in _named(shell, index)
        if _has_default_group(recipe.layer_options(stored))
    }
    fitting = (size for size in GROUP_SIZES if all(width % size == 0 for width in widths))
    return next(fitting, GROUP)


def _storage(recipe: Recipe, stored: str, chosen: LayerRecipe | None) -> SchemeSpec | None:
    if chosen is None:
        return None
    try:
        return get_format(recipe.format).scheme(chosen.weight, chosen.activation)
    except UnsupportedScheme as error:
        raise UnsupportedScheme(f"{stored}: {error}") from error


def _check_stage(stage: Stage, layers: Mapping[str, LayerPlan]) -> None:
    """Refuses groups whose layers differ, and stages with two transforms."""
    for group in stage.groups:
        first, *others = (layers[name] for name in group)
        for other in others:
            if other.scheme != first.scheme or other.recipe != first.recipe:
                raise ConfigError(
                    f"{first.stored} and {other.stored} are one layer in serving engines, so they "
                    f"must be quantised alike, but the recipe gives them {_words(first)} and "
                    f"{_words(other)}: let the rule match {', '.join(group)} together."
                )
    recipes = [recipe for name in stage.layers if (recipe := layers[name].recipe) is not None]
    transforms = {(recipe.transform, recipe.alpha) for recipe in recipes}
    if len(transforms) > 1 and stage.source is not None:
        raise ConfigError(
            f"{', '.join(layers[name].stored for name in stage.layers[:4])} read the same input, "
            f"so one transform must serve them all, but the recipe names "
            f"{' and '.join(sorted(kind for kind, _ in transforms))}: use one scheme for them."
        )


def _check_experts(layers: Mapping[str, LayerPlan]) -> None:
    """Refuses experts of one block that differ: engines multiply them all by one kernel."""
    experts = [layer for name, layer in layers.items() if EXPERT.search(name)]
    for expert in experts[1:]:
        if expert.scheme != experts[0].scheme:
            raise ConfigError(
                f"serving engines keep all experts of a block in one tensor, but the recipe gives "
                f"{experts[0].stored} {_words(experts[0])} and {expert.stored} {_words(expert)}: "
                "let the rule match all of them."
            )


def _words(layer: LayerPlan) -> str:
    return "16 bits" if layer.scheme is None else layer.scheme.describe()


def _refuse_idle_rules(recipe: Recipe, blocks: tuple[BlockPlan, ...]) -> None:
    names = [layer.stored for block in blocks for layer in block.layers.values()]
    for rule in recipe.layers:
        if not any(rule.matches(name) for name in names):
            raise ConfigError(
                f"the rule for {', '.join(rule.match)} matches no layer; layers are called "
                f"{', '.join(names[:3])} and so on."
            )


def _warnings(shell: ModelShell, blocks: tuple[BlockPlan, ...], group: int) -> Iterator[str]:
    planned = [layer for block in blocks for layer in block.layers.values() if layer.recipe]
    transformed = any(layer.recipe and layer.recipe.transform != "none" for layer in planned)
    if shell.loss and transformed:
        yield shell.loss
    uneven = [
        layer
        for layer in planned
        if layer.scheme and layer.scheme.is_packed and _is_uneven(layer.shape, layer.scheme)
    ]
    if uneven:
        width = uneven[0].scheme.weight.group_size if uneven[0].scheme else 0
        yield (
            f"{len(uneven)} layers such as {uneven[0].stored} have {uneven[0].shape.in_features} "
            f"input channels, not a multiple of the group size {width}: quantkit serves them, "
            "vLLM without it does not."
        )
    sizes = {layer.scheme.weight.group_size for layer in planned if layer.scheme}
    if group != GROUP and group in sizes:
        yield (
            f"groups have {group} input channels, because {GROUP} does not divide the width of "
            "every layer; --group-size chooses another size."
        )


def _is_uneven(shape: LayerShape, scheme: SchemeSpec) -> bool:
    size = scheme.weight.group_size
    return size != PER_CHANNEL and shape.in_features % size != 0


def stored_bytes(layer: LayerPlan) -> int:
    """Bytes of the layer's tensors in the checkpoint, in 16 bits where it is not quantised."""
    if layer.scheme is None:
        return 2 * layer.shape.out_features * layer.shape.in_features
    tensors = get_format(layer.scheme.dialect).tensors(layer.scheme, layer.shape)
    return sum(prod(tensor.shape) * tensor.dtypes[0].itemsize for tensor in tensors)
