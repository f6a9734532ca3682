"""What vLLM without the plugin does, by its own rules; expectations read in its source by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.check.check_cases import AWQ, FP8, FP8_BLOCKS, GPTQ, check, compressed, eight_bit
from tests.check.check_cases import write_config as config
from vllm_quantkit.check.plain.kernels import KERNELS
from vllm_quantkit.check.plain.verdicts import VERDICTS

SYMMETRIC_8 = compressed(num_bits=8, strategy="channel", group_size=None)
STATIC = {**FP8, "activation_scheme": "static"}
INT8, FP8_CHANNELS = eight_bit(), eight_bit(type="float")

SERVED: list[tuple[dict[str, Any] | None, str, str, str]] = [
    (None, "H200", "0.32", "16-bit product"),
    (None, "cpu", "0.27", "16-bit product"),
    # Machete is first on Hopper and nowhere else.
    (GPTQ, "H200", "0.32", "Machete"),
    (AWQ, "H200", "0.27", "Machete"),
    (GPTQ, "B200", "0.32", "Marlin"),
    (GPTQ, "A100", "0.32", "Marlin"),
    (AWQ, "L40S", "0.32", "Marlin"),
    (GPTQ, "T4", "0.32", "Marlin"),
    ({**GPTQ, "group_size": 32}, "H200", "0.32", "Marlin"),
    (compressed(symmetric=False), "H200", "0.32", "Machete"),
    (compressed(group_size=256), "A100", "0.32", "Triton W4A16"),
    ({**AWQ, "group_size": 16}, "A100", "0.32", "Triton AWQ"),
    # AllSpark was for 8 bits per channel, before Hopper.
    (SYMMETRIC_8, "A100", "0.27", "AllSpark"),
    (SYMMETRIC_8, "A100", "0.32", "Marlin"),
    (SYMMETRIC_8, "H200", "0.27", "Machete"),
    # Activation order went with 0.30; a single group has none.
    ({**GPTQ, "desc_act": True}, "A100", "0.27", "Marlin"),
    ({**GPTQ, "desc_act": True, "group_size": -1}, "A100", "0.32", "Marlin"),
    (INT8, "A100", "0.32", "CUTLASS INT8"),
    (INT8, "cpu", "0.32", "oneDNN INT8"),
    (FP8, "L40S", "0.32", "CUTLASS FP8"),
    (STATIC, "H200", "0.27", "CUTLASS FP8"),
    (FP8_CHANNELS, "A100", "0.32", "Marlin FP8, weight-only"),
    (FP8_CHANNELS, "cpu", "0.32", "ATen FP8"),
    (FP8_BLOCKS, "H200", "0.32", "DeepGEMM or CUTLASS FP8"),
    (FP8_BLOCKS, "L40S", "0.27", "Triton FP8 blocks"),
    (FP8_BLOCKS, "A100", "0.32", "Marlin FP8, weight-only"),
    (GPTQ, "cpu", "0.32", "CPU WNA16"),
    (AWQ, "cpu", "0.27", "CPU WNA16"),
]


@pytest.mark.parametrize(("quantization", "gpu", "vllm", "family"), SERVED)
def test_what_it_serves(quantization, gpu, vllm, family, tmp_path: Path):
    report = check(config(tmp_path, quantization), gpu=gpu, vllm=vllm)

    plain = report.plain_vllm
    assert plain is not None
    assert plain.serves == "yes", plain.summary
    blocks = {group.kernel for group in plain.groups if group.layers != "lm_head"}
    assert blocks == {family}
    assert report.served_by == "vllm"


REFUSED: list[tuple[dict[str, Any], str, str, str]] = [
    ({**GPTQ, "sym": False}, "H200", "0.32", "GPTQ with zero-points is not served"),
    ({**GPTQ, "bits": 3}, "A100", "0.27", "4 and 8 bits only"),
    ({**GPTQ, "desc_act": True}, "H200", "0.32", "activation order"),
    (compressed(actorder="group"), "H200", "0.30", "activation order"),
    ({**GPTQ, "quant_method": "gptq_v2"}, "H200", "0.32", "does not know quant_method 'gptq_v2'"),
    ({**GPTQ, "bits": 8}, "cpu", "0.32", "CPU WNA16 takes no 8 bits without zero-points"),
    ({**GPTQ, "group_size": 16}, "cpu", "0.32", "CPU WNA16 takes no groups of 16"),
    (compressed(num_bits=5), "H200", "0.32", "Marlin takes no 5 bits without zero-points"),
    (compressed(group_size=16), "A100", "0.32", "Marlin takes no groups of 16"),
    (eight_bit(activations=False), "H200", "0.32", "8-bit activations only"),
    (INT8, "B200", "0.32", "no INT8 product from compute capability 10.0"),
    (INT8, "V100", "0.32", "need compute capability 7.5"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "H200", "0.32", "removed"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "cpu", "0.27", "no CPU path"),
    ({**FP8, "fmt": "e5m2"}, "H200", "0.32", "E4M3, not E5M2"),
]


@pytest.mark.parametrize(("quantization", "gpu", "vllm", "words"), REFUSED)
def test_what_it_refuses_the_plugin_claims_unasked(quantization, gpu, vllm, words, tmp_path: Path):
    report = check(config(tmp_path, quantization), gpu=gpu, vllm=vllm)

    plain = report.plain_vllm
    assert plain is not None
    assert plain.serves == "no"
    assert words in plain.summary
    assert "(vllm/" in plain.summary or "(csrc/" in plain.summary
    assert report.served_by == "quantkit"


def test_what_it_served_and_no_longer_does_is_unknown_in_between(tmp_path: Path):
    folder = config(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True})

    answers = [check(folder, vllm=f"0.{minor}").plain_vllm.serves for minor in (27, 29, 32)]

    assert answers == ["yes", "unknown", "no"]


def test_a_dialect_that_nobody_here_reads_is_unknown(tmp_path: Path):
    report = check(config(tmp_path, {"quant_method": "modelopt", "quant_algo": "NVFP4"}))

    assert report.plain_vllm.serves == "unknown"
    assert "modelopt" in report.plain_vllm.summary
    assert report.serves
    assert any("modelopt" in warning for warning in report.warnings)


def test_a_cache_that_a_cpu_misreads(tmp_path: Path):
    report = check(config(tmp_path), gpu="cpu", kv_cache_dtype="int8_per_token_head")

    assert report.plain_vllm.serves == "no"
    assert "reads something else" in report.plain_vllm.summary
    assert not report.serves


def test_ranks_that_cut_a_group(tmp_path: Path):
    """256 + 64 input channels: each of two ranks has one group and a half."""
    folder = config(tmp_path, compressed(), intermediate_size=384)

    one, two = (check(folder, gpu="A100", tp=tp).plain_vllm for tp in (1, 2))

    assert one.serves == "yes"
    assert two.serves == "no"
    assert "192 input channels a rank, which cut a group of 128" in two.summary


def test_every_rule_names_its_source():
    for rule in (*VERDICTS, *KERNELS):
        assert rule.source.startswith(("vllm/", "csrc/")), rule
