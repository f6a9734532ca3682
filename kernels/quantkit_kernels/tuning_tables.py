"""Tables of measured tiles: one JSON file for each GPU, checked as a whole when it is read.

    {"format": 1, "gpu": "NVIDIA H200", "measured": "torch 2.11, triton 3.6", "entries": [
      {"kernel": "wna16-int4", "n": 4096, "k": 4096, "group": 128,
       "tiles": {"1": {"block_m": 16, "block_n": 64, ...}, "16": {...}}}]}

A tile stands under the bucket of tokens it was measured for, see `tuning.BUCKETS`; buckets and
products that no table has are cut as the heuristics say.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from quantkit_kernels.tuning import BUCKETS, Device

FORMAT = 1
"""Of the files; another number means another meaning."""

SHIPPED = Path(__file__).parent / "tiles"
"""Tables of the package."""

FOLDER = "QUANTKIT_TUNING_DIR"
"""The environment variable that names the user's own tables, which win over the package's."""

HOW_TO_FIX = "correct the file, or delete it and measure again with `python -m benchmarks.tune`"
MOST_WARPS = 32
MOST_STAGES = 12
SMALLEST_BLOCK = 16
"""Rows and columns of the smallest product that tensor cores make."""


class Product(NamedTuple):
    """What tiles are measured for.

    Attributes:
        kernel: its name, such as `wna16-int4`.
        n: output channels.
        k: columns of the packed weight.
        group: columns that share a scale; 0 where a whole row does.
    """

    kernel: str
    n: int
    k: int
    group: int


@dataclass(frozen=True)
class Family:
    """Kernels that are cut by one kind of tile.

    Attributes:
        tile: the dataclass, of integers and truth values.
        refusal: why a tile cannot cut a product on a device, in words; empty where it can.
        heuristic: the tile for a product of so many tokens where none was measured.
    """

    tile: type[Any]
    refusal: Callable[[Any, Product, Device], str]
    heuristic: Callable[[Product, int, Device], Any]


Tiles = dict[tuple[Product, int], Any]
"""Product and bucket to tile."""


class TableError(ValueError):
    """A table cannot be used: names the file, the entry and the fix."""


def file_name(gpu: str) -> str:
    """The name of a GPU's table: `NVIDIA H200` to `nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def measured_tiles(device: Device, kernels: Mapping[str, Family]) -> Tiles:
    """All tiles measured for a device, the user's before the package's.

    Args:
        device: the GPU.
        kernels: by name, all that a table may name.

    Raises:
        TableError: a file is not a table, or the user's folder does not exist.
    """
    found: Tiles = {}
    for folder in (SHIPPED, _own_folder()):
        if folder is not None and (file := folder / file_name(device.name)).is_file():
            found |= read_table(file, device, kernels)
    return found


def _own_folder() -> Path | None:
    given = os.environ.get(FOLDER)
    if not given:
        return None
    if not Path(given).is_dir():
        raise TableError(f"{FOLDER} is {given}, which is no folder; create it, or unset {FOLDER}")
    return Path(given)


def read_table(file: Path, device: Device, kernels: Mapping[str, Family]) -> Tiles:
    """The tiles of one file, every one of them checked.

    Raises:
        TableError: see `TableError`.
    """
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise TableError(f"{file} is not JSON ({error}); {HOW_TO_FIX}") from error
    try:
        return _tiles(content, device, kernels)
    except _FaultError as fault:
        raise TableError(f"{file}: {fault}; {HOW_TO_FIX}") from fault


def render_table(gpu: str, measured: str, tiles: Mapping[tuple[Product, int], Any]) -> str:
    """The file that `read_table` reads.

    Args:
        gpu: its name.
        measured: with which versions, in words.
        tiles: product and bucket to tile.
    """
    entries: dict[Product, dict[str, Any]] = {}
    for (product, bucket), tile in sorted(tiles.items(), key=lambda item: item[0]):
        entries.setdefault(product, {})[str(bucket)] = asdict(tile)
    listed = [{**product._asdict(), "tiles": found} for product, found in entries.items()]
    table = {"format": FORMAT, "gpu": gpu, "measured": measured, "entries": listed}
    return json.dumps(table, indent=1) + "\n"


class _FaultError(Exception):
    """Where in a file, and what."""


def _tiles(content: Any, device: Device, kernels: Mapping[str, Family]) -> Tiles:
    # The format first: a later one may have other fields.
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        seen = content.get("format") if isinstance(content, dict) else content
        raise _FaultError(f"its format is {seen!r}, but {FORMAT} is what this version reads")
    _check_fields(
        "the file", content, {"format": int, "gpu": str, "measured": str, "entries": list}
    )
    if file_name(content["gpu"]) != file_name(device.name):
        raise _FaultError(f"it was measured on {content['gpu']!r}, but this is {device.name!r}")
    found: Tiles = {}
    for number, entry in enumerate(content["entries"]):
        for key, tile in _entry(f"entry {number}", entry, device, kernels):
            if key in found:
                raise _FaultError(f"entry {number}, {_words(key[0])}, is there twice")
            found[key] = tile
    return found


def _entry(
    where: str, entry: Any, device: Device, kernels: Mapping[str, Family]
) -> Iterator[tuple[tuple[Product, int], Any]]:
    kinds = {"kernel": str, "n": int, "k": int, "group": int, "tiles": dict}
    _check_fields(where, entry, kinds)
    product = Product(*(entry[name] for name in Product._fields))
    where = f"{where}, {_words(product)}"
    family = kernels.get(product.kernel)
    if family is None:
        raise _FaultError(f"{where}: kernels are {', '.join(kernels)}")
    for bucket, given in entry["tiles"].items():
        here = f"{where}, bucket {bucket}"
        if bucket not in map(str, BUCKETS):
            raise _FaultError(f"{here}: buckets are {', '.join(map(str, BUCKETS))}")
        tile = _tile(here, given, family.tile)
        if reason := family.refusal(tile, product, device):
            raise _FaultError(f"{here}: {reason}")
        yield (product, int(bucket)), tile


def _words(product: Product) -> str:
    return f"{product.kernel} n={product.n} k={product.k} group={product.group}"


def _tile(where: str, given: Any, kind: type[Any]) -> Any:
    """A tile, its fields of the right type and each a number that kernels can have."""
    hints = get_type_hints(kind)
    _check_fields(where, given, {field.name: hints[field.name] for field in fields(kind)})
    for name, value in given.items():
        if reason := _impossible(name, value):
            raise _FaultError(f"{where}: {name} is {value}, {reason}")
    return kind(**given)


def _impossible(name: str, value: int | bool) -> str:
    """Why no kernel has such a number, in words; empty where one may."""
    power = value > 0 and value & (value - 1) == 0
    if name.startswith("block_") and not (power and value >= SMALLEST_BLOCK):
        return f"which is no power of two from {SMALLEST_BLOCK} on"
    if name == "warps" and not (power and value <= MOST_WARPS):
        return f"which is no power of two up to {MOST_WARPS}"
    if name == "stages" and not 1 <= value <= MOST_STAGES:
        return f"which is not between 1 and {MOST_STAGES}"
    if name == "splits" and value < 1:
        return "which is less than 1"
    return ""


def _check_fields(where: str, given: Any, kinds: Mapping[str, type[Any]]) -> None:
    """Exactly these fields, of exactly these types: True is no number."""
    if not isinstance(given, dict):
        raise _FaultError(f"{where} is {given!r}, but should have {', '.join(kinds)}")
    if missing := kinds.keys() - given.keys():
        raise _FaultError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown := given.keys() - kinds.keys():
        raise _FaultError(f"{where} has {', '.join(sorted(unknown))}, which means nothing")
    for name, kind in kinds.items():
        if type(given[name]) is not kind:
            raise _FaultError(f"{where}: {name} is {given[name]!r}, which is no {kind.__name__}")
