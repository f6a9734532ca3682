"""Rows of the table: ways to serve one model, as data, and how a user names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.schemes.registry import SCHEMES
from vllm_quantkit.spec import Frozen

KV4 = "kv4"
"""A KV cache of 4 bits: alone beside weights in 16 bits, or behind `+` beside any others."""

RECIPES = (".yaml", ".yml")

VLLM = "vllm:"
"""Before a method of vLLM's own."""


class Row(Frozen):
    """One way to serve the model; where nothing is set, it is served as it is, in 16 bits.

    Attributes:
        name: as it is asked for; labels files and JSON.
        title: as it is shown.
        scheme: of `quantkit quantize`, which makes a checkpoint.
        recipe: of `quantkit quantize --recipe`, which makes a checkpoint.
        folder: an existing checkpoint.
        method: a name of `--quantization`, or `vllm:` and one of vLLM's own: of the checkpoint, or
            of the model, which is quantised while it loads.
        kv4: True with keys and values in 4 bits, calibrated.
    """

    name: str
    title: str
    scheme: str | None = None
    recipe: Path | None = None
    folder: Path | None = None
    method: str | None = None
    kv4: bool = False

    @property
    def is_base(self) -> bool:
        """True for the model as it is, which all others are compared with."""
        return not self.kv4 and self.keeps_weights

    @property
    def keeps_weights(self) -> bool:
        """True where the weights stay in 16 bits."""
        return not (self.scheme or self.recipe or self.folder or self.method)

    @property
    def is_made(self) -> bool:
        """True where a checkpoint is written for it."""
        return self.scheme is not None or self.recipe is not None


BASE = Row(name="16-bit", title="16-bit")

ROWS = (
    BASE,
    Row(name="fp8", title="FP8 (W8A8)", scheme="fp8"),
    Row(name="smoothquant", title="INT8 SmoothQuant (W8A8)", scheme="smoothquant"),
    Row(name="int8", title="INT8 weight-only (W8A16)", scheme="int8"),
    Row(name="gptq", title="INT4 GPTQ", scheme="gptq"),
    Row(name="awq", title="INT4 AWQ", scheme="awq"),
    Row(name="awq+kv4", title="INT4 AWQ + KV INT4", scheme="awq", kv4=True),
)
"""The table of the field."""

OTHERS = (
    Row(name="rtn", title="INT4 nearest", scheme="rtn"),
    Row(name="mse", title="INT4 least error", scheme="mse"),
    Row(name="awq+gptq", title="INT4 AWQ + GPTQ", scheme="awq+gptq"),
    Row(
        name="smoothquant+gptq",
        title="INT8 SmoothQuant + GPTQ (W8A8)",
        scheme="smoothquant+gptq",
    ),
    Row(name="fp8-block", title="FP8 in blocks (W8A8)", scheme="fp8-block"),
    Row(name="quantkit-int4", title="INT4 at load", method="quantkit-int4"),
    Row(name="quantkit-int8", title="INT8 weight-only at load", method="quantkit-int8"),
    Row(name="quantkit-llm-int8", title="LLM.int8() at load", method="quantkit-llm-int8"),
    Row(name="quantkit-fp8", title="FP8 at load (W8A8)", method="quantkit-fp8"),
    Row(
        name="quantkit-fp8-block",
        title="FP8 in blocks at load (W8A8)",
        method="quantkit-fp8-block",
    ),
    Row(
        name="quantkit-smoothquant",
        title="INT8 at load, not smoothed (W8A8)",
        method="quantkit-smoothquant",
    ),
    Row(name=KV4, title="16-bit + KV INT4", kv4=True),
)
"""Rows that are there when they are asked for."""

BY_NAME = {row.name: row for row in (*ROWS, *OTHERS)}

BASE_NAMES = ("16-bit", "bf16", "fp16")
"""Of the model as it is, whichever of them it is."""


def choose_rows(rows: str | None, add: Sequence[str] = ()) -> tuple[Row, ...]:
    """The rows that a user asked for, the model as it is before all others.

    Args:
        rows: names between commas; None is the table of the field.
        add: more of them.

    Raises:
        ConfigError: no such row, or two of one name.
    """
    words = ROWS_ASKED if rows is None else _words([rows])
    chosen = [BASE, *(_row(word) for word in (*words, *_words(add)))]
    found = {row.name: row for row in chosen}
    repeated = [row.name for row in chosen if found[row.name] != row]
    if repeated:
        raise ConfigError(
            f"two rows are called {repeated[0]!r}: name them apart, as in --add mine=FOLDER."
        )
    return tuple(found.values())


ROWS_ASKED = tuple(row.name for row in ROWS)


def _words(asked: Iterable[str]) -> tuple[str, ...]:
    words = tuple(word.strip() for text in asked for word in text.split(","))
    if not all(words):
        raise ConfigError(
            f"--rows or --add {','.join(asked)!r} has an empty name: give names between commas, "
            "such as fp8,awq."
        )
    return words


def _row(word: str) -> Row:
    """What `word` names: a row, one with a cache of 4 bits, a checkpoint or a recipe."""
    if word in BASE_NAMES:
        return BASE
    if word in BY_NAME:
        return BY_NAME[word]
    weights, plus, cache = word.rpartition("+")
    if plus and cache == KV4:
        return _with_kv4(_row(weights))
    if word.startswith(VLLM) and word != VLLM:
        return Row(name=word, title=f"vLLM's {word.removeprefix(VLLM)}", method=word)
    label, _, path = word.rpartition("=")
    folder, _, method = path.partition("@")
    if Path(folder).expanduser().is_dir():
        return _folder(label, Path(folder).expanduser(), method or None)
    given = Path(path).expanduser()
    if given.suffix in RECIPES and given.is_file():
        return Row(name=label or given.stem, title=label or given.stem, recipe=given)
    raise _unknown(word, path)


def _with_kv4(row: Row) -> Row:
    if row.is_base:
        return BY_NAME[KV4]
    if row.kv4:
        raise ConfigError(f"{row.name}+{KV4}: {row.name} has a KV cache of 4 bits already.")
    kv4 = {"name": f"{row.name}+{KV4}", "title": f"{row.title} + KV INT4", "kv4": True}
    return row.model_copy(update=kv4)


def _folder(label: str, folder: Path, method: str | None) -> Row:
    label = label or folder.resolve().name
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"row {label!r}: {folder} has no config.json, so it is no checkpoint: give a model "
            "folder."
        )
    if method is not None and not (method in SCHEMES or method.startswith("vllm")):
        raise ConfigError(
            f"row {label!r}: there is no method {method!r}: give one of {', '.join(SCHEMES)}, "
            f"vllm, or {VLLM}METHOD."
        )
    return Row(name=label, title=label, folder=folder, method=method)


def _unknown(word: str, path: str) -> ConfigError:
    if path != word or "/" in word:
        return ConfigError(
            f"row {word!r}: {path} is neither a checkpoint's folder nor a recipe "
            f"({' or '.join(RECIPES)}): check the path."
        )
    close = get_close_matches(word, BY_NAME, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return ConfigError(
        f"there is no row {word!r}: {hint}Rows are {', '.join(BY_NAME)}, any of them with "
        f"+{KV4}, {VLLM}METHOD of vLLM's own at load, LABEL=FOLDER of a checkpoint (with @METHOD "
        "behind it to name the method) and LABEL=FILE.yaml of a recipe."
    )
