"""loss.json -> loss_curve.png: training and held-out loss against the tokens seen."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def draw(record: dict[str, Any], target: Path) -> None:
    """Writes the figure for one run's record."""
    points, settings = record["points"], record["settings"]
    measured = [point for point in points if point["held_out"] is not None]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(
        [p["tokens"] / 1e6 for p in points[1:]],
        [p["train"] for p in points[1:]],
        lw=1.2,
        color="#4878a8",
        label="training (running mean)",
    )
    axes.plot(
        [p["tokens"] / 1e6 for p in measured],
        [p["held_out"] for p in measured],
        "o-",
        ms=3.5,
        color="#c44e22",
        label="held-out",
    )
    for share, text in (
        (settings["decay_from"], "learning rate\nstarts to fall"),
        (settings["full_context_from"], "full context"),
    ):
        tokens = (
            next(p["tokens"] for p in points if p["seconds"] >= share * settings["minutes"] * 60)
            / 1e6
        )
        axes.axvline(tokens, color="0.6", ls="--", lw=0.9)
        axes.annotate(
            text,
            (tokens, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
            fontsize=9,
        )
    last = measured[-1]
    axes.annotate(
        f"{last['held_out']:.2f}",
        (last["tokens"] / 1e6, last["held_out"]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
    )
    axes.set(
        xlabel="tokens seen (millions)",
        ylabel="loss (nats per token)",
        title="Training of the demo language model",
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.84))
    figure.savefig(target, dpi=130)


def main() -> None:
    """Draws the figure of a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, default=HERE / "loss.json")
    parser.add_argument("--out", type=Path, default=HERE / "loss_curve.png")
    args = parser.parse_args()
    draw(json.loads(args.record.read_text()), args.out)


if __name__ == "__main__":
    main()
