"""A causal language model without weights, its decoder blocks, and its experts taken apart."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from vllm_quantkit.errors import CheckpointError, UnsupportedScheme
from vllm_quantkit.quantize.model.experts import LinearExperts, can_be_taken_apart
from vllm_quantkit.quantize.model.model_map import BlockParts, Heads, attention_implementation
from vllm_quantkit.spec import LayerShape

EXPERTS = "experts"
"""What transformers calls the experts of a mixture; their router is a layer beside them."""

LARGE = 2**24
"""Elements; buffers that a model computes when it is made have fewer."""


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters are on the meta device.

    Attributes:
        config: as the folder has it.
        model: in evaluation mode; buffers that are computed, such as rotary frequencies, are real.
        blocks: its decoder blocks.
        path: name of their list in the model.
    """

    config: PreTrainedConfig
    model: PreTrainedModel
    blocks: nn.ModuleList
    path: str

    @property
    def text_config(self) -> PreTrainedConfig:
        """The part of the config that is about the language model."""
        return self.config.get_text_config()

    @cached_property
    def _renamings(self) -> list[WeightRenaming]:
        found = get_model_conversion_mapping(self.model)
        return [renaming for renaming in found if isinstance(renaming, WeightRenaming)]

    def rename(self, name: str) -> str:
        """What the model calls the checkpoint's tensor `name`, as transformers renames on loading.

        Tensors that transformers also merges, such as those of experts, keep their last part.
        """
        for renaming in self._renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    @property
    def is_transformers(self) -> bool:
        """True if the model's code comes with transformers, not with the checkpoint."""
        return type(self.model).__module__.startswith("transformers.")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters and stored buffers; one that is tied comes under each of its names."""
        return iter(self.model.state_dict(keep_vars=True).items())

    def is_end(self, name: str) -> bool:
        """True for tensors outside the blocks that text needs; images and sounds need others."""
        if name.startswith(f"{self.path}."):
            return False
        if self.text_config is self.config:
            return True
        head = self.model.get_output_embeddings()
        parts = [part for part, module in self.model.named_modules() if module is head]
        body = self.path.rpartition(".")[0]
        return any(name.startswith(f"{part}.") for part in (body, *parts))


def build_skeleton(folder: Path, *, dtype: torch.dtype, trust_remote_code: bool) -> Skeleton:
    """The model that `folder` describes; no weight is read or made.

    Args:
        folder: a transformers model folder.
        dtype: of the parameters.
        trust_remote_code: may run model code that is in the folder.

    Raises:
        CheckpointError: there is no usable config.json.
        UnsupportedScheme: the model is quantised already, no causal language model, or has no
            decoder blocks with linear layers.
    """
    config = _read_config(folder, trust_remote_code)
    _refuse_quantized(folder, config)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if implementation := attention_implementation(config.get_text_config()):
        options["attn_implementation"] = implementation
    with parameters_on_meta():
        try:
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options).eval()
        except ValueError as error:
            raise UnsupportedScheme(
                f"{folder} is of type {config.model_type!r}, which transformers cannot build as a "
                f"causal language model: {error}"
            ) from error
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
        part.output_router_logits = False  # routers run with their blocks, not with the model
    path, blocks = find_blocks(model)
    return Skeleton(config, model, blocks, path)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters of modules made meanwhile have no storage; buffers are made as always.

    On the meta device as a whole, buffers that models compute when they are made, such as rotary
    frequencies, would be lost, and what computes them again differs from model to model.
    """

    def move(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # the same object where weights are tied
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        with _LargeOnMeta():
            yield
    finally:
        handle.remove()


class _LargeOnMeta(TorchFunctionMode):
    """`torch.empty` of much memory gives none: it is about to become a parameter.

    Machines may refuse to promise the tens of gigabytes of a layer's experts even for a moment.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
            if prod(size) > LARGE:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and module of the longest list of modules of one class with linear layers.

    Lists inside other lists, and those of image or sound encoders, do not count.

    Raises:
        UnsupportedScheme: there is none.
    """
    inside = _encoders(model)
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(inside):
            inside = (*inside, f"{name}.")
            if _are_blocks(module):
                found[name] = module
    if not found:
        raise UnsupportedScheme(
            f"{type(model).__name__} has no list of decoder blocks of one class with "
            "torch.nn.Linear layers. Only such layers are quantised; GPT-2's Conv1D layers, for "
            "example, are none."
        )
    return max(found.items(), key=lambda item: len(item[1]))


def take_experts_apart(model: nn.Module, path: str, *, trusted: bool) -> None:
    """Replaces the fused experts at `path` of the model by `LinearExperts`, if it has their layout.

    Args:
        model: without weights.
        path: of a module.
        trusted: the family is known; of others, the module must say how it combines gate and up.
    """
    fused = model.get_submodule(path)
    if can_be_taken_apart(fused) and (trusted or hasattr(fused, "_apply_gate")):
        model.set_submodule(path, LinearExperts(fused))


def fused_experts(block: nn.Module) -> list[str]:
    """Names of modules in the block that hold several experts in one parameter [E, ...]."""
    return [
        name
        for name, module in block.named_modules()
        if name.rpartition(".")[2] == EXPERTS
        and any(value.dim() == 3 for value in module.parameters(recurse=False))
    ]


def block_parts(block: nn.Module, heads: Heads | None) -> BlockParts:
    """What the block is made of, by names inside it."""
    routers = _routers(block)
    layers, kept, norms = {}, {}, {}
    for name, module in block.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        if isinstance(module, nn.Linear) and name not in routers:
            size = {"out_features": module.out_features, "in_features": module.in_features}
            layers[name] = LayerShape(**size)
        elif weight.dim() == 2:
            kept[name] = weight.shape[1]
        elif weight.dim() == 1:
            norms[name] = len(weight)
    return BlockParts(layers, kept, norms, heads, bool(fused_experts(block)))


def _routers(block: nn.Module) -> set[str]:
    """Linear layers beside experts: routers and gates of shared experts."""
    return {
        f"{name}.{child}".removeprefix(".")
        for name, module in block.named_modules()
        if any(child == EXPERTS for child, _ in module.named_children())
        for child, layer in module.named_children()
        if isinstance(layer, nn.Linear)
    }


def _are_blocks(modules: nn.ModuleList) -> bool:
    classes = {type(module) for module in modules}
    return len(classes) == 1 and all(
        any(isinstance(layer, nn.Linear) for layer in module.modules()) for module in modules
    )


def _encoders(model: nn.Module) -> tuple[str, ...]:
    """Names of the parts that are models themselves, but not the one that makes the text."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    if decoder is None:
        return ()
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel)
        and not any(part is decoder for part in module.modules())
        and not any(part is module for part in decoder.modules())
    )


def _read_config(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json: give the folder of a model saved by transformers."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from error


def _refuse_quantized(folder: Path, config: PreTrainedConfig) -> None:
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found:
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise UnsupportedScheme(
                f"{folder} is quantised already ({method}): start from the model in 16 or 32 bits."
            )
