"""exp(mean negative log-likelihood) of a model on the held-out text.

Also prints samples and statistics that would show a dead layer or a context that does not work.
"""

import argparse
import itertools
import math
from pathlib import Path

import torch
from model import held_out_loss
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

HERE = Path(__file__).parent
PROMPTS = ("The VACUUM command", "If the file does not exist,", "A transaction is")
QUESTION = "Explain foreign keys in SQLite."


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[float, int]:
    """(perplexity, tokens scored) over windows of context - 1 tokens, each after `<|endoftext|>`.

    The windows follow one another; the last, incomplete one is left out.
    """
    stream = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    context = model.config.max_position_embeddings
    loss = held_out_loss(model, stream, context, int(tokenizer.bos_token_id))
    return math.exp(loss), stream.numel() // (context - 1) * (context - 1)


@torch.no_grad()
def loss_by_position(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, parts: int = 4
) -> list[float]:
    """Mean nats per token in each of `parts` stretches of the context.

    A context that works gives no rise at its end.
    """
    context = model.config.max_position_embeddings
    stream = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = stream[: stream.numel() // (context - 1) * (context - 1)].view(-1, context - 1)
    rows = torch.cat([torch.full((rows.shape[0], 1), int(tokenizer.bos_token_id)), rows], dim=1)
    losses = [token_losses(model, row) for row in rows]
    return [float(part.mean()) for part in torch.stack(losses).chunk(parts, dim=1)]


def token_losses(model: PreTrainedModel, row: Tensor) -> Tensor:
    """[tokens - 1] nats of every token of `row` but the first."""
    logits = model(row[None].to(model.device)).logits[0, :-1].float().cpu()
    return torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")


@torch.no_grad()
def layer_statistics(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> list[str]:
    """A line a layer: rms of the residual stream, how much the layer changes it, effective rank.

    The effective rank is exp(entropy of the normalised squared singular values) of the layer's
    output over 512 tokens, its mean taken off.
    """
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)["input_ids"].to(
        model.device
    )
    states = [state[0].float() for state in model(ids, output_hidden_states=True).hidden_states]
    lines = []
    for index, (before, after) in enumerate(itertools.pairwise(states)):
        weights = torch.linalg.svdvals(after - after.mean(0)).square()
        shares = weights / weights.sum()
        rank = torch.exp(-(shares * shares.clamp_min(1e-12).log()).sum())
        change = float((after - before).norm() / before.norm())
        lines.append(
            f"layer {index}: rms {float(after.square().mean().sqrt()):.3f}, "
            f"change {change:.2f}, effective rank {rank:.1f}"
        )
    return lines


@torch.no_grad()
def continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor, most: int
) -> str:
    """The greedy continuation of `ids` [1, tokens], special tokens shown."""
    output = model.generate(
        ids.to(model.device),
        max_new_tokens=most,
        do_sample=False,
        attention_mask=torch.ones_like(ids),
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :]))


def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Prints everything for one model."""
    value, tokens = perplexity(model, tokenizer, text)
    print(f"{model.dtype}: held-out perplexity {value:.3f} over {tokens} tokens")
    print(
        "loss by quarter of the context:",
        [round(part, 3) for part in loss_by_position(model, tokenizer, text)],
    )
    print("\n".join(layer_statistics(model, tokenizer, text)))
    for prompt in PROMPTS:
        print(
            repr(prompt),
            "->",
            repr(
                continuation(
                    model, tokenizer, tokenizer(prompt, return_tensors="pt")["input_ids"], 60
                )
            ),
        )
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    print(repr(QUESTION), "->", repr(continuation(model, tokenizer, ids, 160)))


def main() -> None:
    """Reports on a model folder in float32 and in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "bf16")
    parser.add_argument("--text", type=Path, default=HERE / "data" / "held_out.txt")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
        report(model, tokenizer, args.text.read_text())


if __name__ == "__main__":
    main()
