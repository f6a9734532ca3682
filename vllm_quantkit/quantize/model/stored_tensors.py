"""Tensors of a checkpoint, read one at a time into the modules of a model that has none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from vllm_quantkit._safetensors import DOWNLOAD, TensorHeader, read_headers
from vllm_quantkit.errors import CheckpointError
from vllm_quantkit.quantize.model.model_map import expert_names

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What weights that are not quantised yet are stored in."""


class StoredTensors:
    """The tensors of a folder, by what a model calls its parameters.

    Args:
        folder: with safetensors files.
        rename: turns the checkpoint's name of a tensor into the model's.
        prefix: of all names in the model's body, which checkpoints of the body alone lack.

    Raises:
        CheckpointError: there is no safetensors file, or one is missing, truncated or corrupt.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str], prefix: str) -> None:
        _refuse_pickles(folder)
        self.folder = folder
        self.headers: Mapping[str, TensorHeader] = read_headers(folder)
        self._stored = {rename(name): name for name in self.headers}
        self._prefix = f"{prefix}." if prefix else ""

    def name(self, name: str) -> str:
        """What the checkpoint calls the parameter `name` of the model; `name` if it has it not."""
        for candidate in (name, *expert_names(name), name.removeprefix(self._prefix)):
            if candidate in self._stored:
                return self._stored[candidate]
        return name

    def holds(self, name: str) -> bool:
        """True if the checkpoint has the parameter `name` of the model."""
        return self.name(name) in self.headers

    def check(self, name: str, shape: torch.Size, owner: str) -> None:
        """The header of the parameter fits the model.

        Raises:
            CheckpointError: the tensor is missing, has another shape, or is quantised.
        """
        header = self.headers.get(self.name(name))
        if header is None:
            raise CheckpointError(
                f"{self.folder} has no tensor {self.name(name)!r}, which {owner} needs. "
                "Download the missing file, or save the model again with transformers."
            )
        label = f"{self.name(name)} in {header.file}"
        if header.shape != tuple(shape):
            raise CheckpointError(
                f"{label} has shape {list(header.shape)}, but {owner} needs {list(shape)}. "
                "Use the config.json that belongs to these weights."
            )
        if header.dtype.itemsize == 1 and header.dtype != torch.bool:
            raise CheckpointError(
                f"{label} is stored as {header.dtype}: it is quantised already. Start from the "
                "model in 16 or 32 bits."
            )

    def read(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The parameter `name`, floats as `dtype`.

        Raises:
            CheckpointError: the file cannot be read, or the tensor has a value that is not finite.
        """
        stored = self.name(name)
        header = self.headers[stored]
        tensor = _read(stored, header)
        if not tensor.is_floating_point():
            return tensor.to(device)
        tensor = tensor.to(device)
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{stored} in {header.file} has {count} values that are NaN or infinite. {DOWNLOAD}"
            )
        return tensor.to(dtype)


@contextmanager
def loaded(
    root: nn.Module, slots: Iterable[tuple[str, tuple[str, ...]]], read: Callable[[str], Tensor]
) -> Iterator[None]:
    """Puts tensors into `root`, and takes them out again at the end.

    Args:
        root: a module; its parameters are on the meta device before and after.
        slots: what to read, and all names of that parameter or buffer inside `root`; several where
            weights are tied.
        read: gives a tensor.
    """
    filled: list[tuple[tuple[str, ...], Tensor]] = []
    try:
        for source, names in slots:
            value = read(source)
            filled.append((names, torch.empty_like(value, device="meta")))
            assign(root, names, value)
            del value  # or the last one would stay in memory
        yield
    finally:
        for names, empty in filled:
            assign(root, names, empty)


def assign(root: nn.Module, names: Sequence[str], value: Tensor) -> None:
    """The parameter or buffer that has all these names in `root` becomes `value`."""
    shared: Tensor | None = None
    for name in names:
        path, _, last = name.rpartition(".")
        owner = root.get_submodule(path)
        if shared is None:
            is_buffer = last in dict(owner.named_buffers(recurse=False))
            shared = value if is_buffer else nn.Parameter(value, requires_grad=False)
        setattr(owner, last, shared)


def _read(name: str, header: TensorHeader) -> Tensor:
    """Reads the bytes where the header says they are; a file that changed is noticed."""
    tensor = torch.empty(header.shape, dtype=header.dtype)
    view = tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
    done = 0
    try:
        with header.file.open("rb") as stream:
            stream.seek(header.offset)
            while done < len(view):
                count = stream.readinto(view[done:])  # type: ignore[arg-type]
                if not count:
                    break
                done += count
    except OSError as error:
        raise CheckpointError(f"{name} in {header.file} cannot be read: {error}.") from error
    if done < len(view):
        raise CheckpointError(
            f"{header.file} ends after {done} of the {len(view)} bytes of {name}. {DOWNLOAD}"
        )
    return tensor


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds {pickles[0]} but no safetensors file. Load the model with "
            "transformers and save it again, which writes safetensors."
        )
