"""How a rule about vLLM is written down: when it applies, and what it says."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_quantkit.check.plain.layer import PlainLayer, Product
from vllm_quantkit.check.release import Release
from vllm_quantkit.check.report import Answer
from vllm_quantkit.hardware.device import Device, Kind
from vllm_quantkit.spec import PER_CHANNEL, Frozen


class When(Frozen):
    """Layers, devices and releases that a rule is about; None for any.

    Attributes:
        methods: `quant_method` of the checkpoint.
        variants: layouts of the dialect.
        products: what is multiplied.
        bits: of a weight's code.
        symmetric: weights without zero-points.
        act_order: an order of channels stored with the checkpoint, of groups.
        code_types: what a code stands for.
        per_token_and_channel: scales per output channel, and dynamic ones per token.
        dtypes: of activations.
        experts: layers of a mixture's experts.
        kind: of device.
        least, most: 10 * compute capability, both included.
        lacks: a CPU without this instruction set.
        since, until: releases, both included.
    """

    methods: tuple[str, ...] | None = None
    variants: tuple[str, ...] | None = None
    products: tuple[Product, ...] | None = None
    bits: tuple[int, ...] | None = None
    symmetric: bool | None = None
    act_order: bool | None = None
    code_types: tuple[str, ...] | None = None
    per_token_and_channel: bool | None = None
    dtypes: tuple[str, ...] | None = None
    experts: bool | None = None
    kind: Kind | None = None
    least: int | None = None
    most: int | None = None
    lacks: str | None = None
    since: Release | None = None
    until: Release | None = None

    def applies(self, layer: PlainLayer, device: Device, release: Release) -> bool:
        """True where the rule is about such a layer there."""
        return all(self._of_layer(layer)) and all(self._of_device(device)) and self._covers(release)

    def _of_layer(self, layer: PlainLayer) -> Iterator[bool]:
        yield self.methods is None or layer.method in self.methods
        yield self.products is None or layer.product in self.products
        yield self.dtypes is None or layer.dtype in self.dtypes
        yield self.experts in (None, layer.expert)
        yield self.per_token_and_channel in (None, layer.per_token_and_channel)
        spec = layer.spec
        if spec is None:
            wanted = (self.variants, self.bits, self.symmetric, self.act_order, self.code_types)
            yield wanted == (None,) * len(wanted)
            return
        weight = spec.weight
        ordered = weight.act_order and weight.group_size != PER_CHANNEL
        yield self.variants is None or spec.variant in self.variants
        yield self.bits is None or weight.bits in self.bits
        yield self.symmetric in (None, weight.symmetric)
        yield self.act_order in (None, ordered)
        yield self.code_types is None or weight.code_type in self.code_types

    def _of_device(self, device: Device) -> Iterator[bool]:
        yield self.kind in (None, device.kind)
        yield self.lacks is None or self.lacks not in device.isa
        if self.least is not None or self.most is not None:
            major, minor = device.capability or (0, 0)
            yield (self.least or 0) <= 10 * major + minor <= (self.most or 1000)

    def _covers(self, release: Release) -> bool:
        first, last = self.since or release, self.until or release
        return first <= release <= last


class Needs(Frozen):
    """What a kernel asks of a layer that it is about.

    Attributes:
        types: (bits, symmetric) of integer weights; empty for any.
        group_sizes: input channels per scale, -1 for all; empty for any.
        even_groups: they are even.
        dtypes: of activations; empty for any.
        in_multiple, out_multiple: a rank's channels are multiples of these.
        whole_groups: no group is cut by a rank.
        whole_order: no rank has a share of the inputs where their order is stored.
        block: rows and columns of a block of weights, or None for any.
    """

    types: tuple[tuple[int, bool], ...] = ()
    group_sizes: tuple[int, ...] = ()
    even_groups: bool = False
    dtypes: tuple[str, ...] = ()
    in_multiple: int = 1
    out_multiple: int = 1
    whole_groups: bool = False
    whole_order: bool = False
    block: tuple[int, int] | None = None

    def unmet(self, layer: PlainLayer) -> Iterator[str]:
        """What the layer lacks, in words."""
        yield from self._of_sizes(layer)
        if layer.spec is None:
            return
        weight = layer.spec.weight
        if self.types and (weight.bits, weight.symmetric) not in self.types:
            kind = "without" if weight.symmetric else "with"
            yield f"{weight.bits} bits {kind} zero-points"
        if self.group_sizes and weight.group_size not in self.group_sizes:
            yield f"groups of {weight.group_size}"
        if self.even_groups and weight.group_size % 2 and weight.group_size != PER_CHANNEL:
            yield f"groups of {weight.group_size}"
        if self.whole_order and weight.act_order and layer.splits_inputs:
            yield "a stored order of channels that ranks share"
        if self.block and (weight.scale_rows, weight.group_size) != self.block:
            yield f"blocks of {weight.scale_rows}x{weight.group_size}"

    def _of_sizes(self, layer: PlainLayer) -> Iterator[str]:
        inputs, outputs = layer.rank_shape.in_features, layer.rank_shape.out_features
        if self.dtypes and layer.dtype not in self.dtypes:
            yield f"activations of {layer.dtype}"
        if inputs % self.in_multiple:
            yield f"{inputs} input channels, no multiple of {self.in_multiple}"
        if outputs % self.out_multiple:
            yield f"{outputs} output channels, no multiple of {self.out_multiple}"
        group = PER_CHANNEL if layer.spec is None else layer.spec.weight.group_size
        if self.whole_groups and 0 < group < layer.shape.in_features and inputs % group:
            yield f"{inputs} input channels a rank, which cut a group of {group}"


class Verdict(Frozen):
    """What is known of all layers that a rule is about, whatever their sizes.

    Attributes:
        when: those layers.
        answer: `no`, or `unknown`.
        reason: why.
        source: vLLM's file.
    """

    when: When
    answer: Answer
    reason: str
    source: str


class Kernel(Frozen):
    """A kernel that vLLM picks for layers that have what it needs.

    Attributes:
        family: its name.
        when: layers that vLLM considers it for.
        needs: what it asks of them.
        reason: said where it is picked.
        source: vLLM's file.
    """

    family: str
    when: When
    needs: Needs = Needs()
    reason: str
    source: str
