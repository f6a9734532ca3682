"""Speeds of running servers, as their clients see them."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import randrange

from vllm_quantkit.bench.noise import fixed_work
from vllm_quantkit.bench.quantities import Key
from vllm_quantkit.bench.rounds import Rounds, count_rounds
from vllm_quantkit.bench.serve_command import Flag, Load, ServeCommand, flags, read_metrics
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.terminal import Terminal

ANSWER_SECONDS = 10


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server.

    Attributes:
        address: such as http://localhost:8000.
        model: the name it serves.
    """

    address: str
    model: str

    @classmethod
    def at(cls, address: str) -> Server:
        """The server at an address, serving the first model it lists.

        Raises:
            ConfigError: no such server answers there.
        """
        try:
            with urllib.request.urlopen(f"{address}/v1/models", timeout=ANSWER_SECONDS) as reply:
                listed = json.load(reply)["data"]
                return cls(address, str(listed[0]["id"]))
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"no OpenAI-compatible server answers at {address}/v1/models ({error}): start one, "
                "for example with vllm serve MODEL --port 8000."
            ) from error


@dataclass(frozen=True)
class Send:
    """One measurement of a server at one rate."""

    command: ServeCommand
    load: Load
    rate: float
    tokenizer: str
    folder: Path
    seeds: Iterator[int] = field(default_factory=lambda: count(randrange(1 << 30)))

    def ask(self, subject: Server) -> dict[Key, float]:
        """What `vllm bench serve` measured.

        Raises:
            EngineError: it failed, or requests did.
        """
        file, log = self.folder / "result.json", self.folder / "client.log"
        file.unlink(missing_ok=True)
        wanted = [
            *flags(self.load, self.rate, subject.address, subject.model, self.tokenizer, file),
            # Other prompts each time: none finds its beginning in a cache.
            Flag(name="--seed", value=str(next(self.seeds))),
        ]
        return read_metrics(self.command.run(wanted, file, log), self.rate)


def parse_servers(values: Sequence[str]) -> dict[str, str]:
    """Label to address, from `--server http://...` and `--server label=http://...`.

    Raises:
        ConfigError: one is no address, or two have the same label.
    """
    found: dict[str, str] = {}
    for value in values:
        label, equals, address = value.partition("=")
        if not equals or "://" in label:
            label = address = value
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.netloc or not label:
            raise ConfigError(
                f"--server {value!r} is no address: give one such as http://localhost:8000, or "
                "other=http://localhost:8001."
            )
        if label in found:
            raise ConfigError(f"--server has {label!r} twice: give each a label of its own.")
        found[label] = address.rstrip("/").removesuffix("/v1")
    return found


def measure_servers(
    servers: Mapping[str, Server],
    load: Load,
    rounds: int,
    tokenizer: str,
    folder: Path,
    terminal: Terminal,
) -> Rounds[Server]:
    """Every rate of every server, which take turns.

    Args:
        servers: by their labels.
        load: what they are sent.
        rounds: how often.
        tokenizer: folder or hub name of the model, whose words prompts are made of.
        folder: for the files of runs.
        terminal: where progress is shown.

    Raises:
        ConfigError: `vllm bench serve` is not there.
    """
    command = ServeCommand()
    asked = [Send(command, load, rate, tokenizer, folder) for rate in load.rates]
    found: Rounds[Server] = Rounds(asked, lambda *_: fixed_work())
    steps = len(asked) * len(servers) * rounds
    with terminal.phase(f"timing, {count_rounds(rounds)}", steps) as tick:
        for number in range(rounds):
            found.take(number, servers, tick)
    return found
