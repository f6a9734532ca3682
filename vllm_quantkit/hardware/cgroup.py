"""Limits of the container that this process runs in, by Linux's control groups.

https://docs.kernel.org/admin-guide/cgroup-v2.html: a group's files lie under the mount in the path
that /proc/self/cgroup says; inside a container often at the mount itself. Version 1 has a mount
for each kind of limit. A parent's limit binds too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOUNT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

UNLIMITED = 1 << 60
"""Version 1 says a number beyond it where there is no limit."""


def memory_limit(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes that the process may use; None without a limit."""
    found = [
        int(text)
        for text in (
            *_read("memory.max", mount, membership, ""),
            *_read("memory.limit_in_bytes", mount / "memory", membership, "memory"),
        )
        if text.isdigit() and int(text) < UNLIMITED
    ]
    return min(found, default=None)


def cpu_limit(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> float | None:
    """CPUs' worth of time that the process may use; None without a limit."""
    found = []
    for text in _read("cpu.max", mount, membership, ""):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            found.append(int(quota) / int(period))
    quotas = _read("cpu.cfs_quota_us", mount / "cpu", membership, "cpu")
    periods = _read("cpu.cfs_period_us", mount / "cpu", membership, "cpu")
    for quota, period in zip(quotas, periods, strict=False):
        if quota.isdigit() and period.isdigit():
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _read(name: str, mount: Path, membership: Path, controller: str) -> Iterator[str]:
    """The file `name` of the process's group and of its parents, as far as they can be seen."""
    for folder in _groups(mount, membership, controller):
        try:
            yield (folder / name).read_text().strip()
        except OSError:
            continue


def _groups(mount: Path, membership: Path, controller: str) -> list[Path]:
    """The group's folder and its parents', the mount last."""
    inside = Path()
    if membership.exists():
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                inside = Path(path.lstrip("/"))
    return [mount / part for part in (inside, *inside.parents)]
