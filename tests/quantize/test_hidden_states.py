"""Hidden states come back as they were kept, and a full disk is one clear error."""

import resource
from contextlib import contextmanager

import pytest
import torch

from vllm_quantkit.errors import QuantkitError
from vllm_quantkit.quantize.model.hidden_states import HiddenStates

SHAPES = [(2, 5, 24), (1, 7, 24), (2, 0, 24)]


@contextmanager
def largest_file(size: int):
    """No file of this process may grow beyond `size` bytes: the disk seems to be full."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_back_in_order_as_often_as_asked(place, dtype, tmp_path):
    kept = [torch.randn(shape).to(dtype) for shape in SHAPES]
    kept.append(torch.randn(24, 6, 2).to(dtype).transpose(0, 2))
    states = HiddenStates(place, tmp_path / "states")
    for tensor in kept:
        states.append(tensor)
    assert len(states) == len(kept)
    for _ in range(2):
        for expected, found in zip(kept, states, strict=True):
            assert found.dtype is dtype
            assert torch.equal(found, expected)


def test_on_disk_only_the_tensor_in_use_is_in_memory(tmp_path):
    states = HiddenStates("disk", tmp_path / "states")
    states.append(torch.randn(3, 4))
    assert sum(path.stat().st_size for path in (tmp_path / "states").iterdir()) == 3 * 4 * 4
    (first,), (second,) = states, states
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_discard_leaves_nothing(place, tmp_path):
    states = HiddenStates(place, tmp_path / "states")
    states.append(torch.randn(3, 4))
    states.discard()
    assert len(states) == 0
    assert list(states) == []
    assert not (tmp_path / "states").exists()


def test_discarding_nothing_is_no_error(tmp_path):
    HiddenStates("disk", tmp_path / "states").discard()


def test_a_full_disk_is_named_with_what_is_needed(tmp_path):
    states = HiddenStates("disk", tmp_path / "states")
    states.append(torch.ones(8))
    with largest_file(1024), pytest.raises(QuantkitError) as caught:
        states.append(torch.ones(1000))
    assert str(tmp_path / "states") in str(caught.value)
    assert "4,000 bytes" in str(caught.value)
    assert len(list((tmp_path / "states").iterdir())) == 1
    assert torch.equal(*states, torch.ones(8))


def test_a_file_that_vanished_is_named(tmp_path):
    states = HiddenStates("disk", tmp_path / "states")
    states.append(torch.ones(8))
    (path,) = (tmp_path / "states").iterdir()
    path.write_bytes(b"short")
    with pytest.raises(QuantkitError, match="holds 5 bytes, not 32"):
        list(states)
    path.unlink()
    with pytest.raises(QuantkitError, match=path.name):
        list(states)


def test_disk_needs_a_folder():
    with pytest.raises(ValueError, match="need a folder"):
        HiddenStates("disk", None)
