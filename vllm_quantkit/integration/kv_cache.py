"""Which attention layers keep their keys and values in 4 bits, and how vLLM is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm import envs
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform

from quantkit_kernels.kv_int4 import KeyTreatment, Softmax
from vllm_quantkit.integration import compat
from vllm_quantkit.integration.kv_backend import (
    SCALE,
    SHIFT,
    Groups,
    Int4Backend,
    Int4Impl,
    LayerAttention,
    treatment,
)
from vllm_quantkit.integration.kv_devices import backend_class
from vllm_quantkit.integration.kv_fp8 import FP8Scales
from vllm_quantkit.integration.kv_refusals import check_cache_dtype, check_engine, check_layer
from vllm_quantkit.integration.kv_treatment import KVStatistics, ServedHeads
from vllm_quantkit.integration.names import LAYER_INDEX, shorten
from vllm_quantkit.integration.report import LoadReport
from vllm_quantkit.kv_rules import INT4, check_pool
from vllm_quantkit.options import KVCacheOptions

logger = init_logger("vllm.quantkit")

HOW_TO_CALIBRATE = (
    "not calibrated: `quantkit calibrate-kv MODEL --calibration TEXT --out FOLDER` measures what "
    "keys need; pass FOLDER as kv_cache.calibration, or move it to kv_cache/ in the model's folder"
)

PADDED = (
    "layers that keep 16 bits let vLLM pad INT4 pages to their size in a model that mixes sliding "
    "windows and full attention, so that the pool holds hardly more tokens; add "
    "--disable-hybrid-kv-cache-manager, or keep no layer in 16 bits."
)


@dataclass
class _Progress:
    """Attributes:
    bytes: of a token in the cache of each INT4 layer, against 16 bits.
    treated: INT4 layers whose keys are shifted or scaled.
    kept: layers in 16 bits.
    ready: INT4 layers whose weights are loaded.
    windows: tokens that a layer sees, None for all.
    told: True once the log has it.
    """

    bytes: dict[str, tuple[int, int]] = field(default_factory=dict)
    treated: set[str] = field(default_factory=set)
    kept: list[str] = field(default_factory=list)
    ready: set[str] = field(default_factory=set)
    windows: set[int | None] = field(default_factory=set)
    told: bool = False


class KVCache:
    """The KV cache of one model: decides layer by layer, and speaks when the last one is ready."""

    def __init__(self, options: KVCacheOptions, report: LoadReport, *, int4: bool) -> None:
        """Options are known, no layer is built.

        Args:
            options: the user's.
            report: of the model.
            int4: True where the method's own cache is INT4.

        Raises:
            ConfigError, UnsupportedScheme: what is asked for contradicts itself or is not served.
            CheckpointError: the calibration cannot be read.
        """
        self._config = compat.current_config()
        dtype = self._config.cache_config.cache_dtype
        check_cache_dtype(dtype, options, report.method, int4=int4)
        self._options, self._report = options, report
        self._int4 = int4 or options.dtype == "int4" or dtype == INT4
        self._fp8 = dtype in ("fp8", "fp8_e4m3")
        self._groups = Groups(options.key_group, options.value_group)
        self._progress = _Progress()
        if self._int4:
            check_engine(self._config)
            # To vLLM the layers that are not ours have a cache of 16 bits, as if nothing was said.
            self._config.cache_config.cache_dtype = "auto"
        self._read: KVStatistics | None = None

    def method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Give an attention layer its INT4 cache; or the scales of its FP8 one.

        Raises:
            UnsupportedScheme: the layer's attention does not fit an INT4 cache.
            CheckpointError: the calibration is of another model.
        """
        if self._fp8 and isinstance(layer, Attention):
            return self._scales(prefix)
        # vLLM asks again when the weights are loaded.
        if self._int4 and not isinstance(getattr(layer, "impl", None), Int4Impl):
            self._place(layer, prefix)
        return None

    @property
    def _statistics(self) -> KVStatistics:
        """Read when the first layer asks: the model has told then how it renames layers."""
        if self._read is None:
            self._read = KVStatistics(self._report.names, self._options.calibration)
        return self._read

    def _scales(self, prefix: str) -> FP8Scales | None:
        found = self._statistics.layer(prefix, self._report.num_layers)
        if found is None:
            return None
        logger.info_once(
            "%s: KV cache FP8 with the scales of %s.", self._report.method, self._statistics.source
        )
        return FP8Scales(found.k_scale, found.v_scale)

    def _place(self, layer: Any, prefix: str) -> None:
        target = getattr(layer, "kv_sharing_target_layer_name", None)
        if target is not None:
            self._share(layer, prefix, target)
            return
        if prefix in self._progress.kept:
            return
        self._progress.windows.add(layer.sliding_window)
        found = self._statistics.layer(prefix, self._report.num_layers)
        if (found is not None and found.dtype == "auto") or self._skips(layer, prefix):
            self._progress.kept.append(prefix)
            return
        check_layer(layer, prefix)
        heads = ServedHeads(layer.num_kv_heads, layer.head_size)
        keys = self._statistics.treatment(prefix, found, heads)
        self._give(layer, keys, cached=self._reads_cache)
        self._expect(layer, prefix, keys)

    @property
    def _reads_cache(self) -> bool:
        return self._options.prefill == "cached" or bool(envs.VLLM_BATCH_INVARIANT)

    def _skips(self, layer: Any, prefix: str) -> bool:
        """True where the user keeps a layer in 16 bits, in our words or in vLLM's."""
        words = self._config.cache_config.kv_cache_dtype_skip_layers or ()
        index = LAYER_INDEX.search(f".{prefix}.")
        number = None if index is None else int(index[1])
        windowed = "sliding_window" in words and layer.sliding_window is not None
        return windowed or number in self._options.skip_layers or str(number) in words

    def _share(self, layer: Any, prefix: str, target: str) -> None:
        """A layer that reads another's cache: it has none of its own, nor keys to rely on."""
        owner = self._config.compilation_config.static_forward_context[target]
        if isinstance(owner.impl, Int4Impl):
            check_layer(layer, prefix)
            self._give(layer, treatment(owner), cached=True)

    def _give(self, layer: Any, keys: KeyTreatment, *, cached: bool) -> None:
        backend = backend_class(current_platform.device_type, self._groups)
        softmax = Softmax(
            scale=float(layer.impl.scale),
            window=layer.sliding_window or 0,
            softcap=float(compat.softcap(layer.impl)),
        )
        attention = LayerAttention(
            heads=layer.num_heads,
            kv_heads=layer.num_kv_heads,
            head_size=layer.head_size,
            softmax=softmax,
            groups=self._groups,
            cached=cached,
            sinks=getattr(layer.impl, "sinks", None),
        )
        # Buffers follow the model to its device, and through sleep.
        layer.register_buffer(SHIFT, keys.shift, persistent=False)
        layer.register_buffer(SCALE, keys.scale, persistent=False)
        layer.impl = backend.get_impl_cls()(attention)
        _take_over(layer, backend)

    def _expect(self, layer: Any, prefix: str, keys: KeyTreatment) -> None:
        progress, heads = self._progress, layer.num_kv_heads
        sixteen = 2 * layer.head_size * torch.get_default_dtype().itemsize
        made = self._groups.token_bytes(layer.head_size)
        progress.bytes[prefix] = heads * made, heads * sixteen
        if any(part is not None for part in keys):
            progress.treated.add(prefix)
        layer.impl.on_ready = lambda: self._ready(prefix)

    def _ready(self, prefix: str) -> None:
        progress = self._progress
        progress.ready.add(prefix)
        if progress.told or progress.ready != progress.bytes.keys():
            return
        progress.told = True
        self._check_pool()
        logger.info("%s: %s.", self._report.method, self._describe())

    def _check_pool(self) -> None:
        """Layers of different pages can share memory, and do so without waste.

        Raises:
            UnsupportedScheme: this vLLM has a pool for one size of pages only.
        """
        progress, scheduler = self._progress, self._config.scheduler_config
        if not progress.kept or len(progress.windows) == 1:
            return
        if scheduler.disable_hybrid_kv_cache_manager:
            return
        kept = shorten(progress.kept)
        check_pool(kept, mixed_windows=True, pads_pages=compat.pads_cache_pages())
        logger.warning("%s: %s", self._report.method, PADDED)

    def _describe(self) -> str:
        progress = self._progress
        made, sixteen = (sum(sizes) for sizes in zip(*progress.bytes.values(), strict=True))
        layers = len(progress.bytes)
        said = [
            f"KV cache INT4 in {layers} layers, {made / layers:.0f} bytes a token and layer "
            f"instead of {sixteen / layers:.0f} ({sixteen / made:.2f}x)"
        ]
        if progress.treated:
            source = self._statistics.source
            said.append(f"calibrated by {source}, {len(progress.treated)} layers' keys treated")
        else:
            said.append(HOW_TO_CALIBRATE)
        if progress.kept:
            kept = shorten(progress.kept)
            said.append(f"{len(progress.kept)} layers keep 16 bits: {kept}")
        return "; ".join(said)


def _take_over(layer: Any, backend: type[Int4Backend]) -> None:
    """Let vLLM allocate, fill and read the layer's cache through our backend."""
    layer.attn_backend = backend
    layer.kv_cache_torch_dtype = torch.uint8
    layer.kv_cache_dtype = "auto"
    compat.pack_cache(layer, backend.groups.token_bytes(layer.head_size))
