"""What vLLM 0.26 to 0.33 does not serve itself, whatever a layer's size; the first that applies.

Read in 0.27.1 and 0.32.0, whose answers hold for the releases beside them; what changed between the
two, and is told apart here, is `unknown` in between.
"""

from __future__ import annotations

from vllm_quantkit.check.plain.rule import Verdict, When
from vllm_quantkit.check.plain.sources import (
    AWQ,
    COMPRESSED,
    GPTQ,
    LINEAR,
    NEW,
    ORDERLESS,
    QUANTIZATION,
)

VERDICTS = (
    Verdict(
        when=When(methods=("quantkit",)),
        answer="no",
        reason="vLLM does not know the dialect 'quantkit'",
        source=f"{QUANTIZATION}/__init__.py",
    ),
    Verdict(
        when=When(methods=("gptq_v2",)),
        answer="no",
        reason="vLLM does not know quant_method 'gptq_v2'",
        source=f"{QUANTIZATION}/__init__.py",
    ),
    Verdict(
        when=When(methods=("bitsandbytes",), kind="cpu"),
        answer="no",
        reason="bitsandbytes has no CPU path in vLLM",
        source=f"{QUANTIZATION}/__init__.py",
    ),
    Verdict(
        when=When(methods=("bitsandbytes",), since=NEW),
        answer="no",
        reason="bitsandbytes was removed",
        source=f"{QUANTIZATION}/__init__.py",
    ),
    Verdict(
        when=When(code_types=("e5m2",)),
        answer="no",
        reason="vLLM's FP8 weights are E4M3, not E5M2",
        source=f"{QUANTIZATION}/fp8.py",
    ),
    Verdict(
        when=When(products=("integer weights",), methods=("gptq",), symmetric=False),
        answer="no",
        reason="GPTQ with zero-points is not served",
        source=GPTQ,
    ),
    Verdict(
        when=When(products=("integer weights",), methods=("gptq",), bits=(2, 3, 5, 6, 7)),
        answer="no",
        reason="GPTQ is served with 4 and 8 bits only",
        source=GPTQ,
    ),
    Verdict(
        when=When(act_order=True, since=ORDERLESS),
        answer="no",
        reason="activation order (desc_act, actorder 'group') is no longer served",
        source=f"{QUANTIZATION}/utils/gptq_utils.py",
    ),
    Verdict(
        when=When(methods=("awq",), variants=("gemv",)),
        answer="no",
        reason="AWQ's tensors are read as version 'gemm' only",
        source=AWQ,
    ),
    Verdict(
        when=When(
            methods=("compressed-tensors",),
            products=("integer weights",),
            variants=("int-quantized", "naive-quantized"),
        ),
        answer="no",
        reason="unpacked integer weights are served with 8-bit activations only",
        source=COMPRESSED,
    ),
    Verdict(
        when=When(methods=("compressed-tensors",), products=("INT8",), symmetric=False),
        answer="no",
        reason="INT8 weights with zero-points are not served",
        source=COMPRESSED,
    ),
    Verdict(
        when=When(products=("INT8",), kind="cuda", least=100),
        answer="no",
        reason="CUTLASS has no INT8 product from compute capability 10.0 on",
        source="csrc/libtorch_stable/quantization/w8a8/cutlass/c3x/scaled_mm_helper.hpp",
    ),
    Verdict(
        when=When(methods=("awq", "gptq", "fp8", "fbgemm_fp8"), dtypes=("float32",)),
        answer="no",
        reason="activations of float32 are not served with this quant_method",
        source="vllm/config/vllm.py",
    ),
    Verdict(
        when=When(
            products=("integer weights", "INT8", "FP8", "FP8 blocks", "FP8 weights"),
            kind="cuda",
            most=74,
        ),
        answer="no",
        reason="quantised layers need compute capability 7.5",
        source=f"{QUANTIZATION}/utils/marlin_utils.py",
    ),
    Verdict(
        when=When(methods=("fbgemm_fp8",), kind="cuda", most=79),
        answer="no",
        reason="fbgemm_fp8 needs compute capability 8.0",
        source=f"{QUANTIZATION}/fbgemm_fp8.py",
    ),
    Verdict(
        when=When(products=("FP8 weights",), kind="cpu"),
        answer="no",
        reason="FP8 weights with 16-bit activations have no CPU kernel",
        source=f"{LINEAR}/__init__.py",
    ),
    Verdict(
        when=When(products=("FP8 blocks",), kind="cpu", lacks="amx_tile"),
        answer="no",
        reason="FP8 in blocks needs a CPU with AMX",
        source=f"{LINEAR}/scaled_mm/cpu.py",
    ),
    Verdict(
        when=When(
            methods=("fp8", "fbgemm_fp8", "compressed-tensors"),
            products=("FP8",),
            kind="cpu",
            per_token_and_channel=False,
            lacks="amx_tile",
        ),
        answer="no",
        reason="on CPUs without AMX, only scales per channel and token are served",
        source=f"{LINEAR}/scaled_mm/pytorch.py",
    ),
    Verdict(
        when=When(methods=("fp8", "fbgemm_fp8"), products=("FP8",), kind="cpu", lacks="amx_tile"),
        answer="no",
        reason="on CPUs without AMX, FP8 is served from compressed-tensors only",
        source=f"{LINEAR}/scaled_mm/pytorch.py",
    ),
    Verdict(
        when=When(
            experts=True,
            products=("integer weights", "INT8", "FP8", "FP8 blocks", "FP8 weights", "code books"),
        ),
        answer="unknown",
        reason="experts have kernels of their own in vLLM, which no rule here covers",
        source="vllm/model_executor/layers/fused_moe",
    ),
)
