"""A model in transformers whose quantised layers compute as they are served.

Weights are those that the checkpoint stores, and activations are rounded as its scheme says; so
only codes, scales and 16-bit parameters tell quantised models apart, and no engine's arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkit_kernels.act_quant.reference import reference_quantize
from quantkit_kernels.act_quant.rows import RowQuantizer
from vllm_quantkit.checkpoint import audit, read_headers, read_quantization_config
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.evaluate.origin import is_quantised
from vllm_quantkit.finetune import FrozenLinear, load_frozen
from vllm_quantkit.formats import get_format
from vllm_quantkit.options import Options
from vllm_quantkit.schemes import get_method
from vllm_quantkit.schemes.at_load import load_rules
from vllm_quantkit.schemes.w8a8 import row_quantizer
from vllm_quantkit.spec import ActivationSpec, LayerRules, SchemeSpec


class ServedLinear(nn.Module):
    """y = q(x) W^T + b, q rounding activations as they are rounded when served."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quantizer: RowQuantizer | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self._quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Float [..., K] to [..., N]."""
        return linear(self.rounded(x), self.weight, self.bias)

    def rounded(self, x: Tensor) -> Tensor:
        """q(x), float [..., K]."""
        if self._quantizer is None:
            return x
        rows = reference_quantize(x.flatten(0, -2), self._quantizer)
        return rows.dequantize().view(x.shape).to(x.dtype)


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A 16-bit model, computed in `dtype`."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def load_served(
    folder: Path,
    *,
    method: str | None = None,
    options: Options | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A model whose quantised layers are each a `ServedLinear`.

    Args:
        folder: a quantised checkpoint, or a 16-bit model.
        method: as given to `--quantization`; needed for a 16-bit model.
        options: as given to `--additional-config` under `quantkit`.
        dtype: that everything is computed in.

    Raises:
        ConfigError: `folder` has no quantisation config and no method was given.
        UnsupportedScheme: what transformers cannot do as the engine does.
        CheckpointError: tensors do not fit the config.
    """
    options = options or Options()
    _refuse(options, method)
    schemes = quantised_layers(folder, method, options)
    quantizers = {name: _quantizer(name, spec.activation) for name, spec in schemes.items()}
    model = load_frozen(folder, method=method, options=options, dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, FrozenLinear):
            weight = module.dequantize(dtype)
            model.set_submodule(name, ServedLinear(weight, module.bias, quantizers[name]))
    return model


def quantised_layers(
    folder: Path, method: str | None, options: Options
) -> Mapping[str, SchemeSpec]:
    """Each quantised layer's scheme, by its name in the checkpoint."""
    audited = audit(read_headers(folder), _rules(folder, method, options))
    return {name: layer.spec for name, layer in audited.quantised.items()}


def _rules(folder: Path, method: str | None, options: Options) -> LayerRules:
    if method is not None and not is_quantised(folder):
        return load_rules(get_method(method), options)
    config = read_quantization_config(folder)
    return get_format(config["quant_method"]).parse(config)


def _refuse(options: Options, method: str | None) -> None:
    """What only the engine does.

    Raises:
        UnsupportedScheme: names it.
    """
    for wanted, what in (
        (options.kv_cache.dtype == "int4" or method == "quantkit-kv4", "a KV cache of 4 bits"),
        (options.activation_stats is not None, "smoothing with activation_stats"),
    ):
        if wanted:
            raise UnsupportedScheme(
                f"{what} exists in the engine only, not in transformers: leave --backend hf out."
            )


def _quantizer(name: str, spec: ActivationSpec | None) -> RowQuantizer | None:
    if spec is None:
        return None
    if not spec.dynamic or spec.outlier_threshold is not None:
        raise UnsupportedScheme(
            f"{name} has {spec.describe()}, but only plain dynamic ones are compared in "
            "transformers: measure it in the engine, without --backend hf."
        )
    return row_quantizer(spec)
