"""What `--schemes` names, and what it refuses before an engine starts."""

from __future__ import annotations

import pytest

from vllm_quantkit.bench.schemes import Scheme, make_spec, model_config, parse_schemes
from vllm_quantkit.engine import EngineSpec
from vllm_quantkit.errors import ConfigError, UnsupportedScheme

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
CONFIGS = {"PLAIN": None, "OUT-AWQ": AWQ}
BASE = EngineSpec("PLAIN", max_model_len=300, options=(("enforce_eager", True),))


def made(text: str, model: str = "PLAIN", base: EngineSpec = BASE) -> EngineSpec:
    (scheme,) = parse_schemes(text, CONFIGS[model])
    return make_spec(scheme, model, base, CONFIGS.__getitem__)


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("16-bit", Scheme("16-bit", None, "16-bit", False)),
        ("vllm:fp8", Scheme("vllm:fp8", None, "vllm:fp8", False)),
        ("quantkit-int4+kv4", Scheme("quantkit-int4+kv4", None, "quantkit-int4", True)),
        ("awq=OUT-AWQ", Scheme("awq", "OUT-AWQ", None, False)),
        ("awq=OUT-AWQ+kv4", Scheme("awq", "OUT-AWQ", None, True)),
        ("mine=a=b@vllm", Scheme("mine", "a=b", "vllm", False)),
    ],
)
def test_every_form_is_read(text, scheme):
    assert Scheme.parse(text) == scheme


@pytest.mark.parametrize("text", ["int9", "=OUT", "a=", "a=OUT@int9", ""])
def test_what_has_no_form_is_refused(text):
    with pytest.raises(ConfigError, match="is no scheme: give 16-bit; vllm"):
        Scheme.parse(text)


def test_a_list_has_names_of_its_own():
    assert [s.label for s in parse_schemes(" 16-bit, quantkit-fp8 ,", None)] == [
        "16-bit",
        "quantkit-fp8",
    ]
    with pytest.raises(ConfigError, match="has 'awq' twice: give each a name of its own"):
        parse_schemes("awq=A,awq=B", None)
    with pytest.raises(ConfigError, match="names no scheme"):
        parse_schemes(",", None)


def test_the_default_is_what_the_checkpoint_is():
    assert [s.label for s in parse_schemes(None, None)] == ["16-bit"]
    assert [s.label for s in parse_schemes(None, AWQ)] == ["quantkit"]


@pytest.mark.parametrize(
    ("text", "model", "quantization"),
    [
        ("16-bit", "PLAIN", None),
        ("bf16", "PLAIN", None),
        ("vllm", "PLAIN", None),
        ("vllm:fp8", "PLAIN", "fp8"),
        ("quantkit-fp8", "PLAIN", "quantkit-fp8"),
        ("awq=OUT-AWQ", "OUT-AWQ", "quantkit"),
        ("awq=OUT-AWQ@quantkit-awq", "OUT-AWQ", "quantkit-awq"),
        ("awq=OUT-AWQ@vllm:awq", "OUT-AWQ", "awq"),
        ("other=PLAIN", "PLAIN", None),
    ],
)
def test_a_scheme_is_an_engine(text, model, quantization):
    spec = made(text)
    assert (spec.model, spec.quantization) == (model, quantization)
    assert spec.max_model_len == 300
    assert spec.options == (("enforce_eager", True),)


def test_an_int4_cache_is_an_option_of_quantkit():
    assert made("16-bit+kv4").quantization == "quantkit-kv4"
    given = {"quantkit": {"group_size": 64, "kv_cache": {"prefill": "cached"}}, "other": 1}
    base = EngineSpec("PLAIN", options=(("additional_config", given),))
    spec = made("quantkit-int4+kv4", base=base)
    assert dict(spec.options)["additional_config"] == {
        "quantkit": {"group_size": 64, "kv_cache": {"prefill": "cached", "dtype": "int4"}},
        "other": 1,
    }
    assert given["quantkit"]["kv_cache"] == {"prefill": "cached"}


def test_a_quantised_model_has_no_16_bits():
    with pytest.raises(ConfigError, match=r"quantised already .*'awq'.*16-bit=FOLDER"):
        made("16-bit", "OUT-AWQ")


def test_plain_vllm_has_no_int4_cache():
    with pytest.raises(UnsupportedScheme, match="plain vLLM has none"):
        made("vllm+kv4")


def test_a_method_that_needs_calibration_is_refused_at_load():
    with pytest.raises(UnsupportedScheme, match="serves checkpoints that are already quantised"):
        made("quantkit-awq")


def test_a_method_for_another_checkpoint_is_refused():
    with pytest.raises(UnsupportedScheme, match="this checkpoint says"):
        made("awq=OUT-AWQ@quantkit-fp8")


def test_an_option_of_another_method_is_refused():
    base = EngineSpec("PLAIN", options=(("additional_config", {"quantkit": {"group": 3}}),))
    with pytest.raises(ConfigError, match="group"):
        made("quantkit-int4", base=base)


def test_the_config_is_read_from_the_folder():
    assert model_config("examples/tiny-lm/bf16") is None
    found = model_config("examples/tiny-lm/awq")
    assert found is not None
    assert found["quant_method"] == "awq"
