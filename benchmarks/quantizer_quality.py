"""What quantising cost, by one yardstick for every quantiser: a written checkpoint is read.

Weights are those that the checkpoint stores, in float32, and activations are rounded as its scheme
says; so only codes, scales and 16-bit parameters tell quantisers apart, and no engine's arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quantkit_kernels.act_quant.reference import reference_quantize
from quantkit_kernels.act_quant.rows import RowQuantizer
from vllm_quantkit.checkpoint import audit, read_headers, read_quantization_config
from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.finetune import FrozenLinear, load_frozen
from vllm_quantkit.formats import get_format
from vllm_quantkit.schemes.w8a8 import row_quantizer
from vllm_quantkit.spec import ActivationSpec


@dataclass(frozen=True)
class Quality:
    """What a quantised model says of a text, against its 16-bit original.

    Attributes:
        perplexity: exp(mean negative log-likelihood).
        increase: perplexity over the original's, less 1.
        divergence: mean KL(original || quantised) of the next token, in nats.
    """

    perplexity: float
    increase: float
    divergence: float


class ServedLinear(nn.Module):
    """y = q(x) W^T + b in float32, q rounding activations as they are rounded when served."""

    def __init__(self, weight: Tensor, bias: Tensor | None, quantizer: RowQuantizer | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self._quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """float32 [..., K] to [..., N]."""
        if self._quantizer is not None:
            rows = reference_quantize(x.flatten(0, -2), self._quantizer)
            x = rows.dequantize().view(x.shape)
        return linear(x, self.weight, self.bias)


def load_plain(folder: Path) -> PreTrainedModel:
    """A 16-bit model in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def load_served(folder: Path) -> PreTrainedModel:
    """A quantised checkpoint in float32: each quantised layer is a `ServedLinear`.

    Raises:
        ConfigError: `folder` has no quantisation config.
        UnsupportedScheme: a layer has static activation scales.
        CheckpointError: tensors do not fit the config.
    """
    activations = _activations(folder)
    model = load_frozen(folder)
    for name, module in list(model.named_modules()):
        if isinstance(module, FrozenLinear):
            weight = module.dequantize(torch.float32)
            served = ServedLinear(weight, module.bias, _quantizer(name, activations[name]))
            model.set_submodule(name, served)
    return model


def _activations(folder: Path) -> dict[str, ActivationSpec | None]:
    config = read_quantization_config(folder)
    rules = get_format(config["quant_method"]).parse(config)
    quantised = audit(read_headers(folder), rules).quantised
    return {name: layer.spec.activation for name, layer in quantised.items()}


def _quantizer(name: str, spec: ActivationSpec | None) -> RowQuantizer | None:
    if spec is None:
        return None
    if not spec.dynamic or spec.outlier_threshold is not None:
        raise UnsupportedScheme(
            f"{name} has {spec.describe()}, but only plain dynamic ones are compared here; "
            "quantise the model with dynamic activations."
        )
    return row_quantizer(spec)


def text_windows(model_folder: Path, text: str, length: int = 512) -> Tensor:
    """int64 [S, length]: the text's tokens in order, a window's worth after each BOS token.

    The last, incomplete window is left out.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rows = tokens[: tokens.numel() // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat([torch.full((len(rows), 1), int(tokenizer.bos_token_id)), rows], dim=1)


@dataclass(frozen=True)
class Reference:
    """What the 16-bit model says of a text, once for all that is compared with it.

    Attributes:
        windows: int64 [S, T], the text's tokens.
        log_probs: float32 [S, T, V], ln p of the next token at every position.
    """

    windows: Tensor
    log_probs: Tensor

    @property
    def perplexity(self) -> float:
        """exp(mean negative log-likelihood) of every token but each window's first."""
        return math.exp(_mean_loss(self.windows, self.log_probs))

    def compare(self, model: PreTrainedModel) -> Quality:
        """How a quantised model differs on the windows."""
        found = predict(model, self.windows)
        before, after = (_mean_loss(self.windows, p) for p in (self.log_probs, found))
        return Quality(math.exp(after), math.expm1(after - before), self.divergence(found))

    def divergence(self, log_probs: Tensor) -> float:
        """Mean KL(p || q) = sum p (ln p - ln q) over positions, of ln q [S, T, V], in nats."""
        rows = zip(self.log_probs, log_probs, strict=True)
        return float(torch.stack([_divergence(p, q) for p, q in rows]).mean())


@torch.no_grad()
def predict(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """ln p of the next token at every position of windows [S, T], float32 [S, T, V]."""
    return torch.cat([log_softmax(model(row[None]).logits.float(), dim=-1) for row in windows])


def make_reference(model: PreTrainedModel, windows: Tensor) -> Reference:
    """The 16-bit model's predictions of windows, int64 [S, T]."""
    return Reference(windows, predict(model, windows))


def _mean_loss(windows: Tensor, log_probs: Tensor) -> float:
    chosen = log_probs[:, :-1].gather(-1, windows[:, 1:, None])
    return -float(chosen.double().mean())


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum p (ln p - ln q) of ln p and ln q [T, V], float64 [T]."""
    p, q = p.double(), q.double()
    return (p.exp() * (p - q)).sum(-1)
