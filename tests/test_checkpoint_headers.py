"""Headers of safetensors files: truncated, corrupt, doubled and missing ones are named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from vllm_quantkit.checkpoint import TensorHeader, read_headers, read_quantization_config
from vllm_quantkit.errors import CheckpointError, ConfigError

INDEX = "model.safetensors.index.json"


def save(folder, tensors, name="model.safetensors"):
    save_file(tensors, folder / name)
    return folder


def save_shards(folder, *shards):
    """Shards with an index, as transformers writes them."""
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        save(folder, tensors, name)
    weight_map = {key: name for name, tensors in zip(names, shards, strict=True) for key in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [folder / name for name in names]


def test_reads_headers_of_one_file(tmp_path):
    save(tmp_path, {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.tensor([5, 7])})
    headers = read_headers(tmp_path)
    file = tmp_path / "model.safetensors"
    assert headers == {
        "a": TensorHeader((2, 3), torch.bfloat16, file),
        "b": TensorHeader((2,), torch.int64, file),
    }
    assert headers["b"].read_integers() == [5, 7]


def test_reads_shards_and_ignores_files_outside_the_index(tmp_path):
    save_shards(tmp_path, {"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    save(tmp_path, {"a": torch.zeros(9)}, "consolidated.safetensors")
    save(tmp_path, {"a": torch.zeros(9)}, "model-old.safetensors")
    assert set(read_headers(tmp_path)) == {"a", "b"}


def test_reads_files_of_another_name_where_there_are_no_usual_ones(tmp_path):
    save(tmp_path, {"a": torch.zeros(1)}, "gptq-4bit.safetensors")
    assert set(read_headers(tmp_path)) == {"a"}


def refused(folder):
    with pytest.raises(CheckpointError) as caught:
        read_headers(folder)
    return str(caught.value)


def test_no_file(tmp_path):
    assert "holds no safetensors file. Point --model at" in refused(tmp_path)


@pytest.mark.parametrize("removed", [1, 4, 100])
def test_truncated_data(tmp_path, removed):
    file = save(tmp_path, {"a": torch.zeros(64)}) / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-removed])
    message = refused(tmp_path)
    assert f"{file} is truncated or corrupt" in message
    assert f"it has {len(whole) - removed} bytes, but its header expects {len(whole)}" in message
    assert "Download the file again" in message


@pytest.mark.parametrize("kept", [0, 7, 8, 20])
def test_truncated_header(tmp_path, kept):
    file = save(tmp_path, {"a": torch.zeros(64)}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refused(tmp_path)
    assert f"it has {kept} bytes, but its header alone needs" in message


def test_trailing_bytes(tmp_path):
    file = save(tmp_path, {"a": torch.zeros(2)}) / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    assert "truncated or corrupt" in refused(tmp_path)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ("{not json", "its header is not valid"),
        ("[]", "its header is not valid"),
        ('{"a": {"dtype": "F32"}}', "its header is not valid"),
        (
            '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            "'a' has 4 bytes, but its shape needs 8",
        ),
        (
            '{"a": {"dtype": "F1", "shape": [2], "data_offsets": [0, 4]}}',
            "stores 'a' as 'F1', which is none of",
        ),
    ],
)
def test_corrupt_header(tmp_path, header, why):
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(data)
    assert why in refused(tmp_path)


def test_git_lfs_pointer(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    assert "Git LFS pointer" in refused(tmp_path)


def test_name_in_two_shards(tmp_path):
    save_shards(tmp_path, {"a": torch.zeros(1), "b": torch.zeros(1)}, {"b": torch.zeros(1)})
    message = refused(tmp_path)
    assert "'b' is stored twice, in model-00001-of-00002.safetensors and" in message
    assert "Remove the file" in message


def test_shard_that_the_index_names_is_missing(tmp_path):
    files = save_shards(tmp_path, {"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    files[1].unlink()
    assert f"names the file {files[1].name}, which is missing" in refused(tmp_path)


def test_shard_is_missing_without_an_index(tmp_path):
    save(tmp_path, {"a": torch.zeros(1)}, "model-00001-of-00003.safetensors")
    message = refused(tmp_path)
    assert "holds 1 of the 3 files model-*-of-00003; number 2 is missing" in message


def test_index_names_a_tensor_that_its_file_lacks(tmp_path):
    files = save_shards(tmp_path, {"a": torch.zeros(1)}, {"b": torch.zeros(1)})
    shutil.copy(files[0], files[1])
    assert "stored twice" in refused(tmp_path)
    save_file({"c": torch.zeros(1)}, files[1])
    assert f"says that {files[1].name} holds the tensor 'b', but it does not" in refused(tmp_path)


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_unreadable_index(tmp_path, index):
    (tmp_path / INDEX).write_text(index)
    assert INDEX in refused(tmp_path)


def test_config_of_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="has no quantisation config"):
        read_quantization_config(tmp_path)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4}')
    assert read_quantization_config(tmp_path) == {"bits": 4}
    (tmp_path / "config.json").write_text('{"quantization_config": {"bits": 8}}')
    assert read_quantization_config(tmp_path) == {"bits": 8}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        read_quantization_config(tmp_path)
