"""Checkpoints of rows: made once, made again exactly when something that decides them changed."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare.fakes import make_store
from tests.tiny_models import create_tiny_model
from vllm_quantkit.compare.checkpoints import CHECKPOINTS, Made, Maker
from vllm_quantkit.compare.digests import Digests
from vllm_quantkit.compare.rows import BY_NAME, choose_rows
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.quantize.calibration import CalibrationOptions
from vllm_quantkit.quantize.job import Job
from vllm_quantkit.quantize.output import report
from vllm_quantkit.quantize.output.workspace import Workspace
from vllm_quantkit.quantize.run_options import RunOptions

TEXT = Path(__file__).parents[2] / "examples/tiny-lm/data/held_out.txt"
FEW: dict[str, Any] = {
    "source": str(TEXT),
    "samples": 4,
    "length": 16,
    "held_out": 2,
    "allow_few_samples": True,
}
RTN, GPTQ = BY_NAME["rtn"], BY_NAME["gptq"]

Make = Callable[..., Maker]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    return create_tiny_model("llama", tmp_path / "llama", **sizes)


@pytest.fixture
def aside() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def maker(model: Path, tmp_path: Path, aside: io.StringIO) -> Make:
    """A maker of another process: it knows nothing but what is on the disk."""

    def make(**calibration: Any) -> Maker:
        store, _ = make_store(tmp_path / "store")
        store.terminal.aside.file = aside
        digests = Digests(tmp_path / "digests.json")
        options = CalibrationOptions(**{**FEW, **calibration})
        digest = digests.folder(model)
        return Maker(str(model), model, digest, options, RunOptions(device="cpu"), store, digests)

    return make


def forbid_quantising(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "quantize", lambda *_: pytest.fail("it was made again"))


def test_a_checkpoint_is_made_once(maker: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = maker().checkpoint(RTN)
    assert (made.folder / "config.json").is_file()
    assert made.seconds > 0
    forbid_quantising(monkeypatch)
    assert maker().checkpoint(RTN) == made


def test_rows_that_share_weights_share_the_checkpoint(maker: Make) -> None:
    one, other = choose_rows("gptq,gptq+kv4")[1:]
    assert maker().checkpoint(one) == maker().checkpoint(other)


def change_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One bit of one weight: size, header and time stay."""
    path = model / "model.safetensors"
    facts = path.stat()
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    return {}


def change_version(model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    real = report.importlib.metadata.version

    def version(name: str) -> str:
        return "99.0" if name == "vllm-quantkit" else str(real(name))

    monkeypatch.setattr(report.importlib.metadata, "version", version)
    return {}


def change_samples(model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"samples": 6}


def change_seed(model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"seed": 1}


def touch_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    os.utime(model / "model.safetensors", (1, 1))
    (model / "README.md").write_text("a card")
    return {}


Change = Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]


@pytest.mark.parametrize("change", [change_model, change_version, change_samples, change_seed])
def test_what_decides_a_checkpoint_makes_another(
    maker: Make, model: Path, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    before = maker().checkpoint(GPTQ)
    options = change(model, monkeypatch)
    assert maker(**options).checkpoint(GPTQ).folder != before.folder
    assert before.folder.is_dir()


def test_what_decides_nothing_does_not(
    maker: Make, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = maker().checkpoint(GPTQ)
    touch_model(model, monkeypatch)
    forbid_quantising(monkeypatch)
    assert maker().checkpoint(GPTQ) == before


def test_calibration_does_not_decide_rows_that_need_none(
    maker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = maker().checkpoint(RTN)
    forbid_quantising(monkeypatch)
    assert maker(samples=6).checkpoint(RTN) == before


def test_a_recipe_counts_by_what_it_says(maker: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text("scheme: rtn\ngroup_size: 64\n")
    (row,) = choose_rows(str(recipe))[1:]
    before = maker().checkpoint(row)
    recipe.write_text("# a comment\ngroup_size: 64\nscheme: rtn\n")
    assert maker().checkpoint(row) == before
    recipe.write_text("scheme: rtn\ngroup_size: 32\n")
    assert maker().checkpoint(row).folder != before.folder


def test_a_recipe_does_not_bring_its_own_calibration(maker: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text("scheme: awq\ncalibration: {samples: 512}\n")
    with pytest.raises(ConfigError, match="names its own calibration"):
        maker().checkpoint(choose_rows(str(recipe))[1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_checkpoint_is_made_again(maker: Make, aside: io.StringIO, name: str) -> None:
    made = maker().checkpoint(RTN)
    path = made.folder / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    assert maker().checkpoint(RTN).digest == made.digest
    assert path.read_bytes() == content
    assert "its files are not those that were written" in aside.getvalue()
    assert "it is made again" in aside.getvalue()


def test_a_deleted_checkpoint_is_made_again(maker: Make) -> None:
    made = maker().checkpoint(RTN)
    for path in made.folder.iterdir():
        path.unlink()
    made.folder.rmdir()
    assert maker().checkpoint(RTN).digest == made.digest


def test_a_finished_checkpoint_without_a_note_is_kept(
    maker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process was killed between the quantiser's last step and the note."""
    made = maker().checkpoint(RTN)
    note = made.folder.with_name(made.folder.name + ".json")
    note.unlink()
    forbid_quantising(monkeypatch)
    assert maker().checkpoint(RTN) == made
    assert note.is_file()


def test_a_foreign_folder_in_its_place_is_replaced(maker: Make, aside: io.StringIO) -> None:
    made = maker().checkpoint(RTN)
    made.folder.with_name(made.folder.name + ".json").unlink()
    (made.folder / report.REPORT_FILE).write_text("{}")
    assert maker().checkpoint(RTN).digest == made.digest
    assert "is no report of this version" in aside.getvalue()


def test_a_killed_quantiser_goes_on(maker: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    real = Workspace.write_block

    def write_block(self: Workspace, index: int, *args: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(index)
        real(self, index, *args)

    monkeypatch.setattr(Workspace, "write_block", write_block)
    with pytest.raises(KeyboardInterrupt):
        maker().checkpoint(GPTQ)
    again: list[int] = []
    monkeypatch.setattr(
        Workspace,
        "write_block",
        lambda self, index, *args: (again.append(index), real(self, index, *args)),
    )
    maker().checkpoint(GPTQ)
    assert written == [0]
    assert again == [1], "the first block is not made again"


@pytest.mark.parametrize("plan", ['{"model": {}}', '{"mod'])
def test_what_another_run_left_half_done_is_replaced(
    maker: Make, aside: io.StringIO, plan: str
) -> None:
    made = maker().checkpoint(RTN)
    shutil.move(made.folder, made.folder.with_name(made.folder.name + ".partial"))
    partial = made.folder.with_name(made.folder.name + ".partial")
    made.folder.with_name(made.folder.name + ".json").unlink()
    (partial / "plan.json").write_text(plan)
    assert maker().checkpoint(RTN).digest == made.digest
    assert not partial.exists()
    assert "it was begun under other conditions" in aside.getvalue()


def test_the_number_of_threads_makes_no_other_checkpoint(
    maker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = maker().checkpoint(RTN)
    torch.set_num_threads(2)
    forbid_quantising(monkeypatch)
    assert maker().checkpoint(RTN) == before


def test_a_calibration_of_the_cache_is_made_once(
    maker: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = maker().kv_calibration()
    assert (made.folder / "kv_cache.json").is_file()
    monkeypatch.setattr(
        "vllm_quantkit.compare.checkpoints.calibrate_kv_cache",
        lambda *_, **__: pytest.fail("it was made again"),
    )
    assert maker().kv_calibration() == made


def test_a_store_may_be_moved(maker: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = maker().checkpoint(RTN)
    store = maker().store
    note = store.folder / CHECKPOINTS / f"{made.folder.name}.json"
    note.write_text(note.read_text().replace(str(made.folder), "/elsewhere"))
    forbid_quantising(monkeypatch)
    assert maker().checkpoint(RTN) == Made(**made.model_dump())
