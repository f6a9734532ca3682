"""What a user asks of `quantkit advise`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from vllm_quantkit.advise.workload import Workload
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.spec import Frozen

OPTIONS = {
    "training": "train",
    "text": "measure-sensitivity",
    "windows": "sensitivity-windows",
    "length": "sensitivity-length",
}
"""Fields to the options that set them, where these are called otherwise."""


class SearchRequest(Frozen):
    """A search for a scheme for each layer.

    Attributes:
        recipe_out: the recipe to write; None only tells.
        budget_gib: of all weights, GiB; None for no such budget.
        min_speedup: of a decode step over 16 bits; None for no such budget.
        text: measure what layers cost on this text; None takes the reports of `measured`.
        windows: of that text.
        length: tokens of a window.
    """

    recipe_out: Path | None = None
    budget_gib: float | None = Field(default=None, gt=0)
    min_speedup: float | None = Field(default=None, gt=0)
    text: Path | None = None
    windows: int = Field(default=4, ge=2)
    length: int = Field(default=512, ge=8)


class AdviseRequest(Frozen):
    """A question, and how to go about it.

    Attributes:
        model: folder or hub name.
        gpu: a device of the catalogue, `cpu`, or None for what this machine has.
        workload: what the model is for.
        measured: folders of checkpoints whose reports are to be used.
        measure: False takes no measurements of this machine.
        search: for a mixture of schemes; None for one scheme.
    """

    model: str
    gpu: str | None
    workload: Workload
    measured: tuple[Path, ...] = ()
    measure: bool = True
    search: SearchRequest | None = None


def read_request(**given: Any) -> AdviseRequest:
    """The request, checked.

    Raises:
        ConfigError: names the option, its value and what is allowed.
    """
    try:
        return AdviseRequest.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        option = OPTIONS.get(str(first["loc"][-1]), str(first["loc"][-1]).replace("_", "-"))
        raise ConfigError(f"--{option} {first['input']!r}: {first['msg']}.") from error
