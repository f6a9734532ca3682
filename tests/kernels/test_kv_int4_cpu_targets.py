"""Code of the 4-bit cache's kernels for other processors: run where it can be, else read."""

from __future__ import annotations

import platform
import re

import pytest
import torch

from quantkit_kernels.cpu.native import Processor, assembly
from quantkit_kernels.kv_int4 import CacheLayout, Softmax, cpu, cpu_plan, cpu_workers
from quantkit_kernels.kv_int4 import cpu_attend as attending
from quantkit_kernels.kv_int4 import cpu_gather as gathering
from quantkit_kernels.kv_int4 import cpu_write as writing
from quantkit_kernels.kv_int4.cpu_variant import AttendVariant
from tests.kernels.cpu_targets import ARM, HASWELL, NEOVERSE, SAPPHIRE_RAPIDS, X86, loop_of
from tests.kernels.kv_int4_cases import Case, bound, build, expected, relative

LAYOUT = CacheLayout(64, 16)
VARIANT = AttendVariant(LAYOUT, "bf16", 2, 2, scale=True, shift=True, softcap=True, sinks=True)
MODULES = {
    "attend": attending.build_module(VARIANT),
    "attend f16": attending.build_module(AttendVariant(CacheLayout(80, 16), "f16", 3, 2)),
    "write": writing.build_module(writing.WriteVariant(LAYOUT, "f16", True, True)),
    "write 80": writing.build_module(writing.WriteVariant(CacheLayout(80, 16), "bf16", True, True)),
    "gather": gathering.build_module(gathering.GatherVariant(LAYOUT, "bf16", "f16")),
}


@pytest.mark.parametrize("name", MODULES)
def test_other_processors_need_no_library(name: str) -> None:
    module = MODULES[name]
    avx2 = assembly(module, Processor(HASWELL.name, ""), X86)
    neon = assembly(module, Processor(NEOVERSE.name, ""), ARM)
    avx512 = assembly(module, Processor(SAPPHIRE_RAPIDS.name, ""), X86)
    assert "ymm" in avx2
    assert "zmm" not in avx2
    assert "zmm" in avx512
    assert "fmla" in neon or "fmul" in neon
    own = {function.name for function in module.functions}
    # What the processor cannot do would be a call to a library that is not there. X86 calls the
    # module's own functions by addresses in registers.
    called = re.findall(r"^\s+(?:call\w*|bl)\s+([^*\s]+)", avx512 + avx2 + neon, re.MULTILINE)
    called += re.findall(r"^\s+movabsq\s+\$([a-z_]\w*),", avx512 + avx2, re.MULTILINE)
    assert {name.split("@")[0] for name in called} <= own


def test_codes_are_multiplied_as_integers_from_registers() -> None:
    """A token's share of the loops: nothing spilled, no code converted to float32."""
    variant = AttendVariant(CacheLayout(128, 128), "bf16", 4, 4, integers=True)
    text = assembly(attending.build_module(variant), Processor(SAPPHIRE_RAPIDS.name, ""), X86)
    # 16 words of four bytes of 16 tokens, or four times four tokens; two nibbles, rows and bytes.
    for function, products in (("keys", 16 * 2 * 4 * 2), ("values", 4 * 2 * 4 * 2)):
        loop = loop_of(function, text)
        assert len(re.findall(r"\bvpdpbusd\b.*zmm", loop)) == products
        assert not re.search(r"zmm\d+, .*\(%rsp\)|\(%rsp\), %zmm", loop)


def test_a_float16_query_is_multiplied_as_integers_only_with_vnni(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen = []
    for features in ({"avx512f", "avx512bw", "avx512vnni"}, {"avx512f", "avx512bw"}, set()):
        monkeypatch.setattr(cpu_plan, "host_features", lambda features=features: features)
        for dtype in (torch.float16, torch.float32):
            variant = cpu_plan.attend_variant(LAYOUT, dtype, 4, 3, Softmax(0.2), True, True, False)
            chosen.append((variant.integers, variant.rows))
    assert chosen == [(True, 6), (False, 6), (False, 6), (False, 6), (False, 2), (False, 2)]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs code for x86-64")
def test_without_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_plan, "host_features", set)
    monkeypatch.setattr(cpu_workers, "host_processor", lambda: Processor(HASWELL.name, ""))
    monkeypatch.setattr(cpu_workers, "_workers", {})
    cpu_plan.plan.cache_clear()
    for dtype in (torch.float32, torch.float16):
        softmax = Softmax(0.2, 17, 3.0)
        step = build(Case(lengths=((150, 1), (20, 2)), softmax=softmax, sinks=True, dtype=dtype))
        for request, (key, value) in enumerate(step.tokens):
            slots = step.slots(request)
            cpu.write(key, value, step.cache, slots, step.case.layout, step.treatment)
        want = expected(step)
        cpu.attend(step.query, *step.attention)
        assert relative(step.out, want) <= bound(dtype)
    cpu_plan.plan.cache_clear()
