"""The kernels of vLLM 0.26 to 0.33 in its order of preference; the first that has what it needs.

Read in 0.27.1 and 0.32.0. Optional packages that vLLM prefers where they are installed (FlashInfer,
Conch, Humming, B12x, zentorch) are left out: what is said holds without them.
"""

from __future__ import annotations

from vllm_quantkit.check.plain.rule import Kernel, Needs, When
from vllm_quantkit.check.plain.sources import AWQ, HALF, LINEAR, MARLIN_GROUPS, OLD, QUANTIZATION
from vllm_quantkit.check.release import Release

KERNELS = (
    Kernel(
        family="16-bit product",
        when=When(products=("16 bits",)),
        reason="the layer is in 16 bits",
        source="vllm/model_executor/layers/linear.py",
    ),
    Kernel(
        family="bitsandbytes",
        when=When(methods=("bitsandbytes",), kind="cuda", until=OLD),
        reason="the package bitsandbytes multiplies it",
        source=f"{QUANTIZATION}/bitsandbytes.py",
    ),
    Kernel(
        family="Machete",
        when=When(products=("integer weights",), kind="cuda", least=90, most=90),
        needs=Needs(
            types=((4, True), (4, False), (8, True), (8, False)),
            group_sizes=(-1, 64, 128),
            dtypes=HALF,
            in_multiple=64,
            out_multiple=128,
            whole_order=True,
        ),
        reason="first choice on Hopper (compute capability 9.0)",
        source=f"{LINEAR}/mixed_precision/machete.py",
    ),
    Kernel(
        family="AllSpark",
        when=When(products=("integer weights",), kind="cuda", least=80, most=89, until=OLD),
        needs=Needs(
            types=((8, True),),
            group_sizes=(-1,),
            dtypes=HALF,
            in_multiple=16,
            out_multiple=16,
        ),
        reason="first choice for 8 bits per channel on Ampere and Ada",
        source=f"{LINEAR}/mixed_precision/allspark.py",
    ),
    Kernel(
        family="Marlin",
        when=When(products=("integer weights",), kind="cuda", least=75),
        needs=Needs(
            types=((4, True), (4, False), (8, True)),
            group_sizes=MARLIN_GROUPS,
            dtypes=HALF,
            whole_groups=True,
        ),
        reason="first choice where Machete does not serve",
        source=f"{LINEAR}/mixed_precision/marlin.py",
    ),
    Kernel(
        family="Triton AWQ",
        when=When(products=("integer weights",), methods=("awq",), kind="cuda", least=75),
        needs=Needs(types=((4, False), (4, True)), dtypes=HALF, out_multiple=8, whole_groups=True),
        reason="what is left for AWQ where Marlin does not serve; slow",
        source=AWQ,
    ),
    Kernel(
        family="Exllama",
        when=When(
            products=("integer weights",), methods=("compressed-tensors",), kind="cuda", least=75
        ),
        needs=Needs(
            types=((4, True), (8, True)),
            group_sizes=(16, 32, 64, 128, 256, 512, 1024),
            dtypes=("float16",),
            out_multiple=8,
        ),
        reason="what is left for float16 where Marlin does not serve",
        source=f"{LINEAR}/mixed_precision/exllama.py",
    ),
    Kernel(
        family="Triton W4A16",
        when=When(
            products=("integer weights",), methods=("compressed-tensors",), kind="cuda", least=75
        ),
        needs=Needs(
            types=((4, True), (4, False)),
            group_sizes=(-1, 32, 64, 128, 256),
            dtypes=HALF,
            out_multiple=8,
            whole_groups=True,
        ),
        reason="what is left where Marlin does not serve; slow",
        source=f"{LINEAR}/mixed_precision/triton_w4a16.py",
    ),
    Kernel(
        family="CPU WNA16",
        when=When(products=("integer weights",), methods=("gptq",), kind="cpu"),
        needs=Needs(types=((4, True),), group_sizes=MARLIN_GROUPS, in_multiple=32, out_multiple=32),
        reason="vLLM's only 4-bit kernel on x86 CPUs",
        source=f"{LINEAR}/mixed_precision/cpu.py",
    ),
    Kernel(
        family="CPU WNA16",
        when=When(products=("integer weights",), methods=("awq", "compressed-tensors"), kind="cpu"),
        needs=Needs(
            types=((4, True), (4, False)), even_groups=True, in_multiple=32, out_multiple=32
        ),
        reason="vLLM's only 4-bit kernel on x86 CPUs",
        source=f"{LINEAR}/mixed_precision/cpu.py",
    ),
    Kernel(
        family="CUTLASS INT8",
        when=When(products=("INT8",), methods=("compressed-tensors",), kind="cuda", least=75),
        needs=Needs(group_sizes=(-1,)),
        reason="first choice for INT8 on CUDA devices before Blackwell",
        source=f"{LINEAR}/scaled_mm/cutlass.py",
    ),
    Kernel(
        family="oneDNN INT8",
        when=When(products=("INT8",), methods=("compressed-tensors",), kind="cpu"),
        needs=Needs(group_sizes=(-1,)),
        reason="vLLM's INT8 kernel on CPUs",
        source=f"{LINEAR}/scaled_mm/cpu.py",
    ),
    Kernel(
        family="CUTLASS FP8",
        when=When(products=("FP8",), kind="cuda", least=89),
        reason="first choice where tensor cores have FP8",
        source=f"{LINEAR}/scaled_mm/cutlass.py",
    ),
    Kernel(
        family="Marlin FP8, weight-only",
        when=When(products=("FP8",), kind="cuda", least=75, most=88),
        reason="this GPU has no FP8 arithmetic (compute capability below 8.9)",
        source=f"{LINEAR}/scaled_mm/marlin.py",
    ),
    Kernel(
        family="DeepGEMM or CUTLASS FP8",
        when=When(products=("FP8 blocks",), kind="cuda", least=90),
        needs=Needs(block=(128, 128), whole_groups=True),
        reason="DeepGEMM where it is installed, else CUTLASS",
        source=f"{LINEAR}/__init__.py",
    ),
    Kernel(
        family="Triton FP8 blocks",
        when=When(products=("FP8 blocks",), kind="cuda", least=89, most=89, until=OLD),
        needs=Needs(block=(128, 128), whole_groups=True),
        reason="what is left for blocks on Ada",
        source=f"{LINEAR}/scaled_mm/triton.py",
    ),
    Kernel(
        family="Marlin FP8 or Triton FP8 blocks",
        when=When(products=("FP8 blocks",), kind="cuda", least=89, most=89, since=Release(0, 28)),
        needs=Needs(block=(128, 128), whole_groups=True),
        reason="CUTLASS has no blocks on Ada; 0.32 picks Marlin, 0.27 Triton",
        source=f"{LINEAR}/__init__.py",
    ),
    Kernel(
        family="Marlin FP8, weight-only",
        when=When(products=("FP8 blocks",), kind="cuda", least=75, most=88),
        needs=Needs(block=(128, 128), whole_groups=True),
        reason="this GPU has no FP8 arithmetic (compute capability below 8.9)",
        source=f"{LINEAR}/scaled_mm/marlin.py",
    ),
    Kernel(
        family="Marlin FP8, weight-only",
        when=When(products=("FP8 weights",), kind="cuda", least=75),
        reason="the checkpoint has FP8 weights and 16-bit activations",
        source=f"{LINEAR}/scaled_mm/marlin.py",
    ),
    Kernel(
        family="ATen FP8",
        when=When(
            products=("FP8",),
            methods=("compressed-tensors",),
            kind="cpu",
            per_token_and_channel=True,
        ),
        reason="torch._scaled_mm is what CPUs have for scales per channel and token",
        source=f"{LINEAR}/scaled_mm/pytorch.py",
    ),
    Kernel(
        family="CPU FP8 blocks, AMX",
        when=When(products=("FP8 blocks",), kind="cpu"),
        needs=Needs(block=(128, 128), out_multiple=32),
        reason="AMX multiplies the weight by 16-bit activations",
        source=f"{LINEAR}/scaled_mm/cpu.py",
    ),
)
