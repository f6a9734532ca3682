"""The documentation: links lead somewhere, commands are commands, every command has a page."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from vllm_quantkit.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND: click.Group = typer.main.get_command(app)  # type: ignore[assignment]

BLOCK = re.compile(r"^```sh\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def label(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every `quantkit` line of the page's shell blocks, continued lines joined."""
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["quantkit"]:
                yield words[1:]


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{label(page)} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{label(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_commands_have_the_options_they_are_shown_with(page: Path) -> None:
    for words in commands(page):
        name, *rest = words
        found = COMMAND.commands.get(name)
        assert found is not None, f"{label(page)}: quantkit {name}"
        try:
            found.make_context(name, rest)  # parses, and runs nothing
        except click.UsageError as error:
            pytest.fail(f"{label(page)}: quantkit {shlex.join(words)}: {error.message}")


def test_every_command_is_documented() -> None:
    shown = {words[0] for page in PAGES if page.parent.name == "docs" for words in commands(page)}
    assert shown == set(COMMAND.commands)


def test_every_page_is_reachable_from_the_readme() -> None:
    links = set(LINK.findall((ROOT / "README.md").read_text()))
    for page in (ROOT / "docs").glob("*.md"):
        assert any(link.startswith(f"docs/{page.name}") for link in links), page.name
