"""Engines for tests, and one thread: tiny models gain nothing from more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.integration.engines import EngineHost


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The twins are tiny too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineHost]:
    """Real vLLM engines, one after the other."""
    host = EngineHost(tmp_path_factory.mktemp("engines") / "host.log")
    yield host
    host.close()
