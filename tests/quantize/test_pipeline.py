"""The whole quantiser on tiny models: what it writes is what it measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.quantize.quantized_runs import (
    dequantized,
    load,
    logits,
    perplexity,
    random_sets,
    run,
    stored_tensors,
)
from tests.tiny_models import create_tiny_model
from vllm_quantkit.errors import CheckpointError, ConfigError, QuantkitError
from vllm_quantkit.formats import get_format
from vllm_quantkit.quantize.output.report import REPORT_FILE, read_report

SETS = random_sets()
ODD = {"scheme": "gptq", "bits": 3, "group_size": 32, "symmetric": False, "act_order": "group"}
WEIGHT_ONLY = [
    {"scheme": "rtn"},
    {"scheme": "mse", "bits": 3, "group_size": 32},
    {"scheme": "int8"},
    {"scheme": "gptq"},
    {"scheme": "gptq", "true_sequential": True},
    {"scheme": "awq"},
    {"scheme": "awq+gptq", "group_size": 32},
    {"scheme": "awq", "format": "awq"},
    {"scheme": "gptq", "format": "gptq"},
    ODD | {"format": "gptq"},
    ODD | {"format": "quantkit"},
    {"scheme": "fp8", "activations": "none", "format": "quantkit"},
    {
        "scheme": "gptq",
        "group_size": 64,
        "layers": [
            {"match": r"re:.*down_proj", "bits": 8},
            {"match": r"re:.*layers\.1\..*o_proj", "scheme": "none"},
        ],
    },
]
EIGHT_BIT = [
    {"scheme": "smoothquant"},
    {"scheme": "smoothquant", "alpha": 0.5, "activations": "static"},
    {"scheme": "smoothquant+gptq"},
    {"scheme": "fp8"},
    {"scheme": "fp8", "scales": "tensor", "activations": "static"},
    {"scheme": "fp8-block"},
]


def words(keys: dict[str, object]) -> str:
    return " ".join(str(value) for value in keys.values() if not isinstance(value, list))


@pytest.mark.parametrize("keys", WEIGHT_ONLY, ids=words)
def test_the_written_model_has_the_quality_that_was_measured(
    keys: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = run(llama, out, keys, SETS)
    assert report.quality is not None
    ids = SETS.held_out.input_ids
    # Blocks run one by one in the same arithmetic: only the order of sums in the head can differ.
    assert report.quality.perplexity_before == pytest.approx(perplexity(load(llama), ids), rel=1e-4)
    written = dequantized(llama, out)
    assert report.quality.perplexity_after == pytest.approx(perplexity(written, ids), rel=1e-4)
    assert 0 < report.quality.divergence_mean < 1.5
    assert len(report.layers) == 13 if "layers" in keys else 14
    assert all(layer.output_error and 0 < layer.output_error < 0.6 for layer in report.layers)
    assert not report.notes
    assert read_report(out / REPORT_FILE) == report


@pytest.mark.parametrize("keys", EIGHT_BIT, ids=words)
def test_quality_counts_the_activations(
    keys: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = run(llama, out, keys, SETS)
    assert report.quality is not None
    weights_only = logits(dequantized(llama, out), SETS.held_out.input_ids).log_softmax(-1)
    original = logits(load(llama), SETS.held_out.input_ids).log_softmax(-1)
    of_weights = float((original.exp() * (original - weights_only)).sum(-1).mean())
    assert 0 < of_weights < report.quality.divergence_mean < 0.1
    assert len(report.layers) == 14


@pytest.mark.parametrize("scheme", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3"])
def test_transforms_alone_change_no_logits(family: str, scheme: str, tmp_path: Path) -> None:
    """With 8 bits in small groups what is left of the error is that of norms in 16 bits."""
    source = create_tiny_model(family, tmp_path / "source", dtype=torch.float32)
    keys = (
        {"bits": 8, "group_size": 32} if scheme == "awq" else {"alpha": 0.5, "activations": "none"}
    )
    run(source, tmp_path / "out", {"scheme": scheme, "format": "quantkit"} | keys, SETS)
    model = dequantized(source, tmp_path / "out")
    original = load(source)
    changed = [
        name
        for name, value in model.named_parameters()
        if value.dim() == 1 and not torch.equal(value, original.get_parameter(name))
    ]
    assert any("norm" in name for name in changed), "norms took scales"
    before, after = (logits(m, SETS.held_out.input_ids) for m in (original, model))
    # 8-bit codes alone leave 0.3 to 1 % here; a scale that is not undone leaves 100 %.
    assert float((after - before).norm() / before.norm()) < 0.03


def test_config_tokenizer_and_template_come_along(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(llama, out, {"scheme": "rtn"})
    config = json.loads((out / "config.json").read_text())
    rules = get_format("compressed-tensors").parse(config.pop("quantization_config"))
    assert config == json.loads((llama / "config.json").read_text())
    assert rules.scheme_for("lm_head") is None
    names = {path.name for path in llama.iterdir()}
    assert {path.name for path in out.iterdir()} == names | {REPORT_FILE, "README.md"}
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= names
    assert "vllm serve" in (out / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no temporary folder stays"


def test_without_text_quality_is_not_measured(llama: Path, tmp_path: Path) -> None:
    report = run(llama, tmp_path / "out", {"scheme": "fp8"})
    assert report.quality is None
    assert report.not_measured == "no held-out text was given"
    assert all(layer.output_error is None for layer in report.layers)
    assert all(0 < layer.weight_error < 0.05 for layer in report.layers)


@pytest.mark.parametrize("keys", [{"scheme": "awq+gptq"}, {"scheme": "smoothquant"}], ids=words)
def test_same_input_same_bytes(keys: dict[str, object], llama: Path, tmp_path: Path) -> None:
    for place in ("cpu", "disk"):
        run(llama, tmp_path / place, keys, SETS, hidden_states=place)
    for path in (tmp_path / "cpu").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "disk" / path.name).read_bytes(), path.name


def test_calibrating_in_bfloat16_costs_little(llama: Path, tmp_path: Path) -> None:
    reports = [
        run(llama, tmp_path / precision, {"scheme": "gptq"}, SETS, precision=precision)
        for precision in ("float32", "bfloat16")
    ]
    first, second = (report.quality for report in reports)
    assert first is not None
    assert second is not None
    assert first.perplexity_before == second.perplexity_before, "measured in float32"
    assert second.divergence_mean == pytest.approx(first.divergence_mean, rel=0.1)
    assert second.divergence_mean != first.divergence_mean


def test_little_room_for_sums_means_more_passes(llama: Path, tmp_path: Path) -> None:
    """What a layer sees is the same; float32 sums of scaled inputs differ in their last bits."""
    one = run(llama, tmp_path / "one", {"scheme": "awq"}, SETS)
    many = run(llama, tmp_path / "many", {"scheme": "awq"}, SETS, statistics_gib=1e-4)
    assert one.quality is not None
    assert many.quality is not None
    close = pytest.approx(one.quality.divergence_mean, rel=0.05)
    assert many.quality.divergence_mean == close


def test_later_blocks_see_the_errors_of_earlier_ones(llama: Path, tmp_path: Path) -> None:
    """Block 1 is calibrated on what the written block 0 makes of the text."""
    report = run(llama, tmp_path / "out", {"scheme": "rtn", "bits": 2, "group_size": 64}, SETS)
    model, original = dequantized(llama, tmp_path / "out"), load(llama)
    name = "model.layers.1.mlp.gate_proj"
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    block = model.model.layers[1]
    block.load_state_dict(original.model.layers[1].state_dict())
    logits(model, SETS.calibration.input_ids)
    x, weight = seen[0], original.get_submodule(name).weight.detach()
    rounded = dequantized(llama, tmp_path / "out").get_submodule(name).weight.detach()
    error = float((x @ (weight - rounded).T).norm() / (x @ weight.T).norm())
    found = next(layer.output_error for layer in report.layers if layer.name == name)
    # All inputs are kept as a sample here, so only the order of sums differs.
    assert found == pytest.approx(error, rel=1e-3)


def test_padded_samples_run_without_their_padding(llama: Path, tmp_path: Path) -> None:
    ids = SETS.calibration.input_ids.clone()
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    padded = SETS.calibration.__class__(ids, mask, "padded")
    cut = SETS.calibration.__class__(ids[:, :20], None, "cut")
    outs = tmp_path / "padded", tmp_path / "cut"
    for out, tokens in zip(outs, (padded, cut), strict=True):
        run(llama, out, {"scheme": "gptq"}, SETS._replace(calibration=tokens), batch_tokens=1)
    a, b = (stored_tensors(out) for out in outs)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_experts_are_quantised_one_by_one(family: str, tmp_path: Path) -> None:
    source = create_tiny_model(family, tmp_path / "source")
    report = run(
        source, tmp_path / "out", {"scheme": "awq+gptq", "bits": 8, "group_size": 32}, SETS
    )
    experts = [layer for layer in report.layers if ".experts." in layer.name]
    assert len(experts) >= 6
    assert report.coverage
    for counts in report.coverage.values():
        assert sum(counts) > SETS.calibration.tokens / 2
    stored = stored_tensors(tmp_path / "out")
    assert all(f"{layer.name}.weight_packed" in stored for layer in experts)
    assert report.quality is not None
    # 8 bits: a wrong expert would cost more than 1.
    assert 0 < report.quality.divergence_mean < 0.1


def test_an_expert_that_saw_nothing_is_named(tmp_path: Path) -> None:
    source = create_tiny_model("mixtral", tmp_path / "source")
    few = random_sets(samples=2, length=2)
    report = run(source, tmp_path / "out", {"scheme": "gptq", "group_size": 32}, few)
    unseen = {layer.name for layer in report.layers if layer.tokens == 0}
    assert unseen
    assert unseen <= report.notes.keys()
    routed = run(
        source,
        tmp_path / "all",
        {"scheme": "gptq", "group_size": 32, "route_all": True},
        few,
    )
    assert all(layer.tokens == few.calibration.tokens for layer in routed.layers)
    assert any(0 in counts for counts in routed.coverage.values()), "coverage is the router's"


@pytest.mark.parametrize("scheme", ["rtn", "gptq", "fp8", "awq"])
def test_an_unknown_architecture_is_quantised_without_smoothing(
    scheme: str, tmp_path: Path
) -> None:
    source = create_tiny_model("olmo2", tmp_path / "source")
    report = run(source, tmp_path / "out", {"scheme": scheme}, SETS)
    assert len(report.layers) == 14
    notes = [layer.note for layer in report.layers]
    assert all("not scaled: no op before" in note for note in notes) == (scheme == "awq")


def test_rehearsed_blocks_leave_no_trace(llama: Path, tmp_path: Path) -> None:
    for name, rehearse in (("plain", ()), ("rehearsed", (0, 1))):
        run(llama, tmp_path / name, {"scheme": "smoothquant"}, SETS, rehearse=rehearse)
    a, b = (tmp_path / name / "model.safetensors" for name in ("plain", "rehearsed"))
    assert a.read_bytes() == b.read_bytes()


def test_a_broken_last_block_fails_in_rehearsal(llama: Path, tmp_path: Path) -> None:
    source = break_weight(llama, tmp_path / "broken", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        run(source, tmp_path / "out", {"scheme": "gptq"}, SETS, rehearse=(1,))
    assert not list((tmp_path / "out.partial" / "blocks").glob("*.json"))
    assert not (tmp_path / "out").exists()


def test_a_layer_that_no_scale_can_hold_is_named(llama: Path, tmp_path: Path) -> None:
    tensors = stored_tensors(llama)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e7
    source = with_tensors(llama, tmp_path / "large", tensors)
    with pytest.raises(QuantkitError, match=r"model\.layers\.1\.mlp\.up_proj: a scale of"):
        run(source, tmp_path / "out", {"scheme": "rtn", "format": "gptq"})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scheme": "awq"}, "needs calibration text"),
        (
            {"scheme": "rtn", "layers": [{"match": r"re:.*q_proj", "bits": 8}]},
            r"q_proj and model\.layers\.0\.self_attn\.k_proj are one layer in serving engines",
        ),
        (
            {"scheme": "rtn", "layers": [{"match": "h.0.attn", "bits": 8}]},
            r"the rule for h\.0\.attn matches no layer; layers are called model\.layers\.0",
        ),
        ({"scheme": "none"}, "leaves every layer in 16 bits"),
        (
            {"scheme": "rtn", "format": "awq", "bits": 3},
            r"model\.layers\.0.*awq cannot store weights of bits 3",
        ),
        ({"scheme": "fp8", "format": "gptq"}, r"model\.layers\.0"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    keys: dict[str, object], message: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(QuantkitError, match=message):
        run(llama, tmp_path / "out", keys)
    assert not list(tmp_path.iterdir())


def test_experts_of_a_block_are_alike(tmp_path: Path) -> None:
    source = create_tiny_model("qwen3_moe", tmp_path / "source")
    rule = {"match": r"re:.*experts\.\d+\.down_proj", "bits": 8}
    with pytest.raises(ConfigError, match="serving engines keep all experts of a block in one"):
        run(source, tmp_path / "out", {"scheme": "rtn", "layers": [rule]})


def test_static_scales_that_halves_disagree_on_are_refused(llama: Path, tmp_path: Path) -> None:
    tensors = stored_tensors(llama)
    # One channel of a token that only one half of the samples holds stands out behind the norm.
    tensors["model.embed_tokens.weight"][7] = 0
    tensors["model.embed_tokens.weight"][7, 3] = 1
    source = with_tensors(llama, tmp_path / "odd", tensors)
    ids = SETS.calibration.input_ids.clone()
    ids[ids == 7] = 8
    ids[0, 5] = 7
    sets = SETS._replace(calibration=SETS.calibration.__class__(ids, None, "odd"))
    keys = {"scheme": "int8", "activations": "static"}
    with pytest.raises(QuantkitError, match="halves of the calibration set give static"):
        run(source, tmp_path / "out", keys, sets)


def test_an_existing_folder_is_never_overwritten(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already exists"):
        run(llama, tmp_path, {"scheme": "rtn"})


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    source = create_tiny_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(QuantkitError, match="Linear"):
        run(source, tmp_path / "out", {"scheme": "rtn"})


def test_device_that_is_not_there_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device 'cuda:99' cannot be used"):
        run(llama, tmp_path / "out", {"scheme": "rtn"}, device="cuda:99")


def test_group_size_fits_the_model(tmp_path: Path) -> None:
    source = create_tiny_model("llama", tmp_path / "source", hidden_size=192, head_dim=48)
    report = run(source, tmp_path / "out", {"scheme": "rtn"})
    assert report.scheme == {"4 bits, group 64": 14}
    fixed = run(source, tmp_path / "fixed", {"scheme": "rtn", "group_size": 128})
    assert fixed.scheme == {"4 bits, group 128": 14}


def break_weight(source: Path, out: Path, name: str) -> Path:
    tensors = stored_tensors(source)
    tensors[name][0, 0] = float("nan")
    return with_tensors(source, out, tensors)


def with_tensors(source: Path, out: Path, tensors: dict[str, torch.Tensor]) -> Path:
    out.mkdir()
    for path in source.iterdir():
        if not re.search(r"\.safetensors$", path.name):
            (out / path.name).write_bytes(path.read_bytes())
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
