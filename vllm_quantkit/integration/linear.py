"""One vLLM linear method for every scheme: create, load, pack, apply."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from quantkit_kernels.act_quant import RowQuantizer
from vllm_quantkit.errors import CheckpointError, UnsupportedScheme
from vllm_quantkit.formats import Role
from vllm_quantkit.integration import compat
from vllm_quantkit.integration.context import LoadContext
from vllm_quantkit.integration.loading import LayerLoader
from vllm_quantkit.integration.memory import release_freed
from vllm_quantkit.integration.sharding import RankShare
from vllm_quantkit.integration.warm_up import Kind
from vllm_quantkit.schemes import LinearScheme
from vllm_quantkit.schemes.base import LinearKernel, PackedLayer


class QuantkitLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Serves one layer with one scheme.

    Attributes:
        scheme: the layer's numerics.
        prefix: the layer's name in the model.
        partitions: names of the checkpoint layers merged into this one.
        context: what all layers share while the model loads.
    """

    def __init__(
        self,
        scheme: LinearScheme,
        prefix: str,
        partitions: tuple[str, ...],
        context: LoadContext,
    ) -> None:
        self.scheme = scheme
        self.prefix = prefix
        self.partitions = partitions
        self.context = context
        self._segments: tuple[Segment, ...] = ()

    @property
    def quantizer(self) -> RowQuantizer | None:
        """How the layer quantises its input, which it also takes quantised; None if it does not."""
        if len(self._segments) != 1:
            return None
        return self._segments[0].kernel.quantizer

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs the layer; empty before its weights are loaded."""
        return self._segments[0].kernel.name if self._segments else ""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors as parameters holding this rank's canonical share."""
        self._dtype = params_dtype
        sharded = input_size_per_partition != input_size
        self._share = RankShare(
            prefix=self.prefix,
            partitions=self._partition_names(len(output_partition_sizes)),
            partition_rows=tuple(output_partition_sizes),
            in_start=layer.tp_rank * input_size_per_partition if sharded else 0,
            in_features=input_size_per_partition,
            full_in_features=input_size,
        )
        self.context.check_invariant(self.prefix, self.partitions, self.scheme.spec, params_dtype)
        self._loader = LayerLoader(layer, self.scheme, self._share, self.context)
        self.context.report.expect(self.prefix)
        self._dummy = compat.loads_dummy_weights()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Replace the canonical parameters by the kernel's layout.

        Raises:
            CheckpointError: a tensor is missing or holds values no kernel can use.
            UnsupportedScheme: this rank's share of the layer is one that no kernel multiplies.
        """
        if not self._dummy:
            self._loader.check_complete()
            self.context.report.check_bias(layer, self.partitions)
        parts = self._loader.parts(layer)
        largest = self.context.largest_inputs(self.partitions)
        for name in self._loader.names:
            delattr(layer, name)
        self._segments = tuple(
            self._install(layer, i, self._pack(self._with_stats(canonical, largest)))
            for i, canonical in enumerate(parts)
        )
        self._loader.ledger.received.clear()
        if isinstance(layer, ParallelLMHead) and compat.serves_lora():
            # vLLM places a head's adapters by its weight's device and dtype, and reads no more.
            layer.weight = Parameter(parts[0][Role.SCALES].new_empty(0, dtype=self._dtype), False)
        if self._loader.quantises:
            release_freed()
        self.context.warm_up.add(layer, self._kind(layer))
        self.context.ready(self.prefix, self.kernel)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y = x W^T + b, one product for each range of rows that shares an input order."""
        if len(self._segments) == 1:
            return self._segments[0].apply(layer, x, bias)
        y = torch.cat([segment.apply(layer, x, None) for segment in self._segments], dim=-1)
        return y if bias is None else y + bias

    def _kind(self, layer: Any) -> Kind:
        """What decides which kernels a packed layer launches."""
        owned = layer.named_parameters(recurse=False)
        return Kind(
            kernels=tuple(segment.kernel for segment in self._segments),
            tensors=tuple((name, tensor.dtype, tensor.shape) for name, tensor in owned),
            width=self._share.in_features,
            dtype=self._dtype,
        )

    def _partition_names(self, count: int) -> tuple[str, ...]:
        """A name for each of the rows' `count` partitions, also where one tensor holds them all."""
        if len(self.partitions) == count:
            return self.partitions
        return tuple(f"{self.prefix}[{i}]" for i in range(count))

    def _with_stats(
        self, canonical: dict[Role, Tensor], largest: Tensor | None
    ) -> dict[Role, Tensor]:
        """The canonical tensors, and this rank's share of the statistics if there are any."""
        if largest is None:
            return canonical
        share = self._share.inputs(largest).to(canonical[Role.CODES].device)
        return {**canonical, Role.INPUT_ABSMAX: share}

    def _pack(self, canonical: dict[Role, Tensor]) -> PackedLayer:
        try:
            return self.scheme.pack(canonical, self._dtype)
        except UnsupportedScheme as error:
            raise UnsupportedScheme(f"layer {self.prefix} cannot be served: {error}.") from error
        except ValueError as error:
            raise CheckpointError(
                f"layer {self.prefix} cannot be served: {error}. The checkpoint is damaged: "
                f"download it again, or save the model again."
            ) from error

    def _install(self, layer: Any, index: int, packed: PackedLayer) -> Segment:
        suffix = f"_{index}" if index else ""
        for name, tensor in packed.tensors.items():
            layer.register_parameter(name + suffix, Parameter(tensor, requires_grad=False))
        return Segment(packed.kernel, tuple(packed.tensors), suffix)


class Segment:
    """A range of a layer's rows served by one kernel."""

    def __init__(self, kernel: LinearKernel, names: tuple[str, ...], suffix: str) -> None:
        self.kernel = kernel
        self._attributes = {name: name + suffix for name in names}

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        """The kernel's product, its tensors read from the layer."""
        tensors = {name: getattr(layer, attr) for name, attr in self._attributes.items()}
        return self.kernel.apply(x, tensors, bias)
