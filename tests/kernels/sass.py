"""Read the disassembly of a GPU kernel: its instructions, its loops, the widths of its loads."""

from __future__ import annotations

import re

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?P<text>[^;]+);")
_LABEL = re.compile(r"^(?P<label>\.L\w+):")
_BRANCH = re.compile(r"\bBRA\b.*`\((?P<label>\.L\w+)\)")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")

NARROWEST = 4
"""Bytes of a load or store whose modifiers name no width."""

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def instructions(sass: str) -> list[str]:
    """Instructions in order, without addresses, padding excluded."""
    found = (_INSTRUCTION.match(line) for line in sass.splitlines())
    return [match["text"].strip() for match in found if match and match["text"].strip() != "NOP"]


def opcode(instruction: str) -> str:
    """`@!P0 LDG.E.128 R4, [R2]` to `LDG`."""
    return _mnemonic(instruction).split(".")[0]


def width(instruction: str) -> int:
    """Bytes that a thread loads or stores: `LDGSTS.E.BYPASS.LTC128B.128 [R2], ...` to 16."""
    modifiers = _mnemonic(instruction).split(".")[1:]
    return next((WIDTHS[name] for name in modifiers if name in WIDTHS), NARROWEST)


def loops(sass: str) -> list[list[str]]:
    """Instructions between the target of each backward branch and the branch, in order."""
    labels: dict[str, int] = {}
    seen: list[str] = []
    found: list[list[str]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label["label"]] = len(seen)
        elif texts := instructions(line):
            seen.extend(texts)
            target = _BRANCH.search(texts[0])
            if target and target["label"] in labels:
                found.append(seen[labels[target["label"]] :])
    return found


def longest_loop(sass: str) -> list[str]:
    """The loop of most instructions; none where the kernel has no loop."""
    return max(loops(sass), key=len, default=[])


def _mnemonic(instruction: str) -> str:
    return _PREDICATE.sub("", instruction).split()[0]
