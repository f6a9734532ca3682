"""What `quantkit bench` is asked, read from the options of the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from vllm_quantkit.bench.gate import DEFAULT_TOLERANCE
from vllm_quantkit.bench.plan import BenchPlan
from vllm_quantkit.bench.serve_command import Load
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.spec import Frozen

Read = TypeVar("Read", bound=Frozen)
Number = TypeVar("Number", int, float)

PLAN = {"batches", "tokens", "context", "prompts", "load", "mixed", "rounds"}
LOAD = {
    "request_rate": "rates",
    "concurrency": "concurrency",
    "num_prompts": "prompts",
    "input_len": "input_tokens",
    "output_len": "output_tokens",
}
"""Option to field of `Load`."""

ENGINE = (
    "tensor_parallel_size",
    "enforce_eager",
    "gpu_memory_utilization",
    "additional_config",
)
"""Options that `vllm.LLM` takes as they are."""

LISTS: Mapping[str, Callable[[str], float]] = {
    "batches": int,
    "prompts": int,
    "request_rate": float,
}
"""Options that are numbers with commas between them."""

ENGINES_ONLY = ("schemes", "gate", "text", "together", "max_model_len", *ENGINE)


class BenchRequest(Frozen):
    """What is measured, how, and where the result goes.

    Attributes:
        model: folder or name on the hub.
        schemes: as written; None for 16 bits, or what the checkpoint is.
        servers: as written; with any, they are measured and no engine is started.
        plan: what engines are asked, and how many rounds there are.
        sent: what servers are sent.
        engine: arguments of `vllm.LLM` that all engines have.
        max_model_len: longest sequence of an engine; None for what the plan needs.
        gate: relative difference from the baseline's perplexity that is allowed.
        text: file that perplexity is measured on; None for the one that comes along.
        together: whether all engines run at the same time; None where memory decides.
        strict: True where an inconclusive result is a failure.
        out: folder for the result; None for none.
    """

    model: str
    schemes: str | None = None
    servers: tuple[str, ...] = ()
    plan: BenchPlan = BenchPlan()
    sent: Load = Load()
    engine: tuple[tuple[str, Any], ...] = ()
    max_model_len: int | None = None
    gate: float = DEFAULT_TOLERANCE
    text: Path | None = None
    together: bool | None = None
    strict: bool = False
    out: Path | None = None


def read_request(options: Mapping[str, Any]) -> BenchRequest:
    """The request behind the options that were given, by their names.

    Raises:
        ConfigError: names the option, the value and what is allowed.
    """
    given = {name: _numbers(name, value) for name, value in options.items()}
    if "additional_config" in given:
        given["additional_config"] = _json(given["additional_config"])
    servers = tuple(given.get("server", ()))
    useless = [name for name in ENGINES_ONLY if name in given] if servers else []
    if useless:
        raise ConfigError(
            f"{_option(useless[0])} is for engines that this command starts, but --server names "
            "servers that run already: leave out one of them."
        )
    plan = {name: given[name] for name in PLAN & given.keys()}
    sent = {field: given[name] for name, field in LOAD.items() if name in given}
    fields = {name: given[name] for name in BenchRequest.model_fields if name in given}
    return _validated(
        BenchRequest,
        {
            **fields,
            "servers": servers,
            "plan": _validated(BenchPlan, plan),
            "sent": _validated(Load, sent),
            "engine": tuple((name, given[name]) for name in ENGINE if name in given),
        },
    )


def _numbers(name: str, value: Any) -> Any:
    """A list of numbers where the option is one."""
    if name not in LISTS:
        return value
    try:
        return tuple(LISTS[name](part) for part in value.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(
            f"{_option(name)} {value!r}: must be numbers with commas between them, such as 1,8."
        ) from error


def _json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--additional-config {text!r} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--additional-config {text!r}: must be an object, as in "
            '\'{"quantkit": {"group_size": 64}}\'.'
        )
    return content


def _validated(kind: type[Read], fields: Mapping[str, Any]) -> Read:
    """A frozen object of these fields.

    Raises:
        ConfigError: names the option.
    """
    try:
        return kind.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        names = {field: option for option, field in LOAD.items()} if kind is Load else {}
        field = str(first["loc"][0]) if first["loc"] else ""
        subject = (
            f"{_option(names.get(field, field))} {first['input']!r}" if field else "the request"
        )
        message = str(first["msg"]).removeprefix("Value error, ")
        raise ConfigError(f"{subject}: {message}.") from error


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
