"""The trained demo model: accuracy, and the same tokens however the engine runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.integration.engines import ROOT, EngineHost
from tests.integration.foreseen import check_log
from tests.integration.reference import PERPLEXITY_TOLERANCE, perplexity, token_scores

pytestmark = pytest.mark.engine

DEMO = ROOT / "examples" / "tiny-lm"
FLAGS = {"awq": "quantkit-awq", "gptq": "quantkit-gptq"}
WINDOW = 250
SCORED_WINDOWS = 12
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 16, 150, 24  # a prompt fills one cache block of 128


@pytest.fixture(scope="module")
def held_out() -> list[int]:
    """Tokens of text that the model was not trained on."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "bf16")
    text = (DEMO / "data" / "held_out.txt").read_text()
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def greedy_prompts(held_out) -> list[list[int]]:
    starts = range(0, PROMPTS * PROMPT_TOKENS, PROMPT_TOKENS)
    return [held_out[start : start + PROMPT_TOKENS] for start in starts]


def nibbles(words: Tensor) -> Tensor:
    """The eight 4-bit fields of each int32, lowest first: [..., W] to [..., W, 8]."""
    return (words.unsqueeze(-1) >> torch.arange(0, 32, 4)) & 15


def awq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """[N, K], as AutoAWQ's GEMM kernel reads it: fields 0 4 1 5 2 6 3 7 are outputs in order."""
    in_order = [0, 4, 1, 5, 2, 6, 3, 7]
    codes, zeros = (nibbles(words)[..., in_order].flatten(1) for words in (qweight, qzeros))
    repeats = codes.shape[0] // zeros.shape[0]
    grid = (x.repeat_interleave(repeats, 0).float() for x in (zeros, scales))
    zeros, scales = grid
    return ((codes - zeros) * scales).t()


def gptq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor) -> Tensor:
    """[N, K], as AutoGPTQ reads it: words run along K, zero-points are stored less one."""
    codes = nibbles(qweight.t()).flatten(1)
    zeros = (nibbles(qzeros).flatten(1) + 1)[g_idx]
    return (codes - zeros.t()) * scales[g_idx].t().float()


def reference_model(folder: Path) -> LlamaForCausalLM:
    """The checkpoint through transformers, dequantised here and not by quantkit."""
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")["bits"] == 4
    dequantise = {"awq": awq_weight, "gptq": gptq_weight}[folder.name]
    tensors = load_file(folder / "model.safetensors")
    for layer in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        names = [name for name in tensors if name.startswith(f"{layer}.")]
        parts = {name.rpartition(".")[2]: tensors.pop(name) for name in names}
        tensors[f"{layer}.weight"] = dequantise(**parts)
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    loaded = model.load_state_dict(tensors, strict=False)
    assert loaded.missing_keys == ["lm_head.weight"]  # tied to the embedding
    assert not loaded.unexpected_keys
    return model


@pytest.mark.parametrize("dialect", FLAGS)
def test_bf16_perplexity_is_the_references_before_and_after_a_reload(
    dialect, held_out, engines: EngineHost
):
    starts = range(0, SCORED_WINDOWS * WINDOW, WINDOW)
    windows = [held_out[start : start + WINDOW] for start in starts]
    score = {"op": "score", "prompts": windows}

    result = engines.run(
        DEMO / dialect, FLAGS[dialect], [score, {"op": "reload"}, score], dtype="bfloat16"
    )
    answers = result.answers

    check_log(result.log, DEMO / dialect, FLAGS[dialect], dtype="bfloat16")
    expected = perplexity(token_scores(reference_model(DEMO / dialect), windows))
    assert perplexity(answers[0]) == pytest.approx(expected, rel=PERPLEXITY_TOLERANCE)
    assert answers[2] == answers[0]


@pytest.fixture(scope="module")
def greedy(engines, greedy_prompts) -> list[list[int]]:
    """Tokens of an eager float32 engine, asked one prompt at a time.

    float32, because in bfloat16 the two best tokens tie now and then, and the batch size decides.
    """
    asks = [{"op": "generate", "prompts": [p], "max_tokens": NEW_TOKENS} for p in greedy_prompts]
    answers = engines.run(DEMO / "awq", FLAGS["awq"], asks, enable_prefix_caching=False).answers
    return [tokens for (tokens,) in answers]


def asked(prompts: list[list[int]]) -> dict[str, object]:
    return {"op": "generate", "prompts": prompts, "max_tokens": NEW_TOKENS}


def test_batches_chunks_and_cached_prefixes_do_not_change_tokens(greedy, greedy_prompts, engines):
    """Batches of 4 and 16; prompts in chunks of 64 at first, out of the cache afterwards."""
    answers = engines.run(
        DEMO / "awq",
        FLAGS["awq"],
        [asked(greedy_prompts[:4]), asked(greedy_prompts), asked(greedy_prompts)],
        enable_prefix_caching=True,
        max_num_batched_tokens=64,
        max_num_seqs=16,
    ).answers

    assert answers[0] == greedy[:4]
    assert answers[1] == greedy
    assert answers[2] == greedy


def test_a_compiled_model_generates_the_same_tokens(greedy, greedy_prompts, engines):
    answers = engines.run(
        DEMO / "awq", FLAGS["awq"], [asked(greedy_prompts)], enforce_eager=False
    ).answers

    assert answers[0] == greedy
