from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_models import create_tiny_model
from tests.written_models import write_model
from vllm_quantkit.spec import SchemeSpec, WeightSpec

INT4 = SchemeSpec(
    dialect="awq", weight=WeightSpec(bits=4, group_size=64, symmetric=False), variant="gemm"
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of a test outlives it."""
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two small layers in 16 bits."""
    return create_tiny_model("llama", tmp_path_factory.mktemp("evaluate") / "model")


@pytest.fixture(scope="session")
def quantised(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in 4 bits."""
    return write_model(llama, tmp_path_factory.mktemp("int4") / "int4", lambda _: INT4).folder
