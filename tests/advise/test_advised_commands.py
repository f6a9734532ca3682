"""The commands that are advised are those that exist."""

from __future__ import annotations

import json
import shlex

import pytest
import typer
from typer.core import TyperGroup

from vllm_quantkit.advise.candidates import Candidate, candidates
from vllm_quantkit.advise.commands import Command, commands_for, made_of, serve
from vllm_quantkit.advise.workload import Workload
from vllm_quantkit.cli.app import app
from vllm_quantkit.options import read_options
from vllm_quantkit.quantize.recipes.presets import PRESETS
from vllm_quantkit.schemes.registry import SCHEMES

WORKLOAD = Workload(context=2048, batch=8, max_kl=0.05, tp=2)
GROUP = typer.main.get_command(app)


def parse(command: Command) -> None:
    """Raises a usage error where `quantkit` has no such command, option or value."""
    assert isinstance(GROUP, TyperGroup)
    name, *rest = shlex.split(command.line)[1:]
    found = GROUP.commands[name]
    found.make_context(name, list(rest))


@pytest.mark.parametrize("candidate", candidates(), ids=lambda one: one.name)
def test_commands_parse_and_name_what_is_registered(candidate: Candidate) -> None:
    commands = commands_for("org/Model-8B", candidate, WORKLOAD)
    assert any(command.words[0] == "vllm" for command in commands)
    for command in commands:
        assert shlex.split(command.line) == list(command.words)
        if command.words[0] == "quantkit":
            parse(command)
        else:
            check_serve(command, candidate)


def check_serve(command: Command, candidate: Candidate) -> None:
    options = dict(zip(command.words[3::2], command.words[4::2], strict=True))
    assert command.words[:2] == ("vllm", "serve")
    assert candidate.plain or candidate.cache == "fp8" or options["--quantization"] in SCHEMES
    assert options["--max-model-len"] == "2048"
    assert options["--tensor-parallel-size"] == "2"
    extra = options.get("--additional-config")
    if extra is not None:
        assert read_options(json.loads(extra)).kv_cache.dtype == candidate.cache
    assert (options.get("--kv-cache-dtype") == "fp8") == (candidate.cache == "fp8")


@pytest.mark.parametrize("candidate", candidates(), ids=lambda one: one.name)
def test_what_is_made_is_what_is_served(candidate: Candidate) -> None:
    commands = commands_for("org/Model-8B", candidate, WORKLOAD)
    made = made_of("org/Model-8B", candidate)
    quantized = [one.words for one in commands if one.words[:2] == ("quantkit", "quantize")]
    assert bool(quantized) == (candidate.scheme.quantize is not None)
    for words in quantized:
        assert words[words.index("--scheme") + 1] in PRESETS
        assert words[words.index("--out") + 1] == made
    assert serve(made, candidate, WORKLOAD) in commands


def test_a_wrong_command_would_be_noticed() -> None:
    wrong = Command(words=("quantkit", "quantize", "MODEL", "--shceme", "awq"), purpose="")
    with pytest.raises(Exception, match=r"(?i)no such option"):
        parse(wrong)
