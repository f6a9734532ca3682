"""What a check finds, and the schema of `quantkit check --json`."""

from __future__ import annotations

from typing import Literal

from vllm_quantkit.spec import Frozen, LayerShape

SCHEMA = 1
"""Of `CheckReport`: grows when a field changes its meaning or goes."""

Answer = Literal["yes", "no", "unknown"]

Subject = Literal[
    "version",
    "device",
    "architecture",
    "options",
    "checkpoint",
    "layers",
    "tensor-parallel",
    "kv-cache",
    "batch-invariance",
    "length",
    "memory",
]
"""What a blocker is about."""


class Blocker(Frozen):
    """Why the model would not be served as asked.

    Attributes:
        subject: what it is about.
        sentence: the value seen, what is allowed, and the smallest change that helps.
        layers: groups of layers it is about; empty where it is about the model.
    """

    subject: Subject
    sentence: str
    layers: tuple[str, ...] = ()


class GroupCheck(Frozen):
    """Linear layers that are alike.

    Attributes:
        layers: their name as vLLM merges them, `*` for the number of the block.
        members: the checkpoint's layers merged into the first of them.
        count: how many there are.
        blocks: numbers of the blocks that have them; empty for layers outside the blocks.
        scheme: their numerics in words.
        shape: of a whole layer.
        rank_shape: of one tensor-parallel rank's share.
        kernel: what runs it, as the engine's log calls it; empty where nothing does.
        reason: why that kernel, or why none.
    """

    layers: str
    members: tuple[str, ...]
    count: int
    blocks: tuple[int, ...]
    scheme: str
    shape: LayerShape
    rank_shape: LayerShape
    kernel: str
    reason: str


class CacheCheck(Frozen):
    """The KV cache.

    Attributes:
        stored: how keys and values are stored, in words.
        backend: what writes and reads it.
        reason: why that one.
        bytes_per_token: on one rank, over all layers.
    """

    stored: str
    backend: str
    reason: str
    bytes_per_token: int


class MemoryCheck(Frozen):
    """Bytes on one rank.

    Attributes:
        device_bytes: memory of the device.
        allowed_bytes: what the engine may take of it.
        weight_bytes: loaded and packed.
        weight_bytes_16bit: the same with every layer in 16 bits.
        activation_bytes: of the largest step.
        overhead_bytes: runtime, libraries and CUDA graphs.
        cache_bytes: left for the KV cache; negative where the rest does not fit.
        cache_tokens: tokens that fit there.
        max_model_len: longest sequence.
        sequences: of that length, that fit.
        room: False where a KV cache of the size asked for does not fit beside the rest.
        fits: True where one such sequence does.
        notes: what these numbers leave out or assume.
    """

    device_bytes: int
    allowed_bytes: int
    weight_bytes: int
    weight_bytes_16bit: int
    activation_bytes: int
    overhead_bytes: int
    cache_bytes: int
    cache_tokens: int
    max_model_len: int
    sequences: float
    room: bool = True
    fits: bool
    notes: tuple[str, ...] = ()


class PlainGroup(Frozen):
    """What vLLM without the plugin does with layers that are alike.

    Attributes:
        layers: as in `GroupCheck`.
        serves: whether it serves them; `unknown` where no rule here covers them.
        kernel: the family of kernels it picks; empty where it serves none, or nobody knows.
        reason: why.
        source: vLLM's file that decides.
    """

    layers: str
    serves: Answer
    kernel: str
    reason: str
    source: str


class PlainCheck(Frozen):
    """What vLLM without the plugin does with the checkpoint as it is stored.

    Attributes:
        serves: whether it serves it.
        summary: one sentence.
        groups: by group of layers.
    """

    serves: Answer
    summary: str
    groups: tuple[PlainGroup, ...] = ()


class CheckReport(Frozen):
    """What a check found.

    Attributes:
        schema_version: `SCHEMA`.
        serves: True where the engine will start and serve.
        model: folder, or name on the hub.
        architecture: as config.json names it; empty where it was not read.
        quantization: the name given to `--quantization`; None without one.
        served_by: whose methods run the linear layers.
        device: name of the device.
        tensor_parallel_size: ranks.
        vllm: release.
        dtype: of activations.
        blockers: why it would not be served; empty where it would.
        warnings: what works otherwise than one may expect.
        groups: linear layers.
        kv_cache: None where it could not be told.
        memory: None where it could not be told.
        plain_vllm: None where it could not be told.
        command: that starts the engine as asked; empty where it would not start.
    """

    schema_version: int = SCHEMA
    serves: bool
    model: str
    architecture: str = ""
    quantization: str | None = None
    served_by: Literal["quantkit", "vllm"] = "vllm"
    device: str = ""
    tensor_parallel_size: int = 1
    vllm: str = ""
    dtype: str = ""
    blockers: tuple[Blocker, ...] = ()
    warnings: tuple[str, ...] = ()
    groups: tuple[GroupCheck, ...] = ()
    kv_cache: CacheCheck | None = None
    memory: MemoryCheck | None = None
    plain_vllm: PlainCheck | None = None
    command: str = ""
