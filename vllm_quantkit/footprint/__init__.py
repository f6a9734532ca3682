"""What a model takes: its layers as vLLM merges and cuts them, and the memory of weights and cache.

Everything is read from config.json and the headers of safetensors files; no weight is read, and
vLLM is not imported.
"""

from vllm_quantkit.footprint.groups import layer_groups
from vllm_quantkit.footprint.kv_cache import KVCache, kv_cache_for
from vllm_quantkit.footprint.memory import Footprint, footprint
from vllm_quantkit.footprint.model import LayerGroup, Model, ModelFacts, Parallel, read_model
from vllm_quantkit.footprint.packed import packed_bytes
from vllm_quantkit.footprint.running import Workload

__all__ = [
    "Footprint",
    "KVCache",
    "LayerGroup",
    "Model",
    "ModelFacts",
    "Parallel",
    "Workload",
    "footprint",
    "kv_cache_for",
    "layer_groups",
    "packed_bytes",
    "read_model",
]
