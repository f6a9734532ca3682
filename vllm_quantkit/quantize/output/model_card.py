"""The section about quantisation in the README.md of a quantised model."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vllm_quantkit.quantize.output.report import (
    REPORT_FILE,
    CalibrationSummary,
    Quality,
    Report,
    describe_calibration,
)

BEGIN, END = "<!-- quantkit:begin -->", "<!-- quantkit:end -->"

TAG = "vllm-quantkit"

SECTION = re.compile(rf"{BEGIN}.*?{END}\n*", re.DOTALL)

FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?\n)?---[ \t]*(\n|\Z)", re.DOTALL)

KEY = re.compile(r"([\w-]+)[ \t]*:(.*)")
"""A key of the front matter's outermost level."""

LIMITS = """\
- A small error in each token can add up over a long answer, above all over long reasoning: held-out
  perplexity does not show that. Measure your own task before you rely on this model.
- Held-out figures are for the text above. Other languages and domains may lose more.
- The quantised weights cannot be fully fine-tuned. Adapters (LoRA) over the frozen model can be
  trained and served.
"""


def card_section(report: Report) -> str:
    """Markdown between `BEGIN` and `END`: how the model was quantised and what that cost."""
    return "\n".join([BEGIN, *_lines(report), END]) + "\n"


def with_section(readme: str, section: str, base_model: str | None = None) -> str:
    """The README with the section at its top, instead of a former one.

    Its front matter stays as it is, but for the tags, which gain `vllm-quantkit`, and for
    `base_model` and `base_model_relation`, which are set where the base model's name is known.

    Args:
        readme: of the 16-bit model, or of a former output; may be empty.
        section: of `card_section`.
        base_model: the 16-bit model's name on the hub.
    """
    readme = readme.replace("\r\n", "\n").removeprefix("\ufeff")
    found = FRONT_MATTER.match(readme)
    front, body = (found[1] or "", readme[found.end() :]) if found else ("", readme)
    body = SECTION.sub("", body)
    # A marker whose partner was lost would end, or begin, the next section at the wrong place.
    body = "".join(f"{part}\n" for part in body.splitlines() if part.strip() not in (BEGIN, END))
    front = _with_tag(front)
    if base_model is not None:
        front = _with_key(front, "base_model", base_model)
        front = _with_key(front, "base_model_relation", "quantized")
    rest = body.strip("\n")
    return f"---\n{front}---\n\n{section}" + (f"\n{rest}\n" if rest else "")


def _lines(report: Report) -> Iterator[str]:
    model = report.model if report.base_model is None else report.base_model
    version = report.versions.get("vllm-quantkit", "")
    yield from ("## Quantisation", "")
    yield f"Quantised from `{model}` with vllm-quantkit {version}".rstrip() + "."
    yield from ("", "| numerics | layers | method |", "|---|---|---|")
    for scheme, count in report.scheme.items():
        methods = {layer.method for layer in report.layers if layer.scheme == scheme}
        yield f"| {scheme} | {count} | {', '.join(sorted(methods))} |"
    size = report.resources
    yield ""
    yield (
        f"Weights: {_gigabytes(size.bytes_after)} instead of {_gigabytes(size.bytes_before)}, "
        f"{report.bits_per_weight:.2f} bits per weight. Layer by layer: `{REPORT_FILE}`."
    )
    yield from ("", "### What it cost", "")
    yield from _cost_lines(report.quality, report.not_measured)
    yield from ("", "### Calibration", "")
    yield from _calibration_lines(report.calibration)
    if report.unstable or report.notes:
        yield ""
        yield (
            f"{len(report.unstable)} of {len(report.layers)} layers have scales that the halves of "
            f"the calibration set do not agree on; {len(report.notes)} were not quantised as "
            f"planned. The report names them."
        )
    yield from ("", "### Serve", "", "```sh", "pip install 'vllm-quantkit[cuda]'")
    yield from ("vllm serve PATH_OR_NAME_OF_THIS_MODEL", "```", "")
    yield from ("### Limits", "", LIMITS.rstrip())


def _cost_lines(quality: Quality | None, not_measured: str) -> Iterator[str]:
    if quality is None:
        yield f"Not measured, because {not_measured}."
        return
    yield from (f"On {quality.tokens:,} held-out tokens:", "")
    yield from ("| | 16 bits | quantised |", "|---|---|---|")
    before, after = quality.perplexity_before, quality.perplexity_after
    yield f"| perplexity | {before:.3f} | {after:.3f} ({after / before - 1:+.2%}) |"
    yield f"| KL divergence, mean | 0 | {quality.divergence_mean:.4g} |"
    yield f"| KL divergence, 99th percentile | 0 | {quality.divergence_tail:.4g} |"
    yield f"| same most likely token | 100% | {quality.top1_agreement:.1%} |"


def _calibration_lines(summary: CalibrationSummary | None) -> Iterator[str]:
    if summary is None:
        yield "None: the method rounds weights without data."
        return
    yield f"{describe_calibration(summary)}."
    yield from ("", f"- calibration tokens: SHA-256 `{summary.fingerprint}`")
    yield (
        f"- held-out tokens ({summary.held_out_samples} samples, {summary.held_out_tokens:,} "
        f"tokens): SHA-256 `{summary.held_out_fingerprint}`"
    )
    yield from (f"- {warning}" for warning in summary.warnings)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _entries(front: str) -> list[tuple[str, str]]:
    """Outermost keys of a front matter, each with its lines; '' is what precedes the first."""
    entries: list[tuple[str, str]] = []
    for line in front.splitlines(keepends=True):
        if found := KEY.match(line):
            entries.append((found[1], line))
        elif entries:
            entries[-1] = (entries[-1][0], entries[-1][1] + line)
        else:
            entries.append(("", line))
    return entries


def _with_key(front: str, key: str, value: str) -> str:
    """`key: value` in place of the key's lines, or behind all others."""
    entries = dict.fromkeys(name for name, _ in _entries(front))
    new = f"{key}: {value}\n"
    if key not in entries:
        return front + new
    return "".join(new if name == key else lines for name, lines in _entries(front))


def _with_tag(front: str) -> str:
    """The tags, whether `[a, b]`, one word or a line each, with `TAG` among them."""
    lines = next((lines for name, lines in _entries(front) if name == "tags"), None)
    if lines is None:
        return front + f"tags:\n- {TAG}\n"
    if re.search(rf"(?<![\w-]){TAG}(?![\w-])", lines):
        return front
    value = lines.partition(":")[2].strip()
    first, *rest = lines.splitlines(keepends=True)
    if value.startswith("["):
        head, _, tail = lines.rpartition("]")
        comma = "" if head.rstrip().endswith(("[", ",")) else ","
        new = f"{head.rstrip()}{comma} {TAG}]{tail}".replace("[ ", "[")
    elif first.partition(":")[2].partition("#")[0].strip():
        new = f"tags:\n- {value}\n- {TAG}\n"
    else:
        item = next((line for line in rest if line.strip()), "")
        indent = item[: len(item) - len(item.lstrip())]
        new = f"{first}{indent}- {TAG}\n" + "".join(rest)
    return front.replace(lines, new, 1)
