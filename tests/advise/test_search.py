"""A scheme for each layer of the demo model: found, written, quantised, and measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.functional import log_softmax
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.advise.test_known_cases import CPU
from vllm_quantkit._safetensors import read_headers
from vllm_quantkit.advise.estimate import Estimator
from vllm_quantkit.advise.request import SearchRequest
from vllm_quantkit.advise.roofline import Rates, RooflineClock
from vllm_quantkit.advise.search.budgets import other_bytes
from vllm_quantkit.advise.search.mixture import pure_ways
from vllm_quantkit.advise.search.recipe import write_recipe
from vllm_quantkit.advise.search.running import Found, SearchAnswer, find
from vllm_quantkit.advise.search.units import SIXTEEN_BITS, alike
from vllm_quantkit.advise.search.ways import Way, measure_ways, read_ways
from vllm_quantkit.advise.workload import Workload
from vllm_quantkit.cli.app import app
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.evaluate.hf_model import load_plain, load_served
from vllm_quantkit.evaluate.sensitivity import LayerSensitivity
from vllm_quantkit.footprint import read_model
from vllm_quantkit.quantize.job import Job
from vllm_quantkit.quantize.model.model_map import Source, Stage
from vllm_quantkit.quantize.model.model_shell import ModelShell
from vllm_quantkit.quantize.progress import Silent
from vllm_quantkit.quantize.recipes.presets import LayerOptions
from vllm_quantkit.quantize.recipes.recipe_file import make_recipe, read_recipe
from vllm_quantkit.terminal import Terminal

DEMO = Path(__file__).parents[2] / "examples" / "tiny-lm"
FOLDER, TEXT = DEMO / "bf16", DEMO / "data" / "held_out.txt"
GIB = 1 << 30

GROUPS = (
    ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("self_attn.o_proj", ("self_attn.o_proj",)),
    ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.down_proj", ("mlp.down_proj",)),
)


def way(name: str, options: LayerOptions, scale: float) -> Way:
    """A way whose groups cost `scale` times 1 to 16."""
    rows = [
        LayerSensitivity(
            group=f"model.layers.{block}.{group}",
            members=tuple(f"model.layers.{block}.{member}" for member in members),
            kl=scale * (4 * block + place + 1),
            method="exact quantise",
            bits=options.bits or 8,
        )
        for block in range(4)
        for place, (group, members) in enumerate(GROUPS)
    ]
    return Way(name=name, options=options, sensitivities=tuple(rows), origin="a test")


FOUR = way("4 bits", LayerOptions(scheme="mse", bits=4), 1e-3)
EIGHT = way("int8", LayerOptions(scheme="int8"), 1e-5)
THREE = way("3 bits", LayerOptions(scheme="mse", bits=3), 1e-2)


def estimator(batch: int = 1) -> Estimator:
    """Of a CPU without fixed costs, where bytes decide."""
    rates = Rates(bandwidth=1e9, peaks={"bf16": 1e15, "int8": 1e15})
    workload = Workload(context=64, batch=batch)
    return Estimator(read_model(str(FOLDER)), CPU, workload, rates, RooflineClock(rates))


def found(ways: tuple[Way, ...], **budget: float) -> Found:
    return find(FOLDER, ways, SearchRequest(**budget), estimator())


def test_layers_that_must_be_alike_are_one_unit() -> None:
    norm = Source("norm", "norm")
    stages = (
        Stage((("q", "k", "v"),), norm),
        Stage((("o",),), None),
        Stage((("mlp.experts.0.gate", "mlp.experts.0.up"), ("mlp.experts.1.gate",)), norm),
        Stage((("mlp.experts.0.down",),), None),
        Stage((("mlp.shared.gate", "mlp.shared.up"),), norm),
    )
    assert list(alike(stages)) == [
        ("q", "k", "v"),
        ("o",),
        ("mlp.shared.gate", "mlp.shared.up"),
        ("mlp.experts.0.gate", "mlp.experts.0.up", "mlp.experts.1.gate", "mlp.experts.0.down"),
    ]


def test_the_mixture_is_within_its_budget_and_better_than_pure_ways_that_are() -> None:
    result = found((EIGHT, FOUR), budget_gib=0.003)
    assert result.mixture.nbytes + other_bytes(FOLDER, result.units) <= 0.003 * GIB
    fitting = [one for one in pure_ways(result.units, result.budget) if one.fits]
    assert [one.way for one in fitting] == ["4 bits"]
    assert result.mixture.choice.loss < fitting[0].loss
    assert {option.way for _, option in result.mixture.taken} == {"int8", "4 bits"}


def test_a_larger_budget_never_costs_more() -> None:
    losses = [
        found((EIGHT, FOUR), budget_gib=gib).mixture.choice.loss
        for gib in (0.0027, 0.003, 0.0035, 0.004, 0.005)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_the_recipe_gives_every_layer_what_the_search_chose(tmp_path: Path) -> None:
    result = found((EIGHT, FOUR, THREE), budget_gib=0.0026)
    path = tmp_path / "recipe.yaml"
    write_recipe(result.recipe, path, ("a comment",))
    recipe = make_recipe(read_recipe(path))
    assert recipe.format == "quantkit"  # compressed-tensors would spend 3.2 bits on 3
    for unit, option in result.mixture.taken:
        for layer in unit.layers:
            chosen = recipe.layer_recipe(layer.name)
            assert chosen == option.options.recipe()
    assert path.read_text().startswith("# a comment\n")
    assert not list(tmp_path.glob("*.partial"))


def test_4_and_8_bits_are_stored_as_others_read_them() -> None:
    assert found((EIGHT, FOUR), budget_gib=0.003).fmt == "compressed-tensors"


def test_layers_may_stay_in_16_bits() -> None:
    result = found((FOUR,), budget_gib=0.004)
    assert {option.way for _, option in result.mixture.taken} == {SIXTEEN_BITS, "4 bits"}
    plan = result.plan
    assert 0 < len(plan.layers) < 28


def test_a_speed_budget_is_met_by_the_bytes_of_a_step() -> None:
    """Without fixed costs a step takes bytes over bandwidth: cache and head stay as they are."""
    result = found((EIGHT, FOUR), min_speedup=1.8)
    linear = sum(2 * unit.weights for unit in result.units)
    model = read_model(str(FOLDER)).facts
    head = 2 * model.vocab_size * model.hidden_size
    cache = 56 * 4 * 2 * 2 * 64 * 2  # tokens, layers, key and value, heads, dimensions, bytes
    before = linear + head + cache
    after = result.mixture.nbytes + head + cache
    assert before / after >= 1.8 * 0.999  # whole picoseconds
    assert before / after < 2.2


@pytest.mark.parametrize(
    ("budget", "sentence"),
    [
        ({"budget_gib": 0.001}, "nothing that was measured fits"),
        ({"budget_gib": 1.0}, "nothing to quantise"),
        ({"min_speedup": 50.0}, "no layers make it more than"),
    ],
)
def test_budgets_that_cannot_be_met_are_one_sentence(
    budget: dict[str, float], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        found((EIGHT, FOUR), **budget)


def test_checkpoints_whose_layers_were_not_measured_are_refused() -> None:
    with pytest.raises(ConfigError, match="--by-layer"):
        read_ways([DEMO / "awq"])


def test_negative_measurements_are_taken_as_nothing() -> None:
    row = FOUR.sensitivities[0].model_copy(update={"kl": -1.0})
    losses = FOUR.model_copy(update={"sensitivities": (row,)}).losses()
    assert set(losses.values()) == {0.0}


@pytest.fixture(scope="module")
def ways() -> tuple[Way, ...]:
    """Measured on two windows of 96 tokens."""
    request = SearchRequest(text=TEXT, windows=2, length=96)
    return measure_ways(FOLDER, request, 3_672_320, Terminal(quiet=True))


def divergence(folder: Path) -> float:
    """Mean KL from the 16-bit model on a thousand other tokens."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer(TEXT.read_text()[20_000:40_000], return_tensors="pt").input_ids[:, :1024]
    ids = ids.reshape(8, 128)
    with torch.no_grad():
        p = log_softmax(load_plain(FOLDER)(ids).logits.float(), -1)
        q = log_softmax(load_served(folder)(ids).logits.float(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def quantize(recipe: dict[str, object], out: Path) -> Path:
    Job.prepare(str(FOLDER), recipe, {}, {}).quantize(out, None, Silent())
    return out


def test_what_was_predicted_is_what_is_written_and_measured(
    ways: tuple[Way, ...], tmp_path: Path
) -> None:
    result = found(ways, budget_gib=0.003)
    path = tmp_path / "recipe.yaml"
    write_recipe(result.recipe, path, ())
    made = quantize(yaml.safe_load(path.read_text()), tmp_path / "mixed")
    stored = sum(
        torch.Size(header.shape).numel() * header.dtype.itemsize
        for header in read_headers(made).values()
    )
    assert stored == result.mixture.nbytes + other_bytes(FOLDER, result.units)
    four = quantize({"scheme": "mse", "bits": 4}, tmp_path / "four")
    eight = quantize({"scheme": "int8"}, tmp_path / "eight")
    assert divergence(eight) < divergence(made) < divergence(four)


def test_measured_layers_rank_as_bits_do(ways: tuple[Way, ...]) -> None:
    sums = {way.name: sum(way.losses().values()) for way in ways}
    assert sums["int8"] < sums["4 bits"] < sums["3 bits"]
    assert sums["fp8"] < sums["4 bits"]
    shell = ModelShell.open(FOLDER)
    layers = {
        shell.stored_name(f"{shell.block_name(index)}.{name}")
        for index in range(shell.block_count)
        for name in shell.linears(index)
    }
    assert all(set(way.losses()) == layers for way in ways)


def measured_checkpoint(folder: Path) -> Path:
    """The demo model's AWQ checkpoint, with a report of what each group of layers costs."""
    folder.mkdir()
    shutil.copy(DEMO / "awq" / "config.json", folder)
    report = json.loads((DEMO / "awq" / "quantkit_report.json").read_text())
    report["evaluation"] = {
        "model": {"model": "awq", "max_model_len": 512},
        "backend": "transformers",
        "machine": "a machine",
        "by_layer": [row.model_dump() for row in FOUR.sensitivities],
    }
    (folder / "quantkit_report.json").write_text(json.dumps(report))
    return folder


def test_a_report_says_how_its_layers_were_quantised(tmp_path: Path) -> None:
    (found,) = read_ways([measured_checkpoint(tmp_path / "awq")])
    assert found.options == LayerOptions(scheme="awq", bits=4, group_size=64, symmetric=False)
    assert found.losses() == FOUR.losses()


def test_the_command_writes_a_recipe_from_reports(tmp_path: Path) -> None:
    folder, recipe = measured_checkpoint(tmp_path / "awq"), tmp_path / "recipe.yaml"
    words = f"--gpu H100 --context 512 --search --budget-gib 0.004 --measured {folder} --json"
    result = CliRunner().invoke(
        app, ["advise", str(FOLDER), *words.split(), "--recipe-out", str(recipe)]
    )
    assert result.exit_code == 0, result.output
    answer = SearchAnswer.model_validate_json(result.stdout)
    assert answer.weight_bytes <= 0.004 * GIB
    assert {one.way for one in answer.taken} == {SIXTEEN_BITS, "awq, 4 bits, group 64"}
    chosen = make_recipe(read_recipe(recipe))
    assert chosen.needs_data
    assert answer.commands[0].words[:4] == ("quantkit", "quantize", str(FOLDER), "--recipe")
