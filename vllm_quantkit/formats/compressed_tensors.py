"""compressed-tensors checkpoints: W = scale * (code - zero), or W = scale * E4M3.

`pack-quantized`: words of 32 bits hold p = floor(32 / bits) whole codes, the last word of a row
padded with zeros. The library's signed integers are stored with 2**(bits - 1) added, which makes
them our codes and zero-points:

    weight_packed[n, w]     = sum_i codes[n, p w + i] << (i bits)    int32 [N, ceil(K/p)]
    weight_scale[n, g]                                               float [N, G]
    weight_zero_point[w, g] = sum_i zeros[p w + i, g] << (i bits)    int32 [ceil(N/p), G]
    weight_shape            = (N, K)                                 int64 [2]
    weight_g_idx[k]         = the group of input k                   int32 [K]

`int-quantized`, `float-quantized` and `naive-quantized`: an element for each weight; half stands
for 2**(bits - 1), h for the height of a block of rows:

    weight[n, k]            = codes[n, k] - half, or the float8      int8 or float8_e4m3fn [N, K]
    weight_scale            strategy tensor, channel, group, block   float [1], [N, 1], [N, G],
                                                                           [ceil(N/h), G]
    weight_zero_point       = zeros - half, laid out as the scales   int8
    weight_g_idx[k]         as above                                 int32 [K]
    input_scale             static activations                       float [1]
    input_zero_point        static activations, asymmetric           int8  [1]

Since 0.19 the library packs words without gaps where 32 / bits is no whole number, as GPTQ does;
both are read, and the older is written, which vLLM's versions of the library read too.

Zero-points exist where `symmetric` is false, `weight_g_idx` where `actorder` is `group`.

Names: an entry of `ignore` or `targets` is a whole name, `re:` and a regular expression matched
from the name's start, or the class `Linear`. `ignore` wins, then whole names, then regular
expressions in the order of the config, then `Linear`, which takes in the head.

What loads where, besides here: transformers, through the library, reads `pack-quantized` of every
width, `int-` and `float-quantized`; a single column of blocks it takes for scales per channel.
vLLM 0.32 in-tree takes `pack-quantized` of 4 bits and, on GPUs, 8; it sizes words of 3, 5, 6 and 7
bits as if codes straddled them, which the library does not write, and refuses `actorder` `group`
(0.30 and later). Of the others it takes FP8 and W8A8; weights alone only as floats, on GPUs.

Source: https://github.com/vllm-project/compressed-tensors (`compressors/pack_quantized`,
`compressors/naive_quantized`, `quantization/quant_args.py`, `utils/match.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from quantkit_kernels.act_quant.rows import PER_TENSOR, PER_TOKEN
from vllm_quantkit.formats import _compressed_tensors_packed as packed
from vllm_quantkit.formats import _compressed_tensors_plain as plain
from vllm_quantkit.formats._compressed_tensors_config import LINEAR, ConfigFields
from vllm_quantkit.formats._compressed_tensors_weights import DIALECT, PACKED
from vllm_quantkit.formats._patterns import compact
from vllm_quantkit.formats._written import (
    ANY_LAYER,
    cannot_store,
    confirmed,
    most_frequent,
)
from vllm_quantkit.formats.base import CheckpointTensor
from vllm_quantkit.spec import (
    ALL_ROWS,
    PER_CHANNEL,
    ActivationSpec,
    LayerRules,
    LayerShape,
    SchemeSpec,
    WeightSpec,
)

TENSORS = (
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
)
COMPANIONS = ()

MIXED = "mixed-precision"
"""`format` of a config whose groups have several."""


def parse(config: Mapping[str, Any]) -> LayerRules:
    """Each group's scheme for its targets, but 16 bits for what `ignore` names.

    Raises:
        ConfigError: a key is missing, has the wrong type or a value nothing can mean.
        UnsupportedScheme: the config is well formed but not served; says what to do.
    """
    return ConfigFields.read(config).rules()


def codes_name(spec: SchemeSpec) -> str:
    """`weight_packed`, or `weight` where each weight has an element."""
    return packed.CODES if _is_packed(spec) else plain.CODES


def tensors(spec: SchemeSpec, shape: LayerShape) -> tuple[CheckpointTensor, ...]:
    """The tensors of a layer, as its format stores them.

    Raises:
        UnsupportedScheme: the spec is one that the format cannot store.
    """
    if _is_packed(spec):
        return packed.tensors(spec.weight, shape)
    return plain.tensors(spec, shape)


def infer_shape(
    spec: SchemeSpec, shapes: Mapping[str, tuple[int, ...]], stored: tuple[int, int] | None = None
) -> LayerShape:
    """N and K, from `weight_shape` and the packed words, or from the shape of `weight`."""
    if _is_packed(spec):
        return packed.infer_shape(spec.weight, shapes, stored)
    return plain.infer_shape(shapes)


def scheme(weight: WeightSpec, activation: ActivationSpec | None) -> SchemeSpec:
    """`pack-quantized` where only integer weights are quantised, else an element for each weight.

    Raises:
        ConfigError, UnsupportedScheme: numerics that the dialect has no words for, or that quantkit
            does not serve in it.
    """
    if weight.code_type != "int":
        variant = "float-quantized"
    else:
        variant = PACKED if activation is None else "int-quantized"
    spec = SchemeSpec(dialect=DIALECT, weight=weight, variant=variant, activation=activation)
    if weight.code_type not in ("int", "e4m3"):
        raise cannot_store(DIALECT, weight, activation, "integers and E4M3 floats")
    return confirmed(spec, parse(render({ANY_LAYER: spec}, ())))


def render(layers: Mapping[str, SchemeSpec], ignore: tuple[str, ...]) -> dict[str, Any]:
    """A group for each scheme: the most frequent is that of the class `Linear`, others name layers.

    The class comes last, as the library warns of targets behind it. The head stays in 16 bits
    unless `layers` names it.
    """
    default = most_frequent(layers)
    groups: dict[SchemeSpec, list[str]] = defaultdict(list)
    for name, spec in layers.items():
        groups[spec].append(name)
    groups[default] = groups.pop(default)
    everything = (*layers, *ignore)
    kept = (*ignore, *(("lm_head",) if "lm_head" not in layers else ()))
    formats = {spec.variant or PACKED for spec in groups}
    return {
        "quant_method": DIALECT,
        "format": MIXED if len(formats) > 1 else formats.pop(),
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{index}": _group(
                spec, [LINEAR] if spec == default else list(compact(names, everything))
            )
            for index, (spec, names) in enumerate(groups.items())
        },
        "ignore": list(compact(kept, layers)),
        "kv_cache_scheme": None,
    }


def _group(spec: SchemeSpec, targets: list[str]) -> dict[str, Any]:
    activation = spec.activation
    return {
        "targets": targets,
        "format": spec.variant or PACKED,
        "weights": _weight_args(spec.weight),
        "input_activations": None if activation is None else _activation_args(activation),
        "output_activations": None,
    }


def _is_packed(spec: SchemeSpec) -> bool:
    return spec.variant in ("", PACKED)


def _weight_args(weight: WeightSpec) -> dict[str, Any]:
    grouped = weight.group_size != PER_CHANNEL
    strategy = {1: "group" if grouped else "channel", ALL_ROWS: "tensor"}.get(
        weight.scale_rows, "block"
    )
    args: dict[str, Any] = {
        "num_bits": weight.bits,
        "type": "int" if weight.code_type == "int" else "float",
        "symmetric": weight.symmetric,
        "strategy": strategy,
        "group_size": weight.group_size if strategy == "group" else None,
        "actorder": "group" if weight.act_order else None,
        "dynamic": False,
    }
    if strategy == "block":
        args["block_structure"] = [weight.scale_rows, weight.group_size]
    return args


def _activation_args(activation: ActivationSpec) -> dict[str, Any]:
    strategies = {PER_TOKEN: "token", PER_TENSOR: "tensor"}
    return {
        "num_bits": 8,
        "type": "int" if activation.code == "int8" else "float",
        "symmetric": activation.symmetric,
        "strategy": strategies.get(activation.group_size, "group"),
        "group_size": activation.group_size if activation.group_size > 0 else None,
        "dynamic": activation.dynamic,
    }
