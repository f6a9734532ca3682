"""This machine: what it has, what a container lets a process use, and what is measured."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vllm_quantkit.hardware import find_device, machine
from vllm_quantkit.hardware.cgroup import cpu_limit, memory_limit
from vllm_quantkit.hardware.machine import cpu_features, describe_machine, this_cpu
from vllm_quantkit.hardware.measure import measure


def test_the_line_names_processor_threads_and_versions():
    line = describe_machine()
    assert f"{torch.get_num_threads()} threads" in line
    assert f"torch {torch.__version__.split('+')[0]}" in line


def test_cpus_and_memory_of_this_process():
    cpu = this_cpu()
    assert cpu.cores is not None
    assert 1 <= cpu.cores <= (os.cpu_count() or 1)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 1 << 28 <= cpu.memory_bytes <= physical


CPUINFO = "processor : 0\nmodel name\t: Some CPU\nflags\t: fpu avx2 avx512f avx512_bf16 nx\n"


def test_what_a_cpu_can_do_is_read_from_linux(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_features() == ("avx2", "avx512f", "avx512_bf16")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "absent")
    assert cpu_features() == ()


def group(folder: Path, membership: str, files: dict[str, str]) -> dict[str, Path]:
    """A tree of control groups and the file that says which the process is in."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")
    (folder / "membership").write_text(membership)
    return {"mount": folder, "membership": folder / "membership"}


def test_limits_of_version_2_and_of_its_parents(tmp_path):
    files = {
        "a/b/memory.max": "max",
        "a/memory.max": "2000000000",
        "a/b/cpu.max": "150000 100000",
        "cpu.max": "max 100000",
    }
    found = group(tmp_path, "0::/a/b\n", files)
    assert memory_limit(**found) == 2_000_000_000
    assert cpu_limit(**found) == 1.5


def test_limits_of_version_1(tmp_path):
    files = {
        "memory/job/memory.limit_in_bytes": "1073741824",
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "cpu/job/cpu.cfs_quota_us": "200000",
        "cpu/job/cpu.cfs_period_us": "100000",
    }
    found = group(tmp_path, "4:memory:/job\n3:cpu,cpuacct:/job\n", files)
    assert memory_limit(**found) == 1 << 30
    assert cpu_limit(**found) == 2.0


def test_no_limits(tmp_path):
    found = group(tmp_path, "0::/\n", {"memory.max": "max"})
    assert memory_limit(**found) is None
    assert cpu_limit(**found) is None
    assert memory_limit(tmp_path / "no", tmp_path / "such") is None


def test_a_measured_cpu_reads_and_multiplies():
    """Wide bounds: shared machines measure anything from a tenth to all of what they can."""
    measured = measure(find_device("cpu"))
    assert 1e8 < measured.bandwidth < 1e13
    assert set(measured.measured) == {"bandwidth", "bf16", "int8"}
    assert 1e9 < measured.peaks["bf16"] < 1e15


@pytest.mark.skipif(torch.cuda.is_available(), reason="it may be in this machine")
def test_a_device_that_is_elsewhere_is_not_measured():
    device = find_device("h100")
    assert measure(device) == device
