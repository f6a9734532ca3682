"""Writes the demo model as an INT4 checkpoint and says what that costs.

    python quantize.py --model bf16 --scheme awq --out awq-int4
    python quantize.py --model bf16 --scheme gptq --out gptq-int4

Both load in plain vLLM too.
"""

import argparse
from pathlib import Path

import torch
from evaluate import perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_quantkit.quantize.calibration import token_windows
from vllm_quantkit.quantize.methods import METHODS
from vllm_quantkit.quantize.pipeline import quantize_folder
from vllm_quantkit.spec import SchemeSpec, WeightSpec

HERE = Path(__file__).parent


def scheme_spec(name: str, group_size: int) -> SchemeSpec:
    """4 bits as the method's own checkpoints have them: AWQ asymmetric, GPTQ symmetric."""
    if name == "awq":
        weight = WeightSpec(bits=4, group_size=group_size, symmetric=False)
        return SchemeSpec(dialect="awq", weight=weight, variant="gemm")
    weight = WeightSpec(bits=4, group_size=group_size, symmetric=True)
    return SchemeSpec(dialect="gptq", weight=weight, variant="gptq")


def folder_bytes(folder: Path) -> int:
    """Bytes of all weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    """Quantises, then compares size and held-out perplexity with the original."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "bf16")
    parser.add_argument("--scheme", choices=("awq", "gptq"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--data", type=Path, default=HERE / "data", help="calibration.txt, held_out.txt"
    )
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    windows = token_windows(
        (args.data / "calibration.txt").read_text(),
        tokenizer,
        count=args.windows,
        length=args.length,
        seed=args.seed,
    )
    held_out = (args.data / "held_out.txt").read_text()
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    before, tokens = perplexity(original, tokenizer, held_out)
    model, _ = quantize_folder(
        args.model,
        args.out,
        scheme_spec(args.scheme, args.group_size),
        METHODS[args.scheme],
        windows.split(8),
        progress=lambda name, error: print(f"{name}: output error {error:.2%}"),
    )
    after, _ = perplexity(model, tokenizer, held_out)
    print(f"weights: {folder_bytes(args.model):,} -> {folder_bytes(args.out):,} bytes")
    print(f"held-out perplexity over {tokens} tokens: {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
