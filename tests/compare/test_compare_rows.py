"""What `--rows` and `--add` may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_quantkit.compare.rows import BASE, BY_NAME, OTHERS, ROWS, choose_rows
from vllm_quantkit.errors import ConfigError
from vllm_quantkit.quantize.recipes.presets import PRESETS
from vllm_quantkit.schemes import SCHEMES


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def names(rows: str | None, *add: str) -> list[str]:
    return [row.name for row in choose_rows(rows, add)]


def test_the_table_of_the_field() -> None:
    assert names(None) == ["16-bit", "fp8", "smoothquant", "int8", "gptq", "awq", "awq+kv4"]


def test_every_scheme_of_the_quantiser_has_a_row() -> None:
    assert {row.scheme for row in BY_NAME.values() if row.scheme} == PRESETS.keys()


def test_every_method_that_quantises_at_load_has_a_row() -> None:
    reads_checkpoints_only = {"quantkit", "quantkit-awq", "quantkit-gptq", "quantkit-kv4"}
    assert {row.method for row in OTHERS if row.method} == SCHEMES.keys() - reads_checkpoints_only


def test_names_are_unique_and_the_16_bit_model_is_first() -> None:
    assert len(BY_NAME) == len(ROWS) + len(OTHERS)
    assert choose_rows("awq,fp8")[0] == BASE
    assert names("awq,bf16,awq") == ["16-bit", "awq"]


def test_rows_can_be_added() -> None:
    assert names("fp8", "rtn, kv4", "quantkit-int8") == [
        "16-bit",
        "fp8",
        "rtn",
        "kv4",
        "quantkit-int8",
    ]


def test_any_row_may_have_a_cache_of_4_bits() -> None:
    gptq = choose_rows("gptq+kv4")[1]
    assert gptq.kv4
    assert (gptq.scheme, gptq.name, gptq.title) == ("gptq", "gptq+kv4", "INT4 GPTQ + KV INT4")
    assert choose_rows("bf16+kv4")[1] == BY_NAME["kv4"]


def test_checkpoints_and_recipes_are_rows(checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mixed.yaml"
    recipe.write_text("scheme: awq")
    rows = choose_rows(
        f"{checkpoint},theirs={checkpoint}@vllm:awq,{recipe},other={recipe}", [f"b={checkpoint}"]
    )
    assert [row.name for row in rows[1:]] == ["mine", "theirs", "mixed", "other", "b"]
    assert rows[2].folder == checkpoint
    assert rows[2].method == "vllm:awq"
    assert rows[3].recipe == recipe
    assert rows[3].is_made
    assert not rows[1].is_made


def test_vllms_own_methods_are_rows() -> None:
    row = choose_rows("vllm:fp8")[1]
    assert (row.method, row.title) == ("vllm:fp8", "vLLM's fp8")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("awk", "there is no row 'awk': did you mean awq?"),
        ("nothing-like-it", "Rows are 16-bit, fp8, smoothquant, int8"),
        ("awq,,fp8", "has an empty name"),
        ("kv4+kv4", "has a KV cache of 4 bits already"),
        ("mine=no/such/folder", "no/such/folder is neither a checkpoint's folder nor a recipe"),
        ("vllm:", "there is no row 'vllm:'"),
    ],
)
def test_bad_rows_are_one_sentence(rows: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_rows(rows)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        choose_rows(f"x={tmp_path}")


def test_unknown_methods_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="there is no method 'quantkit-int3'"):
        choose_rows(f"x={checkpoint}@quantkit-int3")


def test_two_rows_of_one_name_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="two rows are called 'awq'"):
        choose_rows(f"awq,awq={checkpoint}")
    with pytest.raises(ConfigError, match="two rows are called '16-bit'"):
        choose_rows(f"16-bit={checkpoint}")
