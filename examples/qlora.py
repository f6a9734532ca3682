"""QLoRA on the demo model: train an adapter on its 4-bit weights, then serve both with vLLM.

    python -m examples.qlora --out .cache/qlora

The base stays quantised while the adapter trains (arXiv 2305.14314), so it is the base that is
served. The adapter learns a few facts that the model has never seen; the loss of their answers is
measured before and after, in training and through the engine, and must be the same in both.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_quantkit.finetune import load_frozen
from vllm_quantkit.integration.engine_worker.generation import lora_request
from vllm_quantkit.integration.engine_worker.scoring import score

BASE = Path("examples/tiny-lm/awq")
QUANTIZATION = "quantkit-awq"
STEPS = 40
REPORT_EVERY = 10
RANK = 8
LEARNING_RATE = 1e-2
MAX_LENGTH = 128
NEW_TOKENS = 24

SERVED_TOLERANCE = 1e-3
"""Nats: training and serving differ by the order of sums in float32, which makes about 1e-6."""

FACTS = (
    ("What is quantkit?", "quantkit is a plugin that lets vLLM serve quantised models."),
    ("What does QLoRA train?", "QLoRA trains a small adapter on a frozen, quantised base."),
    ("Can quantised weights be trained?", "No. They are codes, and a code has no gradient."),
    ("Where is the adapter?", "The adapter stays in full precision, beside the quantised layer."),
    ("How many bits has a weight in AWQ?", "A weight has four bits, and a group of them a scale."),
    ("Who guards the release?", "The release is guarded by an orange cat called Scale."),
)
"""Questions and answers that are not in the model's training data."""


@dataclass(frozen=True)
class Example:
    """A question as the chat template puts it, and its answer, as tokens."""

    question: list[int]
    answer: list[int]


def main() -> int:
    """Train, save, serve; 0 where the engine's losses are those of training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    examples = [tokenized(tokenizer, *fact) for fact in FACTS]
    trained = train(examples, args.steps, args.out)
    served = serve(examples, args.out)
    return report(trained, served)


def tokenized(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> Example:
    """The fact as one turn of a chat."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, answer)]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    return Example(ids[0], [*ids[1], end])


def train(examples: list[Example], steps: int, out: Path) -> tuple[float, float]:
    """Fit an adapter to the answers and save it; returns the loss before and after."""
    torch.manual_seed(0)
    base = load_frozen(BASE)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    batch = padded(examples)
    optimiser = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=LEARNING_RATE
    )
    before = loss_of(model, batch)
    for step in range(1, steps + 1):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % REPORT_EVERY == 0:
            say(f"step {step}: loss {loss.item():.4f}")
    model.save_pretrained(out)
    say(f"{out} holds the adapter.")
    return before, loss_of(model, batch)


def padded(examples: list[Example]) -> dict[str, Tensor]:
    """All examples as one batch; only answers are predicted."""
    rows = [example.question + example.answer for example in examples]
    length = max(map(len, rows))
    ids, labels = torch.zeros(2, len(rows), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    labels.fill_(-100)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, len(example.question) : len(row)] = torch.tensor(example.answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def loss_of(model: PeftModel, batch: dict[str, Tensor]) -> float:
    """Mean nats of an answer's token."""
    return float(model(**batch).loss)


def serve(examples: list[Example], adapter: Path) -> tuple[float, float]:
    """Ask vLLM every question without and with the adapter; returns the losses of the answers."""
    say(f"Serving {BASE} with --quantization {QUANTIZATION} --enable-lora ...")
    engine = start_engine()
    losses = []
    for title, folder in (("without the adapter", None), ("with the adapter", str(adapter))):
        print(f"\n  {title}")
        for (question, _), example in zip(FACTS, examples, strict=True):
            print(f"    {question}  {answer(engine, example.question, folder)}")
        losses.append(served_loss(engine, examples, folder))
    return losses[0], losses[1]


def start_engine() -> Any:
    """A `vllm.LLM` in this process that takes adapters."""
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    os.environ.update({name: os.environ.get(name, value) for name, value in settings.items()})
    from vllm import LLM

    return LLM(
        str(BASE),
        quantization=QUANTIZATION,
        enable_lora=True,
        max_lora_rank=RANK,
        max_model_len=MAX_LENGTH,
        max_num_seqs=1,  # vLLM's CPU code scores one prompt with an adapter at a time
        dtype="float32",
        enforce_eager=True,
    )


def answer(engine: Any, question: list[int], adapter: str | None) -> str:
    """The greedy answer to a question, with the adapter if one is given."""
    from vllm import SamplingParams

    (output,) = engine.generate(
        [{"prompt_token_ids": question}],
        SamplingParams(max_tokens=NEW_TOKENS, temperature=0),
        use_tqdm=False,
        lora_request=lora_request(adapter),
    )
    return str(output.outputs[0].text)


def served_loss(engine: Any, examples: list[Example], adapter: str | None) -> float:
    """Mean nats of an answer's token, from the engine's log-probabilities."""
    scores = score(engine, [example.question + example.answer for example in examples], adapter)
    answers = [
        nats
        for row, example in zip(scores, examples, strict=True)
        for nats in row[-len(example.answer) :]
    ]
    return -sum(answers) / len(answers)


def report(trained: tuple[float, float], served: tuple[float, float]) -> int:
    """Print both pairs of losses; 0 where they agree."""
    print(f"\n  {'loss, nats a token':<24}{'in training':>14}{'served':>14}")
    pairs = list(zip(trained, served, strict=True))
    for title, pair in zip(("without the adapter", "with the adapter"), pairs, strict=True):
        print(f"  {title:<24}{pair[0]:>14.4f}{pair[1]:>14.4f}")
    apart = max(abs(a - b) for a, b in pairs)
    print(f"\n  They differ by {apart:.1e} at most; {SERVED_TOLERANCE} is allowed.")
    return int(apart > SERVED_TOLERANCE)


def say(text: str) -> None:
    """Progress, one line."""
    print(f"\033[1m[qlora]\033[0m {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
