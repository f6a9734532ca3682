"""An INT4 KV cache in the real engine, beside transformers with keys and values rounded alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from quantkit_kernels.kv_int4 import KeyTreatment
from tests.helpers import quantized_checkpoint
from tests.integration.engines import ROOT, TWO_RANKS, EngineFailed, EngineHost
from tests.integration.kv_files import calibration_folder, random_treatments
from tests.integration.kv_oracle import Oracle
from tests.integration.reference import mean_difference, perplexity, prompts
from tests.integration.schemes import awq
from tests.tiny_models import create_tiny_model
from vllm_quantkit.integration import compat

pytestmark = pytest.mark.engine

CHUNK = 64
METHOD = "quantkit-kv4"
DEMO = ROOT / "examples" / "tiny-lm"
LONGEST, NEW_TOKENS = 1024, 48

PERPLEXITY_LOSS = 5e-3
"""What the format may cost a trained model."""

SCORE_TOLERANCE = 0.02
"""Mean |difference| of log-probabilities, both sides in float32.

Rotations sum in another order, so that now and then a value next to a rounding boundary gets the
neighbouring code: 4e-4 and 6e-4 were seen. The INT4 cache itself moves scores by 0.2.
"""

REGRET_TOLERANCE = 0.05
"""Nats by which a greedy token may be less likely than the likeliest: neighbouring codes move
single scores by as much. Wrong keys or values move them by 0.2 and more, at nearly every token."""


def steps(length: int) -> list[int]:
    """A prompt alone in steps of `CHUNK` tokens."""
    return [min(CHUNK, length - start) for start in range(0, length, CHUNK)]


def score_each(asked: list[list[int]]) -> list[dict[str, Any]]:
    """One at a time, so that each is cut as `steps` says."""
    return [{"op": "score", "prompts": [prompt]} for prompt in asked]


def check_scores(answers: list[Any], oracle: Oracle, asked: list[list[int]]) -> None:
    found = [scores for (scores,) in answers]
    expected = [oracle.scores(prompt, steps(len(prompt))) for prompt in asked]
    difference = mean_difference(found, expected)
    assert difference <= SCORE_TOLERANCE, f"scores differ by {difference:.1e}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """Heads of 128 dimensions, two of queries for each of keys."""
    folder = tmp_path_factory.mktemp("llama128") / "model"
    return create_tiny_model("llama", folder, head_dim=128, hidden_size=256)


def test_chunks_prefixes_and_batches_compute_what_rounded_keys_and_values_do(
    llama, engines: EngineHost
):
    """Prompts over two blocks in four steps; then mixed batches with cached prefixes.

    In the last batch the longest prompt has no context while others have one, which makes
    max_query_len and max_seq_len equal.
    """
    asked = prompts(2, 240)
    prefix = prompts(1, 128, seed=1)[0]
    first, second = (prefix + prompts(1, 30, seed=seed)[0] for seed in (2, 3))
    whole = prompts(1, 180, seed=4)[0]
    mixed = [first, whole, second]
    one_step = [*score_each(asked), {"op": "generate", "prompts": [prefix], "max_tokens": 1}]
    kernels = {"op": "cache_kernels"}
    asks = [*one_step, {"op": "generate", "prompts": mixed, "max_tokens": 12}, kernels]

    chunked = engines.run(llama, METHOD, score_each(asked), max_num_batched_tokens=CHUNK)
    result = engines.run(llama, METHOD, [kernels, *asks], enable_prefix_caching=True)
    (compiled, *answers) = result.answers

    oracle = Oracle(llama)
    check_scores(chunked.answers, oracle, asked)
    whole_scores = [oracle.scores(prompt, [len(prompt)]) for prompt in asked]
    # In one step nothing is rounded: exact up to the order of sums.
    assert mean_difference([a for (a,) in answers[:2]], whole_scores) <= 2e-4
    for prompt, cut, made in zip(mixed, ([128, 30], [180], [128, 30]), answers[-2], strict=True):
        assert len(made) == 12
        assert oracle.regret(prompt, cut, made) <= REGRET_TOLERANCE
    assert compiled == answers[-1] > 0  # no request had to wait for a kernel
    (line,) = [entry for entry in result.log if "KV cache INT4" in entry]
    assert "in 2 layers, 280 bytes a token and layer instead of 2048" in line
    assert "not calibrated: `quantkit calibrate-kv MODEL" in line


def test_a_full_pool_preempts_and_recomputes_the_same_tokens(llama, engines: EngineHost):
    """Six requests of 95 tokens need 18 blocks of 32; there are 13. All is read from the cache,
    so that what is recomputed is what was computed."""
    asked = [prompt[:50] for prompt in prompts(6, 100, seed=5)]
    ask = {"op": "generate", "prompts": asked, "max_tokens": 45}

    answers = engines.run(
        llama,
        METHOD,
        [ask, ask],
        additional_config={"quantkit": {"kv_cache": {"prefill": "cached"}}},
        block_size=32,
        num_gpu_blocks_override=14,
        max_num_batched_tokens=CHUNK,
        max_num_seqs=6,
        max_model_len=128,
    ).answers

    oracle = Oracle(llama)
    for made in answers:
        for prompt, tokens in zip(asked, made, strict=True):
            assert len(tokens) == 45
            assert oracle.regret(prompt, None, tokens) <= REGRET_TOLERANCE


@pytest.mark.parametrize("family", ["gemma2", "qwen2"])
def test_a_calibration_windows_caps_and_drafts(family, tmp_path, engines: EngineHost):
    """Windows of 128 tokens beside full attention, capped logits, shifted and scaled keys."""
    model = create_tiny_model(family, tmp_path / "model")
    treatments = random_treatments(layers=2, heads=2, head_size=64)
    calibration_folder(model / "kv_cache", treatments)
    asked = prompts(2, 240)
    repeating = prompts(1, 20)[0] * 6
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    asks = [*score_each(asked), {"op": "generate", "prompts": [repeating], "max_tokens": 20}]

    result = engines.run(
        model, METHOD, asks, max_num_batched_tokens=CHUNK, speculative_config=drafts
    )

    oracle = Oracle(model, treatments)
    check_scores(result.answers[:2], oracle, asked)
    (made,) = result.answers[2]
    assert len(made) == 20
    assert oracle.regret(repeating, steps(len(repeating)), made) <= REGRET_TOLERANCE
    assert any(f"calibrated by {model / 'kv_cache'}" in line for line in result.log)


def test_quantised_weights_skipped_layers_and_two_ranks(tmp_path, engines: EngineHost):
    """W4 + KV4 where each rank has one of two KV heads; layer 1 keeps 16 bits."""
    model = create_tiny_model("llama", tmp_path / "model", num_hidden_layers=3)
    pair = quantized_checkpoint(model, awq(64), tmp_path / "pair")
    treatments = random_treatments(layers=3, heads=2, head_size=64)
    folder = calibration_folder(tmp_path / "calibrated", treatments, kept=(2,))
    options = {"calibration": str(folder), "skip_layers": [1], "key_group": 32}
    asked = prompts(2, 240)

    result = engines.run(
        pair.quantized,
        "quantkit-awq",
        score_each(asked),
        kv_cache_dtype="int4_per_token_head",
        additional_config={"quantkit": {"kv_cache": options}},
        max_num_batched_tokens=CHUNK,
        env=TWO_RANKS,
        tensor_parallel_size=2,
    )

    check_scores(result.answers, Oracle(pair.twin, treatments, skipped=(1, 2)), asked)


def test_a_head_that_two_ranks_share_and_tensors_in_the_checkpoint(tmp_path, engines: EngineHost):
    """One KV head for two ranks, shifted as the model's own safetensors say."""
    model = create_tiny_model("llama", tmp_path / "model", num_key_value_heads=1)
    treatments = random_treatments(layers=2, heads=1, head_size=64)
    store_treatments(model, treatments)
    asked = prompts(1, 240)
    reload = [*score_each(asked), {"op": "reload"}, *score_each(asked)]

    result = engines.run(
        model,
        METHOD,
        reload,
        max_num_batched_tokens=CHUNK,
        env=TWO_RANKS,
        tensor_parallel_size=2,
    )

    check_scores(result.answers[:1], Oracle(model, treatments), asked)
    assert result.answers[2] == result.answers[0]


def test_layers_in_16_bits_beside_windows(tmp_path, engines: EngineHost):
    """vLLM pads their pages from 0.28 on, which costs memory; before, it has no place for them."""
    layers = ["sliding_attention", "full_attention"] * 2
    model = create_tiny_model("gemma2", tmp_path / "model", num_hidden_layers=4, layer_types=layers)
    options = {"quantkit": {"kv_cache": {"dtype": "int4", "skip_layers": [0]}}}
    asked = prompts(1, 240)
    how = {"additional_config": options, "max_num_batched_tokens": CHUNK}
    if not compat.pads_cache_pages():
        with pytest.raises(EngineFailed, match="add --disable-hybrid-kv-cache-manager"):
            engines.run(model, METHOD, [], **how)
        how["disable_hybrid_kv_cache_manager"] = True

    result = engines.run(model, METHOD, score_each(asked), **how)

    check_scores(result.answers, Oracle(model, skipped=(0,)), asked)
    warned = any("pad INT4 pages" in line for line in result.log)
    assert warned == compat.pads_cache_pages()


def test_fp8_takes_the_scales_of_a_calibration(llama, tmp_path, engines: EngineHost):
    """Scales of 64 push most values among E4M3's subnormals, where they lose digits."""
    treatments = random_treatments(layers=2, heads=2, head_size=128)
    folder = calibration_folder(tmp_path / "calibrated", treatments, scales=(64.0, 64.0))
    options = {"quantkit": {"kv_cache": {"calibration": str(folder)}}}
    asked, fp8 = score_each(prompts(1, 240)), {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}

    plain = engines.run(llama, "quantkit-int8", asked, **fp8)
    scaled = engines.run(llama, "quantkit-int8", asked, additional_config=options, **fp8)

    assert mean_difference(plain.answers[0], scaled.answers[0]) > 0.1
    assert any(f"KV cache FP8 with the scales of {folder}" in line for line in scaled.log)


def test_the_trained_model_keeps_its_perplexity(engines: EngineHost):
    """Text it has not seen, in steps of 64 tokens, so that most keys and values are rounded."""
    windows = held_out_windows()
    scores = [
        engines.run(
            DEMO / "bf16",
            method,
            [{"op": "score", "prompts": windows}],
            dtype="bfloat16",
            max_num_batched_tokens=CHUNK,
        ).answers[0]
        for method in (None, METHOD)
    ]

    plain, ours = (perplexity(found) for found in scores)
    assert ours == pytest.approx(plain, rel=PERPLEXITY_LOSS)
    assert ours != plain


@pytest.mark.parametrize("prefill", ["cached", "raw"])
def test_the_longest_prompts_go_on_alike_however_they_are_cut(prefill, engines: EngineHost):
    """The model's maximum: in one step, in chunks, and behind a prefix that is cached.

    Read from the cache, prompts make the same tokens however they are cut. By default the tokens of
    a step attend to each other unrounded, so that a cut moves scores by a rounding of 4 bits.
    """
    asked = held_out_windows(count=6, length=LONGEST - NEW_TOKENS)
    ask = {"op": "generate", "prompts": asked, "max_tokens": NEW_TOKENS}
    options = {"quantkit": {"kv_cache": {"prefill": prefill}}}
    how = {"additional_config": options, "max_model_len": LONGEST}

    (whole,) = engines.run(
        DEMO / "bf16", METHOD, [ask], max_num_batched_tokens=LONGEST, max_num_seqs=1, **how
    ).answers
    chunked, behind_prefix = engines.run(
        DEMO / "bf16", METHOD, [ask, ask], max_num_batched_tokens=128, **how
    ).answers

    same = [share_alike(whole, made) for made in (chunked, behind_prefix)]
    print(f"prefill {prefill}: tokens alike in chunks {same[0]:.1%}, behind a prefix {same[1]:.1%}")
    if prefill == "cached":
        assert same == [1.0, 1.0]
    else:
        assert min(same) > 0.5


def share_alike(first: list[list[int]], second: list[list[int]]) -> float:
    pairs = [pair for made in zip(first, second, strict=True) for pair in zip(*made, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def held_out_windows(count: int = 10, length: int = 250) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "bf16")
    text = (DEMO / "data" / "held_out.txt").read_text()[:40000]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [ids[start : start + length] for start in range(0, count * length, length)]


def store_treatments(model: Path, treatments: dict[int, KeyTreatment]) -> None:
    """Beside the weights of a folder's model."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    for layer, treatment in treatments.items():
        tensors[f"model.layers.{layer}.self_attn.k_zero_point"] = treatment.shift
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = treatment.scale
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("head", "gain"), [(128, 3.6), (64, 3.4)])
def test_the_cache_holds_more_tokens(head, gain, tmp_path, engines: EngineHost):
    """Against bfloat16: 140 bytes of 512 at 128 dimensions, 72 of 256 at 64."""
    model = create_tiny_model("llama", tmp_path / "model", head_dim=head)
    ask = [{"op": "cache_tokens"}]

    plain, ours = (
        engines.run(model, method, ask, dtype="bfloat16").answers[0] for method in (None, METHOD)
    )

    assert ours[0] * ours[1] >= gain * plain[0] * plain[1]
    assert torch.tensor(ours).prod() > 0
