"""Trains the model on the streams of prepare_data.py, within a budget of minutes.

Muon updates the matrices, AdamW the embeddings and norms. The learning rate follows the share of
the budget spent: a short warm-up, a plateau, then a linear decay to zero. The last part runs at the
full context. Every row begins with the `<|endoftext|>` token, as every prompt does in use.
See https://kellerjordan.github.io/posts/muon/ for the optimiser.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from model import held_out_loss, model_config, save_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

LossOf = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Settings:
    """What a run is made of; times are shares of the minutes given."""

    minutes: float
    context: int = 1024
    short_context: int = 256
    full_context_from: float = 0.65
    batch_tokens: int = 8192
    micro_tokens: int = 2048
    chat_share: float = 0.12
    matrix_lr: float = 0.02
    vector_lr: float = 4e-3
    weight_decay: float = 0.05
    warm_up: float = 0.02
    decay_from: float = 0.4
    save_every_minutes: float = 5.0
    measure_every_minutes: float = 2.0
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """One entry of the loss record; losses in nats per token, `held_out` not always measured."""

    step: int
    tokens: int
    seconds: float
    train: float
    held_out: float | None = None


def windows(stream: Tensor, length: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless [length] windows; every pass visits the stream in a new order from a new offset."""
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        starts = torch.arange(offset, stream.numel() - length, length)
        for index in torch.randperm(starts.numel(), generator=generator).tolist():
            yield stream[int(starts[index]) :][:length]


def batches(
    streams: dict[str, Tensor], length: int, settings: Settings, bos: int
) -> Iterator[Tensor]:
    """Endless [rows, length + 1] int64: `bos` and a window, of chat with `chat_share`'s chance."""
    generator = torch.Generator().manual_seed(settings.seed + length)
    prose, chat = (windows(streams[name], length, generator) for name in ("prose", "chat"))
    rows = settings.batch_tokens // length
    first = torch.full((rows, 1), bos)
    while True:
        from_chat = (torch.rand(rows, generator=generator) < settings.chat_share).tolist()
        yield torch.cat(
            [first, torch.stack([next(chat if talk else prose) for talk in from_chat]).long()],
            dim=1,
        )


def rate_factor(spent: float, settings: Settings) -> float:
    """The learning rate's factor at the share `spent` of the budget: rises, stays 1, falls to 0."""
    rising = min(1.0, (spent + 1e-3) / settings.warm_up)
    falling = (1.0 - spent) / (1.0 - settings.decay_from)
    return max(0.0, min(rising, falling))


def make_optimisers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings and norms."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    return [
        torch.optim.Muon(
            matrices, lr=settings.matrix_lr, weight_decay=settings.weight_decay, momentum=0.95
        ),
        torch.optim.AdamW(others, lr=settings.vector_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_function(model: LlamaForCausalLM, device: torch.device) -> LossOf:
    """Inputs and targets, [rows, length] each -> mean cross-entropy in nats; compiled, bf16."""

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return torch.compile(loss_of, dynamic=False)


def description(
    settings: Settings, model: LlamaForCausalLM, device: torch.device
) -> dict[str, object]:
    """What a reader needs to judge the run: settings, size, and the platform in general terms."""
    return {
        "settings": asdict(settings),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "device": device.type,
        "cpu_threads": torch.get_num_threads(),
        "architecture": platform.machine(),
        "torch": torch.__version__,
    }


def write_json(content: object, path: Path) -> None:
    """Replaces `path` in one step."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(content, indent=1) + "\n")
    fresh.replace(path)


class Trainer:
    """One run: a model, its optimisers, and the record of losses."""

    def __init__(self, settings: Settings, data: Path, out: Path) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.data, self.out = settings, data, out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.streams = load_file(data / "tokens.safetensors")
        tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
        self.bos = int(tokenizer.bos_token_id)
        config = model_config(
            len(tokenizer), settings.context, {"bos": self.bos, "eos": tokenizer.eos_token_id}
        )
        # Plain attention compiles to faster code than the fused CPU kernel at these lengths.
        config._attn_implementation = "eager"
        self.model = LlamaForCausalLM(config).to(self.device)
        self.optimisers = make_optimisers(self.model, settings)
        self.base_rates = [optimiser.param_groups[0]["lr"] for optimiser in self.optimisers]
        self.loss_of = loss_function(self.model, self.device)
        self.points: list[Point] = []
        self.state_file = data / "training_state.pt"

    def accumulate(self, batch: Tensor) -> float:
        """Adds the gradient of the batch's mean loss, a few rows at a time to stay in cache."""
        rows = max(1, self.settings.micro_tokens // (batch.shape[1] - 1))
        parts = torch.split(batch.to(self.device), rows)
        total = 0.0
        for part in parts:
            loss = self.loss_of(part[:, :-1].contiguous(), part[:, 1:].contiguous()) / len(parts)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        return total

    def step(self, batch: Tensor, factor: float) -> float:
        """One update of all weights at `factor` times the base rates; returns the batch's loss."""
        loss = self.accumulate(batch)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser, rate in zip(self.optimisers, self.base_rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * factor
            optimiser.step()
            optimiser.zero_grad()
        return loss

    def warm(self, feeds: list[Iterator[Tensor]]) -> None:
        """Compiles for both lengths, so that the budget goes to training."""
        for feed in feeds:
            self.accumulate(next(feed))
        self.model.zero_grad()

    def record(self, step: int, seconds: float, loss: float, rows: int | None = 0) -> None:
        """Adds a point; its held-out loss is over `rows` windows (None: all; 0: not taken)."""
        held_out = None
        if rows != 0:
            held_out = held_out_loss(
                self.model, self.streams["held_out"], self.settings.context, self.bos, rows
            )
        point = Point(
            step, step * self.settings.batch_tokens, round(seconds, 1), round(loss, 4), held_out
        )
        self.points.append(point)
        print(json.dumps(asdict(point)), flush=True)

    def resume(self) -> None:
        """Goes on from the state that the last save of an interrupted run left beside the data."""
        state = torch.load(self.state_file, map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimiser, content in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(content)
        self.points = [Point(**point) for point in state["points"]]

    def save(self) -> None:
        """Writes the model, the loss record and, beside the data, what `resume` needs."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        torch.save(state | {"points": [asdict(point) for point in self.points]}, self.state_file)
        save_model(self.model, self.data / "tokenizer", self.out)
        content = description(self.settings, self.model, self.device) | {
            "points": [asdict(point) for point in self.points]
        }
        write_json(content, self.out / "loss.json")

    def run(self) -> None:
        """Trains until the budget is spent, saving as it goes."""
        settings = self.settings
        last = self.points[-1] if self.points else Point(0, 0, 0.0, math.nan)
        step, mean = last.step, last.train
        lengths = (settings.short_context, settings.context)
        # A resumed run draws windows anew, so that it does not see its first batches again.
        drawn = replace(settings, seed=settings.seed + last.step)
        feeds = [batches(self.streams, length, drawn, self.bos) for length in lengths]
        self.warm(feeds)
        begin = time.monotonic() - last.seconds
        measure_at, save_at = last.seconds, last.seconds + settings.save_every_minutes * 60
        while (seconds := time.monotonic() - begin) < settings.minutes * 60:
            spent = seconds / (settings.minutes * 60)
            loss = self.step(
                next(feeds[spent >= settings.full_context_from]), rate_factor(spent, settings)
            )
            step, mean = step + 1, loss if step == 0 else 0.9 * mean + 0.1 * loss
            if seconds >= measure_at:
                self.record(step, seconds, mean, rows=16)
                measure_at = seconds + settings.measure_every_minutes * 60
            elif step % 20 == 0:
                self.record(step, seconds, mean)
            if seconds >= save_at:
                self.save()
                save_at = seconds + settings.save_every_minutes * 60
        self.record(step, time.monotonic() - begin, mean, rows=None)
        self.save()


def main() -> None:
    """Trains from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder written by prepare_data.py"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for bf16/ and loss.json")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument(
        "--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last save of an interrupted run"
    )
    parser.add_argument("--batch-tokens", type=int, default=Settings.batch_tokens)
    parser.add_argument("--matrix-lr", type=float, default=Settings.matrix_lr)
    parser.add_argument("--vector-lr", type=float, default=Settings.vector_lr)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        args.minutes,
        batch_tokens=args.batch_tokens,
        matrix_lr=args.matrix_lr,
        vector_lr=args.vector_lr,
    )
    trainer = Trainer(settings, args.data, args.out)
    if args.resume:
        trainer.resume()
    trainer.run()


if __name__ == "__main__":
    main()
