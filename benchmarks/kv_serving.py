"""What a KV cache of 4 bits holds, costs and changes, in real engines beside 16 bits and FP8.

Perplexity is measured with every key and value read from the cache: with `prefill` left as it is,
a prompt that is computed in one piece never reads what was quantised.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import LlamaConfig

from benchmarks.random_model import make_pair
from vllm_quantkit.engine import Engine, EngineSpec
from vllm_quantkit.hardware.machine import describe_machine

CACHE = Path(".cache/bench")
DEMO = Path("examples/tiny-lm")
HELD_OUT = DEMO / "data/held_out.txt"
MAX_MODEL_LEN = 1024
SCORED_TOKENS = 16384
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 128, 256, 64
EAGER = ("enforce_eager", True)
PLAIN_WEIGHTS_FP8 = (
    ("kv_cache_dtype", "fp8"),
    ("additional_config", {"quantkit": {"ignore": [".*"]}}),
)
"""Weights in 16 bits, and the calibration's FP8 scales."""

PLAIN, AGAIN, FP8, FP8_SCALED = "16 bits", "16 bits again", "FP8", "FP8, calibrated"
INT4, INT4_CALIBRATED, W4_INT4 = "INT4", "INT4, calibrated", "AWQ and INT4, calibrated"
AWQ = "AWQ"


@dataclass(frozen=True)
class Row:
    """One way to keep keys and values.

    Attributes:
        tokens: that the cache holds.
        perplexity: of held-out text, every token read from the cache.
        continuations: greedy tokens behind each prompt.
    """

    tokens: int
    perplexity: float
    continuations: list[list[int]]


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/kv_serving_cpu.json"))
    json_file = parser.parse_args().json
    with demo_models() as models:
        rows = {name: measure(name, spec) for name, spec in specs(models).items()}
    ratios = {str(size): wide_ratio(size) for size in (64, 128)}
    result = summary(rows) | {"cache_tokens_over_16_bits_by_head_size": ratios}
    print_table(result)
    json_file.write_text(json.dumps({"machine": describe_machine(), **result}, indent=2) + "\n")


@contextmanager
def demo_models() -> Iterator[Mapping[str, str]]:
    """Folders of the demo model: with its calibration of the cache, without, and as AWQ with it."""
    with TemporaryDirectory() as folder:
        plain, awq = Path(folder, "plain"), Path(folder, "awq")
        shutil.copytree(DEMO / "bf16", plain, ignore=shutil.ignore_patterns("kv_cache"))
        shutil.copytree(DEMO / "awq", awq)
        yield {"calibrated": str(DEMO / "bf16"), "plain": str(plain), "awq": str(awq)}


def specs(models: Mapping[str, str]) -> dict[str, EngineSpec]:
    """Each row's engine."""
    calibration = str(DEMO / "bf16/kv_cache")
    return {
        PLAIN: engine(models["plain"]),
        AGAIN: engine(models["plain"], max_num_seqs=4),
        FP8: engine(models["plain"], kv_cache_dtype="fp8"),
        FP8_SCALED: EngineSpec(
            models["calibrated"], "quantkit-fp8", MAX_MODEL_LEN, (EAGER, *PLAIN_WEIGHTS_FP8)
        ),
        INT4: engine(models["plain"], "quantkit-kv4", {}),
        INT4_CALIBRATED: engine(models["calibrated"], "quantkit-kv4", {}),
        AWQ: engine(models["awq"], "quantkit-awq"),
        W4_INT4: engine(
            models["awq"], "quantkit-awq", {"dtype": "int4", "calibration": calibration}
        ),
    }


def engine(
    model: str,
    quantization: str | None = None,
    cache: Mapping[str, Any] | None = None,
    **options: Any,
) -> EngineSpec:
    """An engine; `cache` are options of quantkit's KV cache."""
    if cache is not None:
        options["additional_config"] = {"quantkit": {"kv_cache": {"prefill": "cached", **cache}}}
    return EngineSpec(model, quantization, MAX_MODEL_LEN, (EAGER, *options.items()))


def measure(name: str, spec: EngineSpec) -> Row:
    """All that is measured of one engine."""
    text = HELD_OUT.read_text()
    print(f"measuring {name} ...", flush=True)
    with Engine(spec, CACHE / f"kv-{name.replace(' ', '-').replace(',', '')}.log") as running:
        return Row(
            running.cache_tokens(),
            running.perplexity(text, SCORED_TOKENS)[0],
            running.continuations(text, PROMPTS, PROMPT_TOKENS, NEW_TOKENS),
        )


def wide_ratio(head_size: int) -> float:
    """Tokens of an INT4 cache over those of a 16-bit one, in the same memory."""
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=4 * head_size,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=2048,
        max_position_embeddings=MAX_MODEL_LEN,
        dtype="bfloat16",
    )
    model, _ = make_pair(config, CACHE / f"llama-head-{head_size}")
    with ExitStack() as stack:
        plain, int4 = (
            stack.enter_context(Engine(spec, CACHE / f"kv-head-{head_size}-{i}.log"))
            for i, spec in enumerate((engine(str(model)), engine(str(model), "quantkit-kv4")))
        )
        return int4.cache_tokens() / plain.cache_tokens()


def summary(rows: Mapping[str, Row]) -> dict[str, Any]:
    """Every row against 16 bits: of the model, and of AWQ where its weights are AWQ."""
    return {
        "rows": {
            name: {
                "cache_tokens": row.tokens,
                "perplexity": row.perplexity,
                **_against(row, rows[AWQ if name == W4_INT4 else PLAIN]),
            }
            for name, row in rows.items()
        }
    }


def _against(row: Row, base: Row) -> dict[str, float]:
    pairs = zip(row.continuations, base.continuations, strict=True)
    same = [alike(ours, theirs) for ours, theirs in pairs]
    return {
        "cache_tokens_ratio": row.tokens / base.tokens,
        "perplexity_rise": row.perplexity / base.perplexity - 1,
        "same_continuations": sum(count == NEW_TOKENS for count in same) / len(same),
        "tokens_until_they_differ": sum(same) / len(same),
    }


def alike(left: list[int], right: list[int]) -> int:
    """Tokens before the first that differs."""
    differ = (i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b)
    return next(differ, len(left))


def print_table(result: Mapping[str, Any]) -> None:
    """A Markdown table."""
    print(f"\n{describe_machine()}\n")
    print("| KV cache | tokens it holds | perplexity | same 64 greedy tokens | tokens alike |")
    print("|---|---|---|---|---|")
    for name, row in result["rows"].items():
        print(
            f"| {name} | {row['cache_tokens_ratio']:.2f}x | {row['perplexity']:.3f} "
            f"({row['perplexity_rise']:+.2%}) | {row['same_continuations']:.1%} "
            f"| {row['tokens_until_they_differ']:.1f} |"
        )
    for size, ratio in result["cache_tokens_over_16_bits_by_head_size"].items():
        print(f"heads of {size} dimensions: {ratio:.2f}x the tokens of 16 bits")


if __name__ == "__main__":
    main()
