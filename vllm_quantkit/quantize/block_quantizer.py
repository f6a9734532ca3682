"""One decoder block: observed, transformed, rounded, encoded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vllm_quantkit.errors import about
from vllm_quantkit.quantize.calibration import TokenSet
from vllm_quantkit.quantize.layer_rounding import RoundedLayer, install_layer, round_layers
from vllm_quantkit.quantize.methods.transforms import (
    ChannelScales,
    channel_scales,
    fold,
    scaled_stats,
)
from vllm_quantkit.quantize.model.experts import LinearExperts
from vllm_quantkit.quantize.model.model_map import Stage
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.quantize.observation.observing import Watch, observe
from vllm_quantkit.quantize.observation.statistics import InputStats
from vllm_quantkit.quantize.observation.streams import Stream
from vllm_quantkit.quantize.output.records import LayerRecord
from vllm_quantkit.quantize.plan import BlockPlan
from vllm_quantkit.quantize.progress import Phase, Silent
from vllm_quantkit.quantize.recipes.recipe import LayerRecipe


@dataclass(frozen=True)
class Calibration:
    """The calibration set on its way through the model.

    Attributes:
        stream: its hidden states before the block.
        tokens: the set.
        room: bytes that the sums of one pass over the set may take.
        route_all: every expert sees every token.
        true_sequential: a stage sees what the quantised stages before it make.
    """

    stream: Stream
    tokens: TokenSet
    room: int
    route_all: bool
    true_sequential: bool


@dataclass
class BlockQuantizer:
    """Turns the block's weights into codes; the block then computes as the checkpoint will.

    Attributes:
        shell: the model that the block belongs to.
        plan: what becomes of the block.
        block: with weights; changed in place.
        calibration: None where no text is given.
        phase: tells of progress.
        tensors: by checkpoint name, what the block's quantised and changed parameters became.
        records: of the quantised layers.
        coverage: tokens that each expert was sent, by name of the experts.
    """

    shell: ModelShell
    plan: BlockPlan
    block: nn.Module
    calibration: Calibration | None = None
    phase: Phase = Silent().phase
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: dict[str, LayerRecord] = field(default_factory=dict)
    coverage: dict[str, tuple[int, ...]] = field(default_factory=dict)
    _scales_of: dict[str, ChannelScales] = field(default_factory=dict)
    _rounded: list[RoundedLayer] = field(default_factory=list)

    @torch.no_grad()
    def run(self) -> None:
        """Quantises the block.

        Raises:
            QuantkitError: a weight is not finite, or a static scale cannot be trusted; names it.
        """
        seen = self._observe_at_once()
        self._transform(seen)
        for groups in self._portions():
            stats = seen or self._observe(self._group_watches(groups))
            with self.phase("round", len(groups)) as tick:
                for group in groups:
                    self._round_group(group, stats.get(group[0]), scaled=not seen)
                    tick()
            if self.calibration is not None and self.calibration.true_sequential:
                self._install()
        self._install()

    def _observe_at_once(self) -> dict[str, InputStats | None]:
        """Statistics of all stages from one pass, where there is room for all."""
        calibration = self.calibration
        watches = _joined(self._transform_watches(), self._group_watches(self._groups()))
        if calibration is None or calibration.true_sequential:
            return {}
        if sum(watch.nbytes for watch in watches.values()) > calibration.room:
            return {}
        return self._observe(watches)

    def _observe(self, watches: Mapping[str, Watch]) -> dict[str, InputStats | None]:
        calibration = self.calibration
        if calibration is None or not watches:
            return {}
        stream, index = calibration.stream, self.plan.index
        routing = self._routing(calibration.route_all)
        with self.phase("observe", stream.steps) as tick, routing:
            return observe(
                self.block,
                watches,
                lambda: stream.run(index, self.block, tick),
                half=lambda: stream.half,
                expected_rows=calibration.tokens.tokens,
            )

    def _transform_watches(self) -> dict[str, Watch]:
        """By key of a stage, what its transform looks at."""
        return {
            _key(stage): Watch(
                stage.observed or stage.layers[0],
                self.plan.layers[stage.layers[0]].shape.in_features,
                hessian=recipe.transform == "awq",
            )
            for stage, recipe in self.plan.transforming()
            if stage.source is not None
        }

    def _group_watches(self, groups: list[tuple[str, ...]]) -> dict[str, Watch]:
        """By its first layer, what the rounding of each group looks at."""
        watches = {}
        for group in groups:
            quantized = self.plan.quantized(group)
            if quantized:
                width = quantized[0].shape.in_features
                hessian = any(_needs_hessian(layer.recipe) for layer in quantized)
                watches[group[0]] = Watch(group[0], width, hessian=hessian)
        return watches

    def _groups(self) -> list[tuple[str, ...]]:
        return [
            group
            for stage in self.plan.stages
            for group in stage.groups
            if self.plan.quantized(group)
        ]

    def _portions(self) -> Iterator[list[tuple[str, ...]]]:
        """Groups that are observed together: a stage, or as many as there is room for."""
        calibration = self.calibration
        if calibration is not None and calibration.true_sequential:
            for stage in self.plan.stages:
                yield [group for group in stage.groups if self.plan.quantized(group)]
            return
        room = calibration.room if calibration is not None else 0
        portion: list[tuple[str, ...]] = []
        used = 0
        for group in self._groups():
            size = sum(watch.nbytes for watch in self._group_watches([group]).values())
            if portion and calibration is not None and used + size > room:
                yield portion
                portion, used = [], 0
            portion.append(group)
            used += size
        yield portion

    def _transform(self, seen: Mapping[str, InputStats | None]) -> None:
        """Folds every stage's channel scales; the block stays the same function."""
        watches = self._transform_watches()
        if not watches:
            return
        stats = seen or self._observe(watches)
        stages = [found for found in self.plan.transforming() if _key(found[0]) in watches]
        scales = []
        with self.phase("transform", len(stages)) as tick:
            for stage, recipe in stages:
                scales.append(self._scales(stage, recipe, stats[_key(stage)]))
                tick()
        for (stage, _), found in zip(stages, scales, strict=True):
            if found is not None and found.alpha is not None:
                self._fold(stage, found.scales)

    def _scales(
        self, stage: Stage, recipe: LayerRecipe, stats: InputStats | None
    ) -> ChannelScales | None:
        """The scales of a stage's input channels; None where nothing was seen of them."""
        if stats is None:
            return None
        weights = [
            self._weight(name) for name in stage.layers if self.plan.layers[name].recipe is not None
        ]
        with about(self._stored(stage.layers[0])):
            found = channel_scales(weights, stats, recipe, stage.sharing)
        self._scales_of |= dict.fromkeys(stage.layers, found)
        return found

    def _fold(self, stage: Stage, scales: Tensor) -> None:
        source = stage.source
        if source is None:
            return
        readers = [self._weight(name) for name in (*stage.layers, *stage.also)]
        module = self.block.get_submodule(source.module)
        stored = self.shell.stored_dtype
        fold(module, source.kind, readers, scales, stage.sharing, dtype=stored)
        for name in (source.module, *stage.layers, *stage.also):
            self._store_changed(name)

    def _store_changed(self, name: str) -> None:
        """Rounds what will be stored in 16 bits, so that the block computes with what is stored."""
        plan = self.plan.layers.get(name)
        quantized = plan is not None and plan.recipe is not None
        for key, parameter in self.block.get_submodule(name).named_parameters(recurse=False):
            if quantized and key == "weight":
                continue
            stored = parameter.detach().to(self.shell.stored_dtype)
            parameter.copy_(stored)
            self.tensors[f"{self._stored(name)}.{key}"] = stored.cpu()

    def _round_group(
        self, group: tuple[str, ...], stats: InputStats | None, *, scaled: bool
    ) -> None:
        """Rounds a group's layers; `scaled` says that the statistics are of scaled inputs."""
        layers = self.plan.quantized(group)
        scales = self._scales_of.get(group[0])
        folded = None if scales is None or scales.alpha is None else scales.scales
        if stats is not None and folded is not None and not scaled:
            stats = scaled_stats(stats, folded)
        weights = [self._weight(layer.name) for layer in layers]
        for result in round_layers(layers, weights, stats, scales, self.shell.stored_dtype):
            self.tensors.update(result.tensors)
            self.records[result.layer.stored] = result.record
            self._rounded.append(result)

    def _install(self) -> None:
        """The layers rounded so far compute as they are stored."""
        for result in self._rounded:
            install_layer(self.block, result.layer, result.weight, result.inputs)
        self._rounded.clear()

    def _weight(self, name: str) -> Tensor:
        return self.block.get_submodule(name).get_parameter("weight").data

    def _stored(self, name: str) -> str:
        return self.shell.stored_name(f"{self.shell.block_name(self.plan.index)}.{name}")

    def _experts(self) -> Iterator[tuple[str, LinearExperts]]:
        for name, module in self.block.named_modules():
            if isinstance(module, LinearExperts):
                yield name, module

    @contextmanager
    def _routing(self, route_all: bool) -> Iterator[None]:
        """Counts the tokens that the router sends to each expert, whether or not all see all."""
        for _, experts in self._experts():
            experts.counts.zero_()
            experts.route_all = route_all
        yield
        for name, experts in self._experts():
            experts.route_all = False
            self.coverage[self._stored(name)] = tuple(int(count) for count in experts.counts)


def _needs_hessian(recipe: LayerRecipe | None) -> bool:
    return recipe is not None and recipe.rounding != "nearest"


def _key(stage: Stage) -> str:
    """Of a stage's statistics: they are the first group's, unless groups see parts of the input."""
    return f"stage {stage.observed}" if stage.observed else stage.layers[0]


def _joined(first: dict[str, Watch], second: dict[str, Watch]) -> dict[str, Watch]:
    """Both; what is watched twice, is watched once for both."""
    joined = first | second
    for key in first.keys() & second.keys():
        joined[key] = replace(second[key], hessian=first[key].hessian or second[key].hessian)
    return joined
