"""What the layers of one model share while it loads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from vllm.logger import init_logger

from quantkit_kernels.tuning import batch_invariant, set_batch_invariant
from quantkit_kernels.wna16 import QuantizedWeight
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.integration import compat
from vllm_quantkit.integration.blocks import BLOCKS, DecoderLayers
from vllm_quantkit.integration.fusion import fuse, fused
from vllm_quantkit.integration.kv_cache import KVCache
from vllm_quantkit.integration.names import LayerNames
from vllm_quantkit.integration.report import LoadReport
from vllm_quantkit.integration.smoothing import Smoothing
from vllm_quantkit.integration.warm_up import WarmUp
from vllm_quantkit.options import Options
from vllm_quantkit.quantize.activation_stats import read_activation_stats
from vllm_quantkit.quantize.methods.data_free import relative_error
from vllm_quantkit.schemes import Method
from vllm_quantkit.schemes.invariance import check_invariant
from vllm_quantkit.schemes.smoothquant import HOW_TO_SMOOTH
from vllm_quantkit.spec import SchemeSpec

logger = init_logger("vllm.quantkit")

NOT_SMOOTHED = (
    "activations are quantised as they are: smoothing knows "
    f"{', '.join(sorted(BLOCKS))}, and this model has none of them, so its activation_stats go "
    "unused. Use quantkit-llm-int8 or quantkit-fp8 if outliers harm it."
)


class LoadContext:
    """Statistics, smoothing, decoder layers and report: a `loading.Surroundings`.

    Attributes:
        report: counts layers and speaks at the end.
        kv_cache: of the model.
        warm_up: compiles the packed layers' kernels.
    """

    def __init__(
        self, method: type[Method], options: Options, names: LayerNames, report: LoadReport
    ) -> None:
        self.report = report
        set_batch_invariant(compat.wants_batch_invariance())
        self.warm_up = WarmUp(torch.get_default_device())
        self.kv_cache = KVCache(options.kv_cache, report, int4=method.int4_cache)
        self._names = names
        self._layers = DecoderLayers()
        self._layers.watch()
        stats = options.activation_stats
        self._stats = read_activation_stats(stats) if stats is not None else {}
        self._complete = False
        self._smoothing: Smoothing | None = None
        if method.smooths and report.at_load:
            self._prepare_smoothing(options)

    def companions(self, partition: str) -> Mapping[str, Tensor]:
        """The stored tensors of a checkpoint layer, by their names behind the layer's."""
        return self._names.tensors(partition)

    def smoothed(self, weight: Tensor, prefix: str, *, has_last: bool) -> Tensor:
        """A 16-bit weight of the layer `prefix` as it reads and makes smoothed activations.

        Raises:
            CheckpointError: the statistics are for another model.
            ConfigError: the model was smoothed before; reloaded norms would not be.
        """
        if self._smoothing is None:
            return weight
        if self._complete:
            raise ConfigError(
                f"the weight of {prefix} cannot be reloaded, because activation_stats smoothed the "
                f"model and reloaded norms would not fit; start the engine again with the new "
                f"weights, or serve them without activation_stats."
            )
        return self._smoothing.smooth(weight, prefix, has_last=has_last)

    def largest_inputs(self, partitions: tuple[str, ...]) -> Tensor | None:
        """float32 [K], the largest |x| of each input channel, where statistics are given."""
        stored = [self._names.checkpoint_name(name) or name for name in partitions]
        known = [self._stats[name] for name in stored if name in self._stats]
        return torch.stack(known).amax(0) if known else None

    def check_invariant(
        self, prefix: str, partitions: tuple[str, ...], spec: SchemeSpec, dtype: torch.dtype
    ) -> None:
        """A layer's results do not depend on the batch, where the user asks for that.

        Raises:
            UnsupportedScheme: they do.
        """
        if batch_invariant():
            fixed = self.largest_inputs(partitions) is not None
            device = torch.get_default_device()
            check_invariant(prefix, spec, device, dtype, fixed_outliers=fixed)

    def arrived(
        self, label: str, spec: SchemeSpec, weight: Tensor, quantized: QuantizedWeight
    ) -> None:
        """A 16-bit weight was quantised as `spec` says."""
        codes = quantized.codes.numel() * quantized.bits // 8
        made = codes + quantized.scales.nbytes
        made += 0 if spec.weight.symmetric else quantized.zeros.nbytes
        self.report.memory.arrived(weight.nbytes, made)
        self.report.quantised(label, spec, relative_error(weight, quantized))

    def ready(self, prefix: str, kernel: str) -> None:
        """A layer is packed; after the last one the model is completed and loading summarised."""
        self.report.ready(prefix, kernel, self._finish)
        if self._complete:
            self.warm_up.run(self.report.method, fused(self._layers), compat.most_tokens())

    def _prepare_smoothing(self, options: Options) -> None:
        if not self._stats:
            logger.warning("%s: %s", self.report.method, HOW_TO_SMOOTH)
            return
        if compat.serves_lora():
            raise ConfigError(
                "activation_stats smooths the model, which changes what adapters read; start "
                "without --enable-lora, or without activation_stats."
            )
        self._smoothing = Smoothing(self._stats, options.smoothing, self._names, self._layers)

    def _finish(self) -> str:
        """Complete the smoothing, and let norms quantise for the layers behind them."""
        self._layers.stop()
        self._complete = True
        did = []
        if self._smoothing is not None:
            self._smoothing.fold()
            if not self._smoothing.smoothed:
                logger.warning("%s: %s", self.report.method, NOT_SMOOTHED)
            did.append(f"smoothed {self._smoothing.smoothed} layers, folded into what feeds them")
        # An adapter needs the 16-bit input as well.
        fused = 0 if compat.serves_lora() else fuse(self._layers)
        if fused:
            did.append(f"{fused} norms and activations quantise for the layer behind them")
        return "; ".join(did) + "." if did else ""
