"""What commands say, on a terminal, in a pipe and to a program."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_quantkit.cli import app
from vllm_quantkit.terminal import Table, Terminal, to_json

ROWS = (("a|b", "9.5", ""), ("fp8", "+10.25", "x"))
TABLE = Table("Speeds", ("scheme", "tokens/s", "note"), ROWS)


def spoken(*, terminal: bool = False, **options: bool) -> tuple[Terminal, io.StringIO, io.StringIO]:
    out, aside = io.StringIO(), io.StringIO()
    consoles = {
        name: Console(
            file=stream, force_terminal=terminal, width=100, highlight=False, markup=False
        )
        for name, stream in (("out", out), ("aside", aside))
    }
    return Terminal(**options, **consoles), out, aside


def test_a_piped_table_is_aligned_by_spaces() -> None:
    terminal, out, _ = spoken()
    terminal.table(TABLE)
    assert out.getvalue().splitlines() == [
        "Speeds",
        "scheme  tokens/s  note",
        "a|b          9.5",
        "fp8       +10.25  x",
    ]


def test_a_terminal_gets_a_drawn_table() -> None:
    terminal, out, _ = spoken(terminal=True)
    terminal.table(TABLE)
    assert "┃" in out.getvalue()
    assert "10.25" in out.getvalue()


def test_other_forms_of_a_table() -> None:
    assert TABLE.markdown().splitlines() == [
        "| scheme | tokens/s | note |",
        "|---|--:|---|",
        r"| a\|b | 9.5 |  |",
        "| fp8 | +10.25 | x |",
    ]
    assert TABLE.csv() == "scheme,tokens/s,note\na|b,9.5,\nfp8,+10.25,x\n"


def test_a_table_without_rows_still_has_its_head() -> None:
    assert Table("", ("a", "b"), ()).plain() == "a  b"


def test_json_alone_is_on_standard_output() -> None:
    terminal, out, aside = spoken(as_json=True)
    terminal.line("for people")
    terminal.table(TABLE)
    terminal.note("by the way")
    with terminal.phase("measuring", 2) as tick:
        tick()
    terminal.warn("few samples")
    terminal.result({"kl": math.inf, "batches": {1: 2.5}})
    assert json.loads(out.getvalue()) == {"kl": "inf", "batches": {"1": 2.5}}
    assert aside.getvalue() == "warning: few samples\n"


def test_without_json_the_result_is_what_was_said() -> None:
    terminal, out, _ = spoken()
    terminal.line("perplexity 17.2")
    terminal.result({"perplexity": 17.2})
    assert out.getvalue() == "perplexity 17.2\n"


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_leaves_results_and_warnings(quiet: bool) -> None:
    terminal, out, aside = spoken(quiet=quiet)
    terminal.note("starting an engine")
    with terminal.phase("measuring", 3) as tick:
        tick()
    terminal.warn("too noisy")
    terminal.line("1.5x")
    assert out.getvalue() == "1.5x\n"
    assert ("starting an engine" in aside.getvalue()) is not quiet
    assert ("measuring ..." in aside.getvalue()) is not quiet
    assert "warning: too noisy" in aside.getvalue()


def test_markup_in_names_is_text() -> None:
    terminal, out, _ = spoken(terminal=True)
    terminal.line("[bold]model[/bold]")
    assert "[bold]model[/bold]" in out.getvalue()


def test_undefined_numbers_are_json_strings() -> None:
    assert json.loads(to_json({"a": [math.nan, 1.0], "b": (True, None)})) == {
        "a": ["nan", 1.0],
        "b": [True, None],
    }


COMMANDS = [command.name for command in app.registered_commands]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_and_can_be_read_by_programs(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0
    assert f"quantkit {name} MODEL" in result.output
    assert "--json" in result.output
    assert "--quiet" in result.output


def test_shells_can_complete() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert "--install-completion" in result.output
