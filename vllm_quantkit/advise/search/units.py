"""What must be quantised alike, and what each way of quantising it takes and costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_quantkit.advise.search.ways import Way
from vllm_quantkit.quantize.model.model_map import Stage
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.quantize.plan import EXPERT, LayerPlan, Plan, make_plan, stored_bytes
from vllm_quantkit.quantize.recipes.presets import KEEP, LayerOptions
from vllm_quantkit.quantize.recipes.recipe_file import OutputFormat, make_recipe
from vllm_quantkit.spec import PER_CHANNEL, SchemeSpec

SIXTEEN_BITS = "16 bits"


@dataclass(frozen=True)
class Layer:
    """One linear layer of a unit.

    Attributes:
        name: in the checkpoint.
        weights: their number.
    """

    name: str
    weights: int


@dataclass(frozen=True)
class UnitOption:
    """One way to quantise a unit.

    Attributes:
        way: its name; `SIXTEEN_BITS` for none.
        options: of the recipe, group sizes spelt out.
        nbytes: of the unit's tensors in the checkpoint.
        loss: KL divergence that it adds, nats.
        spec: how layers are stored; None in 16 bits.
    """

    way: str
    options: LayerOptions
    nbytes: int
    loss: float
    spec: SchemeSpec | None


@dataclass(frozen=True)
class Unit:
    """Layers that must be quantised alike.

    Attributes:
        block: number of their decoder block.
        layers: at least one.
        options: 16 bits, and each way that was measured for all of its layers.
    """

    block: int
    layers: tuple[Layer, ...]
    options: tuple[UnitOption, ...]

    @property
    def weights(self) -> int:
        """Of all layers."""
        return sum(layer.weights for layer in self.layers)


def units_of(shell: ModelShell, ways: Sequence[Way], fmt: OutputFormat) -> tuple[Unit, ...]:
    """Every unit of the model with its options, sized as the format stores them.

    Raises:
        UnsupportedScheme: the format cannot store one of the ways.
        ConfigError: a way does not fit the model.
    """
    plans = [_plan(shell, way, fmt) for way in ways]
    found = []
    for index in range(shell.block_count):
        prefix = shell.block_name(index)
        shapes = shell.linears(index)
        for names in alike(shell.stages(index)):
            layers = tuple(
                Layer(
                    shell.stored_name(f"{prefix}.{name}"),
                    shapes[name].out_features * shapes[name].in_features,
                )
                for name in names
            )
            found.append(Unit(index, layers, tuple(_options(layers, ways, plans))))
    return tuple(found)


def alike(stages: Sequence[Stage]) -> Iterator[tuple[str, ...]]:
    """Names of a block's layers that must have one scheme, group by group.

    Layers that engines merge are alike, so are those that share the channels' scales of what they
    read, and so are all experts, which one kernel multiplies.
    """
    groups: list[list[str]] = []
    experts: list[str] = []
    for stage in stages:
        parts = [list(stage.layers)] if stage.source is not None else map(list, stage.groups)
        for part in parts:
            if any(EXPERT.search(f".{name}") for name in part):
                experts += part
            else:
                groups.append(part)
    if experts:
        groups.append(experts)
    return (tuple(group) for group in groups)


def _options(
    layers: Sequence[Layer], ways: Sequence[Way], plans: Sequence[Mapping[str, LayerPlan]]
) -> Iterator[UnitOption]:
    whole = 2 * sum(layer.weights for layer in layers)
    yield UnitOption(SIXTEEN_BITS, LayerOptions(scheme=KEEP), whole, 0.0, None)
    for way, plan in zip(ways, plans, strict=True):
        losses = way.losses()
        if all(layer.name in losses and layer.name in plan for layer in layers):
            first = plan[layers[0].name]
            yield UnitOption(
                way=way.name,
                options=_explicit(way.options, first.scheme),
                nbytes=sum(stored_bytes(plan[layer.name]) for layer in layers),
                loss=sum(losses[layer.name] for layer in layers),
                spec=first.scheme,
            )


def _plan(shell: ModelShell, way: Way, fmt: OutputFormat) -> dict[str, LayerPlan]:
    """Every layer as it would be if the whole model were quantised so."""
    keys = {**way.options.model_dump(exclude_none=True), "format": fmt}
    plan: Plan = make_plan(shell, make_recipe(keys))
    return {layer.stored: layer for layer in plan.layers}


def _explicit(options: LayerOptions, spec: SchemeSpec | None) -> LayerOptions:
    """With the group size of the pure plan: that of a mixture may be another."""
    grouped = spec is not None and spec.weight.code_type == "int"
    if spec is None or not grouped or spec.weight.group_size == PER_CHANNEL:
        return options
    return options.model_copy(update={"group_size": spec.weight.group_size})
