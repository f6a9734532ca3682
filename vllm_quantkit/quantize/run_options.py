"""How a run goes about its work: what decides its speed and memory, not its recipe."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from quantkit_kernels.cpu.host import host_features
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.quantize.observation.streams import Place
from vllm_quantkit.spec import Frozen

GIB = 1 << 30

FAST_BFLOAT16 = {"avx512bf16", "amx-bf16"}
"""CPU features that multiply bfloat16 faster than float32."""


class RunOptions(Frozen):
    """How a run goes about its work.

    Attributes:
        device: where blocks compute; `auto` is a CUDA device where there is one.
        precision: of the products of the calibration text; `auto` is bfloat16 where the model is
            stored in 16 bits and the device multiplies them faster. Quality is always measured in
            float32.
        hidden_states: where they wait between two blocks.
        batch_tokens: tokens that run together, at least one sample.
        statistics_gib: memory for the sums of one pass over the calibration set; where a block
            needs more, it takes more passes.
        resume: goes on with what an earlier run left.
        rehearse: blocks that are tried out first, so that what fails, fails early.
        trust_remote_code: may run model code that is in the model's folder.
    """

    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    hidden_states: Place = "cpu"
    batch_tokens: int = Field(default=4096, ge=1)
    statistics_gib: float = Field(default=8.0, gt=0)
    resume: bool = False
    rehearse: tuple[int, ...] = ()
    trust_remote_code: bool = False

    def torch_precision(self, stored: torch.dtype) -> torch.dtype:
        """The precision for a model that is stored in this dtype."""
        if self.precision == "auto":
            fast = self.torch_device().type == "cuda" or bool(FAST_BFLOAT16 & host_features())
            return torch.bfloat16 if fast and stored.itemsize == 2 else torch.float32
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def torch_device(self) -> torch.device:
        """The device.

        Raises:
            ConfigError: there is no such device.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {self.device!r} cannot be used: {error}") from error
        return device


def parse_blocks(text: str, count: int) -> tuple[int, ...]:
    """`0,last` and the like as numbers of blocks, each once, in the order given.

    Raises:
        ConfigError: an entry is no block of a model with `count` of them.
    """
    found = []
    for entry in text.split(","):
        word = entry.strip()
        number = count - 1 if word == "last" else int(word) if word.isdecimal() else -1
        if not 0 <= number < count:
            raise ConfigError(
                f"--layers {text!r}: {word!r} is no block of this model; give numbers from 0 to "
                f"{count - 1}, or 'last'."
            )
        found.append(number)
    return tuple(dict.fromkeys(found))
