"""What an engine holds: the bytes of its weights and cache, and what runs its layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from vllm_quantkit.integration.linear import QuantkitLinearMethod

PACKED = frozenset({"handler", "packed_weight"})
"""Variables in which vLLM's product of a 16-bit layer on a CPU keeps a packed copy of its weight,
which torch does not own."""


def cache(engine: Any) -> dict[str, int]:
    """Tokens that the KV cache holds."""
    config = engine.llm_engine.vllm_config.cache_config
    return {"tokens": config.num_gpu_blocks * config.block_size}


def memory(engine: Any) -> dict[str, Any]:
    """Bytes of weights on every rank, and of the KV cache.

    `ranks` has for each: `weights`, all distinct parameters and buffers and what vLLM packs
    besides; of these `linear`, the linear layers, and `head`; and `cache_token`, what a token takes
    over all layers, by the layers' own word. `cache` has `tokens`, `blocks` and `block_size`.
    """
    config = engine.llm_engine.vllm_config.cache_config
    blocks = {"blocks": config.num_gpu_blocks, "block_size": config.block_size}
    return {"ranks": engine.collective_rpc(rank_memory), "cache": {**cache(engine), **blocks}}


def kernels(engine: Any) -> dict[str, dict[str, str]]:
    """What runs each layer of the first rank, by its name in the model.

    `method` is vLLM's class; `kernel` the kernel that vllm-quantkit, or vLLM, chose, where it has a
    name.
    """
    (first, *_) = engine.collective_rpc(rank_kernels)
    found: dict[str, dict[str, str]] = first
    return found


def rank_memory(worker: Any) -> dict[str, int]:
    """As `memory` says, of one worker."""
    model = worker.model_runner.get_model()
    modules = dict(model.named_modules())
    linear = [module for module in modules.values() if isinstance(module, LinearBase)]
    heads = [module for module in modules.values() if isinstance(module, ParallelLMHead)]
    specs = worker.get_kv_cache_spec().values()
    return {
        "weights": _bytes(modules.values()),
        "linear": _bytes(linear),
        "head": _bytes(heads),
        "cache_token": sum(spec.page_size_bytes // spec.block_size for spec in specs),
    }


def rank_kernels(worker: Any) -> dict[str, dict[str, str]]:
    """As `kernels` says, of one worker."""
    found = {}
    for name, module in worker.model_runner.get_model().named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            found[name] = {"method": type(method).__name__, "kernel": _kernel(module, method)}
    return found


def _kernel(module: nn.Module, method: Any) -> str:
    """The name of a layer's kernel; empty where its method is all there is."""
    if isinstance(method, QuantkitLinearMethod):
        return method.kernel
    for owner in (method, getattr(module, "scheme", None)):
        for attribute in ("kernel", "fp8_linear"):
            kernel = getattr(owner, attribute, None)
            if kernel is not None:
                return type(kernel).__name__
    return ""


def _bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the modules' own parameters and buffers, each storage once, and of packed copies."""
    storages, packed = {}, 0
    for module in modules:
        owned = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        storages.update({_address(tensor): tensor.untyped_storage().nbytes() for tensor in owned})
        packed += _packed_bytes(module)
    return sum(storages.values()) + packed


def _address(tensor: Tensor) -> tuple[str, int]:
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def _packed_bytes(module: Any) -> int:
    """Bytes of the copy that vLLM has packed for its own product; 0 where there is none."""
    product = getattr(module, "cpu_linear", None)
    names = getattr(getattr(product, "__code__", None), "co_freevars", ())
    if not PACKED.intersection(names):
        return 0
    weight = module.weight
    if weight.numel():  # an embedding, whose rows are still looked up
        return int(weight.numel() * weight.element_size())
    size = module.input_size_per_partition * module.output_size_per_partition
    return int(size * module.params_dtype.itemsize)
