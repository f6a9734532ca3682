"""Devices as data: plausible, sourced, and found by whatever people and drivers call them."""

from __future__ import annotations

from urllib.parse import urlparse

import pytest

from vllm_quantkit.errors import ConfigError
from vllm_quantkit.hardware import DEVICES, Device, catalogue, find_device
from vllm_quantkit.hardware.device import THIS_MACHINE

GIB = 1 << 30


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_is_plausible_and_says_where_its_figures_are_from(name):
    device = DEVICES[name]
    address = urlparse(device.source)
    assert address.scheme == "https"
    assert "." in address.netloc
    assert 10 * GIB <= device.memory_bytes <= 512 * GIB
    assert 1e11 <= device.bandwidth <= 1e13
    # Operations while a byte is read; the H20's, which may not multiply faster, are the fewest.
    if device.kind == "cuda":
        assert 30 <= device.peaks["bf16"] / device.bandwidth <= 700
        assert device.capability is not None
        assert ("fp8" in device.peaks) == device.multiplies_fp8
        assert all(
            device.peaks[name] >= 1.9 * device.peaks["bf16"]
            for name in device.peaks
            if name != "bf16"
        )
    else:
        assert device.peaks == {}
        assert not device.multiplies_fp8


CALLED = {
    "h100": "NVIDIA H100 SXM",
    "H100-SXM": "NVIDIA H100 SXM",
    "NVIDIA H100 80GB HBM3": "NVIDIA H100 SXM",
    "NVIDIA H100 PCIe": "NVIDIA H100 PCIe",
    "4090": "NVIDIA GeForce RTX 4090",
    "NVIDIA GeForce RTX 4090": "NVIDIA GeForce RTX 4090",
    "NVIDIA A100-SXM4-40GB": "NVIDIA A100 40GB",
    "a100": "NVIDIA A100 80GB",
    "Tesla T4": "NVIDIA T4",
    "Apple M4 Max": "Apple M4 Max",
}


@pytest.mark.parametrize("name", CALLED)
def test_names_of_people_and_of_drivers(name):
    assert find_device(name).name == CALLED[name]


def test_an_apple_chip_with_its_memory():
    assert find_device("m4-max 64GB").memory_bytes == 64 * GIB
    assert find_device("M2 Ultra").memory_bytes == 192 * GIB


def test_an_unknown_name_lists_the_closest():
    with pytest.raises(ConfigError, match="'h150' is unknown: the closest are h100") as refusal:
        find_device("h150")
    assert "`cpu` and `this`" in str(refusal.value)


def test_figures_of_a_data_sheet():
    """https://www.nvidia.com/en-us/data-center/h200/: 3,958 TFLOPS in FP8 with 2:4 sparsity."""
    device = find_device("h200")
    assert device.bandwidth == 4.8e12
    assert device.peaks["fp8"] == pytest.approx(3958e12 / 2, rel=1e-3)
    assert device.peaks["bf16"] == pytest.approx(1979e12 / 2, rel=1e-3)


def test_this_machine_is_its_gpu_where_there_is_one(monkeypatch):
    """What the driver says of itself, with the maker's figures where they are known."""
    found = Device(
        name="NVIDIA L4",
        kind="cuda",
        memory_bytes=22 * GIB,
        bandwidth=0,
        capability=(8, 9),
        source=THIS_MACHINE,
    )
    monkeypatch.setattr(catalogue, "this_gpu", lambda: found)
    device = find_device(None)
    assert (device.name, device.memory_bytes) == ("NVIDIA L4", 22 * GIB)
    assert device.bandwidth == 300e9
    unknown = found.model_copy(update={"name": "NVIDIA X9"})
    monkeypatch.setattr(catalogue, "this_gpu", lambda: unknown)
    assert find_device("this") == unknown
    monkeypatch.setattr(catalogue, "this_gpu", lambda: None)
    assert find_device("this").kind in ("cpu", "apple")
