"""Which KV caches are served for which words, devices and layers of attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit_kernels.kv_int4.layout import LARGEST_HEAD
from vllm_quantkit.errors import ConfigError, UnsupportedScheme
from vllm_quantkit.options import KVCacheOptions

INT4 = "int4_per_token_head"
"""The word of `--kv-cache-dtype` that selects quantkit's cache."""

SERVED_ON_CPU = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", INT4)
"""Words whose cache a CPU reads as it was written."""

DROP = "serve this model without an INT4 KV cache"


@dataclass(frozen=True)
class AttentionFacts:
    """What decides whether a layer of attention may have an INT4 cache.

    Attributes:
        name: of the layer.
        kind: its class in vLLM.
        latent: True for latent attention (MLA).
        plain: True for vLLM's own class of decoder attention.
        role: `decoder`, `encoder_only`, ...
        alibi: True where positions are told by ALiBi.
        head_size: dimensions of a key.
        value_size: of a value.
        sees_images: True where tokens of an image attend to later ones of it.
    """

    name: str
    kind: str = "Attention"
    latent: bool = False
    plain: bool = True
    role: str = "decoder"
    alibi: bool = False
    head_size: int = 0
    value_size: int = 0
    sees_images: bool = False


def check_cache_dtype(
    dtype: str, options: KVCacheOptions, method: str, *, int4: bool, cpu: bool
) -> None:
    """`--kv-cache-dtype` contradicts neither the method and options nor the platform.

    Args:
        dtype: the user's word.
        options: the user's.
        method: the name given to `--quantization`.
        int4: True where the method's own cache is INT4.
        cpu: True where a CPU serves.

    Raises:
        ConfigError: two of them ask for different caches.
        UnsupportedScheme: vLLM's CPU attention would misread such a cache.
    """
    if int4 or options.dtype == "int4":
        asked = f"--quantization {method}" if int4 else "kv_cache.dtype = 'int4'"
        if dtype not in ("auto", INT4):
            raise ConfigError(
                f"--kv-cache-dtype {dtype} contradicts {asked}, whose KV cache is INT4; "
                f"drop one of them."
            )
    elif dtype != INT4:
        _check_unused(dtype, options)
    if cpu and dtype not in SERVED_ON_CPU:
        raise UnsupportedScheme(
            f"--kv-cache-dtype {dtype} is not served on CPUs, where vLLM would store 16 bits and "
            f"read something else; use {INT4}, fp8 or auto."
        )


def _check_unused(dtype: str, options: KVCacheOptions) -> None:
    """No option is set that only means something to an INT4 cache, or to a quantised one."""
    given = {name: getattr(options, name) for name in options.model_fields_set - {"dtype"}}
    if dtype in ("fp8", "fp8_e4m3"):
        given.pop("calibration", None)
    for name, value in given.items():
        raise ConfigError(
            f"--additional-config quantkit: kv_cache.{name} = {str(value)!r} means nothing to a "
            f"KV cache of --kv-cache-dtype {dtype}; add --kv-cache-dtype {INT4}, or remove it."
        )


def check_recurrent(*, hybrid: bool) -> None:
    """A model keeps nothing but keys and values.

    Raises:
        UnsupportedScheme: it has recurrent layers too.
    """
    if hybrid:
        raise not_served("for models that also have recurrent layers", "use the 16-bit cache")


def check_pool(kept: str, *, mixed_windows: bool, pads_pages: bool) -> None:
    """Layers whose pages differ in size can share the memory of one pool.

    Args:
        kept: layers that keep 16 bits beside INT4 ones, in words; empty for none.
        mixed_windows: some layers see a window, others everything, and they share a pool.
        pads_pages: this vLLM pads smaller pages to the size of larger ones: from 0.28 on.

    Raises:
        UnsupportedScheme: they cannot.
    """
    if kept and mixed_windows and not pads_pages:
        raise UnsupportedScheme(
            f"{kept} keep a 16-bit KV cache beside INT4 ones, which this vLLM cannot lay out in a "
            f"model that mixes sliding windows and full attention; use vLLM 0.28 or newer, add "
            f"--disable-hybrid-kv-cache-manager, or keep no layer in 16 bits."
        )


def not_served(where: str, fix: str) -> UnsupportedScheme:
    """Why an INT4 cache is not served somewhere, and what to do."""
    return UnsupportedScheme(f"an INT4 KV cache is not served {where}; {fix}, or {DROP}.")


def check_attention(layer: AttentionFacts) -> None:
    """An attention layer's keys and values fit an INT4 cache.

    Raises:
        UnsupportedScheme: they do not.
    """
    for found, what in _faults(layer):
        if found:
            raise UnsupportedScheme(
                f"an INT4 KV cache is not served for {layer.name}, which {what}; {DROP}."
            )


def _faults(layer: AttentionFacts) -> Iterator[tuple[bool, str]]:
    yield layer.latent, f"is a {layer.kind} (latent attention, MLA)"
    yield (
        layer.role != "decoder",
        f"is {layer.role} attention (encoders and cross attention keep no INT4 cache)",
    )
    yield not layer.plain, f"is a {layer.kind}"
    yield layer.alibi, "uses ALiBi"
    yield (
        layer.value_size != layer.head_size,
        f"has keys of {layer.head_size} and values of {layer.value_size} dimensions",
    )
    yield (
        layer.head_size > LARGEST_HEAD,
        f"has heads of {layer.head_size} dimensions, more than {LARGEST_HEAD}",
    )
    yield layer.sees_images, "attends to images in both directions"
