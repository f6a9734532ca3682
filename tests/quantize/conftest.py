from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_models import create_tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices are slower on several threads, far slower where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two small layers, its heads in groups of two."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    create_tiny_model("llama", folder, **sizes)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
