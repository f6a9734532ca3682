"""A causal language model whose weights stay in their files until a block is asked for."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vllm_quantkit.errors import UnsupportedScheme
from vllm_quantkit.quantize.model.block_calls import BlockCall, BlockCaller
from vllm_quantkit.quantize.model.model_map import (
    FAMILIES,
    BlockParts,
    Family,
    Stage,
    heads_of,
    stages_of,
    what_unknown_loses,
)
from vllm_quantkit.quantize.model.skeleton import (
    Skeleton,
    block_parts,
    build_skeleton,
    fused_experts,
    take_experts_apart,
)
from vllm_quantkit.quantize.model.stored_tensors import FLOATS, StoredTensors, assign, loaded
from vllm_quantkit.spec import LayerShape

__all__ = ["BlockCall", "ModelShell"]


class ModelShell:
    """A causal LM with at most one decoder block's weights in memory, and those of its ends.

    Args:
        skeleton: the model without weights.
        stored: its tensors.
        family: None if the architecture is not known.
        dtype: what blocks compute in.
        device: where they do.

    Raises:
        CheckpointError: a tensor is missing, misshaped or quantised.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        stored: StoredTensors,
        family: Family | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._skeleton = skeleton
        self._stored = stored
        self._family = family
        self._dtype = dtype
        self._device = device
        self._open = False
        self._parts: dict[int, BlockParts] = {}
        self._take_experts_apart()
        self._move_buffers()
        self._check_blocks()
        self._ends = self._end_tensors()
        self._caller = BlockCaller(skeleton.model, list(skeleton.blocks))

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - immutable
        trust_remote_code: bool = False,
    ) -> ModelShell:
        """The model in `folder`; configs and headers are read, and no weight.

        Args:
            folder: a transformers model folder with safetensors weights in 16 or 32 bits.
            dtype: what blocks compute in.
            device: where they do.
            trust_remote_code: may run model code that is in the folder.

        Raises:
            CheckpointError: config.json or a tensor is missing, a file is truncated or corrupt, or
                a tensor has another shape than the model needs.
            UnsupportedScheme: the model is quantised already, no causal language model, or has no
                decoder blocks with linear layers.
        """
        skeleton = build_skeleton(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        known = skeleton.is_transformers and skeleton.config.model_type in FAMILIES
        family = FAMILIES[skeleton.config.model_type] if known else None
        stored = StoredTensors(folder, skeleton.rename, skeleton.model.base_model_prefix)
        return cls(skeleton, stored, family, dtype=dtype, device=device)

    @property
    def config(self) -> PreTrainedConfig:
        """The model's config."""
        return self._skeleton.config

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        return len(self._skeleton.blocks)

    @property
    def known(self) -> bool:
        """True if it is known what feeds each layer."""
        return self._family is not None

    @cached_property
    def loss(self) -> str:
        """What cannot be done with this model, in a sentence or two; empty if nothing is lost."""
        sentences = [] if self.known else [what_unknown_loses(self.config.model_type)]
        fused = {name for block in self._skeleton.blocks for name in fused_experts(block)}
        if fused:
            sentences.append(
                f"the experts in {', '.join(sorted(fused))} are stored in one tensor for all, or "
                "in a layout that is not known, and stay in 16 bits."
            )
        return " ".join(sentences)

    @cached_property
    def stored_dtype(self) -> torch.dtype:
        """What most weights of the blocks are stored in."""
        sizes: Counter[torch.dtype] = Counter()
        for index in range(self.block_count):
            for name in self.block_tensors(index):
                header = self._stored.headers[name]
                if header.dtype in FLOATS:
                    sizes[header.dtype] += torch.Size(header.shape).numel()
        return sizes.most_common(1)[0][0]

    def block_name(self, index: int) -> str:
        """Name of block `index` in the model."""
        return f"{self._skeleton.path}.{index}"

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls the layer `name` of the model, such as `lm_head`."""
        return self._stored.name(f"{name}.weight").removesuffix(".weight")

    def linears(self, index: int) -> dict[str, LayerShape]:
        """The layers of block `index` that may be quantised, by name inside the block."""
        return dict(self._block_parts(index).layers)

    def stages(self, index: int) -> tuple[Stage, ...]:
        """The stages of block `index` in the order they run; each layer is in one."""
        return stages_of(self._family, self._block_parts(index))

    def kept(self, index: int) -> tuple[str, ...]:
        """Checkpoint names of the block's modules that are never quantised, such as routers."""
        prefix, parts = self.block_name(index), self._block_parts(index)
        fused = fused_experts(self._skeleton.blocks[index])
        experts = (self._stored.name(f"{prefix}.{name}.down_proj") for name in fused)
        matrices = (self.stored_name(f"{prefix}.{name}") for name in parts.kept)
        return (*matrices, *(name.rpartition(".")[0] for name in experts))

    def outside(self) -> tuple[str, ...]:
        """Checkpoint names of the linear layers outside the blocks.

        Weight matrices that the checkpoint has and the model has not, such as those of layers that
        predict further tokens, count as such.
        """
        named = dict(self._skeleton.model.named_modules())
        outer = [name for name in named if not name.startswith(f"{self._skeleton.path}.")]
        linears = [name for name in outer if isinstance(named[name], nn.Linear)]
        claimed = {self._stored.name(name) for name, _ in self._skeleton.tensors()}
        unclaimed = (
            name.removesuffix(".weight")
            for name, header in self._stored.headers.items()
            if name.endswith(".weight") and len(header.shape) == 2 and name not in claimed
        )
        stored = (self.stored_name(name) for name in linears)
        return tuple(dict.fromkeys((*stored, *unclaimed)))

    def block_tensors(self, index: int) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that make up block `index`."""
        prefix = self.block_name(index)
        block = self._skeleton.blocks[index]
        return tuple(self._stored.name(f"{prefix}.{name}") for name in block.state_dict())

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Block `index` with its weights, which are released at the end.

        Each time it is a new module: hooks and changes are gone with it.

        Raises:
            CheckpointError: a file cannot be read, or a weight is not finite.
        """
        prefix = self.block_name(index)
        block = copy.deepcopy(self._skeleton.blocks[index])
        slots = ((f"{prefix}.{name}", (name,)) for name in block.state_dict())
        with loaded(block, slots, self._read):
            yield block

    @contextmanager
    def open_ends(self) -> Iterator[None]:
        """Loads what is outside the blocks and makes or reads text, for `enter` and `logits`.

        Raises:
            CheckpointError: a file cannot be read, or a weight is not finite.
        """
        if self._open:
            yield
            return
        with loaded(self._skeleton.model, self._ends, self._read):
            self._open = True
            try:
                yield
            finally:
                self._open = False

    @torch.no_grad()
    def enter(
        self, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, tuple[BlockCall, ...]]:
        """What the first block reads, and how each block is called.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T], 0 where tokens are padding; None where none are.

        Returns:
            the hidden states, float [B, T, H], and a call for each block.

        Raises:
            UnsupportedScheme: more than hidden states goes from block to block.
        """
        return self._caller.enter(self._inputs(input_ids, attention_mask))

    @torch.no_grad()
    def logits(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """float [B, T, V] from the last block's output, with the model's own norm and head.

        Args:
            hidden: float [B, T, H].
            input_ids: int64 [B, T], what `enter` was given.
            attention_mask: likewise.
        """
        inputs = self._inputs(input_ids, attention_mask)
        return self._caller.logits(hidden.to(self._device), inputs)

    def _inputs(self, input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Any]:
        if not self._open:
            raise RuntimeError("the model's ends are closed: call this inside open_ends()")
        mask = None if attention_mask is None else attention_mask.to(self._device)
        ids = input_ids.to(self._device)
        return {"input_ids": ids, "attention_mask": mask}

    def _take_experts_apart(self) -> None:
        """Experts become linear layers unless the checkpoint has them in one tensor."""
        for index, block in enumerate(self._skeleton.blocks):
            for name in fused_experts(block):
                path = f"{self.block_name(index)}.{name}"
                if not self._stored.holds(f"{path}.down_proj"):
                    take_experts_apart(self._skeleton.model, path, trusted=self.known)

    def _move_buffers(self) -> None:
        model = self._skeleton.model
        for name, buffer in list(model.named_buffers()):
            assign(model, (name,), buffer.to(self._device))

    def _check_blocks(self) -> None:
        for index, block in enumerate(self._skeleton.blocks):
            self._check(self.block_name(index), block.state_dict().items())
        if not any(self._block_parts(index).layers for index in range(self.block_count)):
            raise UnsupportedScheme(
                f"the decoder blocks of {type(self._skeleton.model).__name__} have no linear layer "
                "that can be quantised."
            )

    def _check(self, prefix: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
        owner = type(self._skeleton.model).__name__
        for name, tensor in tensors:
            full = f"{prefix}.{name}" if prefix else name
            self._stored.check(full, tensor.shape, owner)

    def _block_parts(self, index: int) -> BlockParts:
        if index not in self._parts:
            block = self._skeleton.blocks[index]
            heads = heads_of(self._skeleton.text_config) if self.known else None
            self._parts[index] = block_parts(block, heads)
        return self._parts[index]

    def _end_tensors(self) -> list[tuple[str, tuple[str, ...]]]:
        """Stored name and all names of each tensor outside the blocks that text needs.

        Tied weights are one tensor that has several names, and is stored under one of them.
        """
        names: dict[int, list[str]] = {}
        shapes: dict[str, Tensor] = {}
        for name, tensor in self._skeleton.tensors():
            if self._skeleton.is_end(name):
                names.setdefault(id(tensor), []).append(name)
                shapes[name] = tensor
        slots = []
        for tied in names.values():
            source = next((name for name in tied if self._stored.holds(name)), tied[0])
            self._check("", [(source, shapes[source])])
            slots.append((source, tuple(tied)))
        return slots

    def _read(self, name: str) -> Tensor:
        """The parameter in the dtype that it computes in: some models keep a few in float32."""
        strict = getattr(self._skeleton.model, "_keep_in_fp32_modules_strict", None) or ()
        kept = any(re.search(part, name) for part in strict)
        return self._stored.read(name, torch.float32 if kept else self._dtype, self._device)
