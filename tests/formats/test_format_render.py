"""The configs we write are accepted by the libraries whose dialect they speak."""

import pytest
from compressed_tensors.quantization import QuantizationConfig
from transformers import AwqConfig, GPTQConfig

from vllm_quantkit.formats import get_format
from vllm_quantkit.spec import SchemeSpec, WeightSpec

IGNORE = ("lm_head", "model.layers.0.mlp.gate")


def rendered(dialect, **weight):
    numerics = {"bits": 4, "group_size": 128, "symmetric": True, **weight}
    spec = SchemeSpec(dialect=dialect, weight=WeightSpec(**numerics))
    return get_format(dialect).render({"model.layers.0.self_attn.q_proj": spec}, IGNORE)


def test_transformers_reads_awq():
    config = AwqConfig.from_dict(rendered("awq"))
    assert (config.bits, config.group_size, config.zero_point) == (4, 128, True)
    assert config.modules_to_not_convert == ["lm_head", "gate"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_reads_gptq(bits):
    config = GPTQConfig.from_dict(rendered("gptq", bits=bits, symmetric=False))
    assert (config.bits, config.group_size, config.sym) == (bits, 128, False)
    assert config.format == "gptq"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [-1, 32])
def test_the_library_reads_compressed_tensors(bits, group_size):
    written = rendered("compressed-tensors", bits=bits, group_size=group_size, symmetric=False)
    config = QuantizationConfig.model_validate(written)
    weights = config.config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric) == (bits, False)
    assert weights.strategy == ("channel" if group_size == -1 else "group")
    assert config.ignore == list(IGNORE)


VLLM = "vllm.model_executor.layers.quantization"


@pytest.mark.engine
@pytest.mark.parametrize(
    ("dialect", "module", "name"),
    [
        ("awq", "auto_awq", "AutoAWQConfig"),
        ("gptq", "auto_gptq", "AutoGPTQConfig"),
        ("compressed-tensors", "compressed_tensors.compressed_tensors", "CompressedTensorsConfig"),
    ],
)
def test_vllm_reads_every_dialect(dialect, module, name):
    config_class = getattr(pytest.importorskip(f"{VLLM}.{module}"), name)
    assert config_class.from_config(rendered(dialect)) is not None
