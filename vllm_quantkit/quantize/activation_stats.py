"""The largest input of every channel of every layer: what SmoothQuant and LLM.int8() read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vllm_quantkit.errors import CheckpointError

FORMAT = "quantkit-activation-stats"
ENDING = ".input_absmax"


def collect_activation_stats(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """max over tokens of |x[k]| for the input x of every nn.Linear.

    Args:
        model: a causal language model.
        batches: int64 [B, T] token ids.

    Returns:
        layer name to float32 [K]; layers that saw no token are left out.
    """
    largest: dict[str, Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                handle = module.register_forward_pre_hook(partial(_note, largest, name))
                hooks.callback(handle.remove)
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    return largest


def write_activation_stats(stats: Mapping[str, Tensor], path: Path, *, tokens: int) -> None:
    """A safetensors file with one `<layer>.input_absmax` for each layer, made in one step."""
    tensors = {f"{name}{ENDING}": value.cpu().contiguous() for name, value in stats.items()}
    partial_path = path.with_name(path.name + ".partial")
    save_file(tensors, partial_path, metadata={"format": FORMAT, "tokens": str(tokens)})
    partial_path.rename(path)


def read_activation_stats(path: Path) -> dict[str, Tensor]:
    """Layer name to float32 [K].

    Raises:
        CheckpointError: the file is something else, or holds values that are no magnitudes.
    """
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != FORMAT:
                raise CheckpointError(f"{path} holds no activation statistics; {HOW_TO_COLLECT}")
            stats = {
                key.removesuffix(ENDING): file.get_tensor(key).float()
                for key in file.keys()  # noqa: SIM118 - not a dict
            }
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; {HOW_TO_COLLECT}") from error
    for name, values in stats.items():
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise CheckpointError(
                f"{path}: the statistics of {name} have a value that is negative or not finite; "
                f"{HOW_TO_COLLECT}"
            )
    return stats


HOW_TO_COLLECT = "collect them with quantkit calibrate MODEL --calibration TEXT --out FILE."


def _note(largest: dict[str, Tensor], name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    here = args[0].detach().flatten(0, -2).abs().amax(0).float()
    largest[name] = largest[name].maximum(here) if name in largest else here
