"""Every kernel of the linear layers is compiled while the model loads, so no request waits for one.

Triton compiles a kernel anew for other constants and dtypes, and where an integer or an address
becomes a multiple of 16. For a packed layer all this follows from the bucket of its tokens (see
`quantkit_kernels.tuning`), or is the same for every token: a run for each bucket compiles all that
the layer will ever launch.

It happens when the last layer is packed. Only then is it known which norms quantise for which
layer, and later would be too late: what follows is a forward pass that vLLM takes the peak memory
of, then CUDA graphs, in whose capture no kernel can be loaded, and then `--jit-monitor-mode`, with
which vLLM reports or refuses (`error`) whatever is compiled after that. Scratch tensors are free
again before vLLM looks at the memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.model_loader.utils import device_loading_context

from quantkit_kernels.tuning import bucket_starts
from vllm_quantkit.integration.blocks import Feed
from vllm_quantkit.integration.fusion import SILU
from vllm_quantkit.schemes.base import LinearKernel

logger = init_logger("vllm.quantkit")


@dataclass(frozen=True)
class Kind:
    """What layers that launch the same kernels have in common.

    Attributes:
        kernels: of the layer's ranges of rows.
        tensors: name, dtype and shape of all that the layer owns.
        width: K, the channels of its input.
        dtype: of its input.
    """

    kernels: tuple[LinearKernel, ...]
    tensors: tuple[tuple[str, torch.dtype, torch.Size], ...]
    width: int
    dtype: torch.dtype


class WarmUp:
    """Collects the packed layers of a model, then runs one of each kind."""

    def __init__(self, device: torch.device) -> None:
        """On devices whose kernels are not compiled at their first launch, nothing is to do.

        Raises:
            TableError: a table of measured tiles for this GPU is damaged; no weight is read yet.
        """
        self._device = device
        self._compiles = compiles_at_launch(device)
        self._layers: list[tuple[Any, Kind]] = []
        self._done: set[tuple[Kind, str]] = set()
        if self._compiles:
            read_tables(device)

    def add(self, layer: Any, kind: Kind) -> None:
        """A layer is packed."""
        if self._compiles:
            self._layers.append((layer, kind))

    def run(self, method: str, feeds: Iterable[Feed], most: int) -> None:
        """Launch all that layers launch for up to `most` tokens; of each kind once.

        Args:
            method: for the log.
            feeds: modules that quantise for one of the layers.
            most: tokens of the largest batch.
        """
        started, before = time.perf_counter(), len(self._done)
        sources = {id(feed.linear): feed.source for feed in feeds}
        for layer, kind in self._layers:
            source = sources.get(id(layer))
            if (kind, type(source).__name__) not in self._done:
                self._done.add((kind, type(source).__name__))
                self._launch_all(layer, kind, source, most)
        self._layers.clear()
        if len(self._done) > before:
            logger.info(
                "%s: all kernels of %d kinds of layers were compiled in %.1f s, before they serve.",
                method,
                len(self._done) - before,
                time.perf_counter() - started,
            )

    def _launch_all(self, layer: Any, kind: Kind, source: Any, most: int) -> None:
        """A run for each bucket, with tensors on the GPU that are kept in the host's memory."""
        with ExitStack() as on_device, torch.inference_mode():
            for module in (layer, source):
                if isinstance(module, nn.Module):
                    on_device.enter_context(device_loading_context(module, self._device))
            for m in bucket_starts(most):
                self._launch(layer, kind, source, m)

    def _launch(self, layer: Any, kind: Kind, source: Any, m: int) -> None:
        """y of m tokens, whatever the layer may be given."""
        for x in self._inputs(kind, source, m):
            # Of a layer cut along its input, only the first rank adds the bias.
            for bias in dict.fromkeys((None, getattr(layer, "bias", None))):
                layer.quant_method.apply(layer, x, bias)

    def _inputs(self, kind: Kind, source: Any, m: int) -> Iterator[Tensor]:
        """x [m, K], or the rows that what quantises for the layer makes, with and without a sum."""
        x = torch.zeros(m, kind.width, dtype=kind.dtype, device=self._device)
        if source is None:
            yield x
        elif type(source).__name__ == SILU:
            yield source._forward_method(x.repeat(1, 2))
        else:
            yield source._forward_method(x)
            yield source._forward_method(x, x)[0]


def compiles_at_launch(device: torch.device) -> bool:
    """True where a kernel is compiled when it is first launched: on GPUs."""
    return device.type == "cuda"


def read_tables(device: torch.device) -> None:
    """Look for measured tiles.

    Raises:
        TableError: a table is damaged.
    """
    from quantkit_kernels.tile_choice import tiles_of
    from quantkit_kernels.triton_common import device_of

    tiles_of(device_of(torch.empty(0, device=device)))
