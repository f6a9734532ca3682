"""A model run block by block from its files computes what transformers computes."""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPTNeoXConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.tiny_models import COMMON, GEMMA, MOE_MODELS, TINY_MODELS, create_tiny_model, randomise
from vllm_quantkit.quantize.model.model_shell import ModelShell

FAMILIES = [family for family in (*TINY_MODELS, *MOE_MODELS) if family != "gpt2"]

SMALL = {"hidden_size": 128, "intermediate_size": 160}

ROUNDING = 1e-6
"""Of the largest logit. The code is the same, and so is every product; only the sums over the
experts of a token may be made in another order."""

KEPT = {
    "mixtral": ("model.layers.1.block_sparse_moe.gate",),
    "qwen2_moe": ("model.layers.1.mlp.gate", "model.layers.1.mlp.shared_expert_gate"),
    "qwen3_moe": ("model.layers.1.mlp.gate",),
    "deepseek_v2": ("model.layers.1.mlp.gate",),
    "deepseek_v3": ("model.layers.1.mlp.gate",),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    return request.param, create_tiny_model(request.param, folder, **SMALL)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model("llama", tmp_path_factory.mktemp("llama") / "model", **SMALL)


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The plain model; soft caps on attention exist in the eager implementation only."""
    capped = json.loads((folder / "config.json").read_text()).get("attn_logit_softcapping")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="eager" if capped else "sdpa",
        experts_implementation="eager",
    )
    return model.eval()


def tokens(rows: int = 2, length: int = 23) -> Tensor:
    return torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_by_blocks(shell: ModelShell, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with shell.open_ends():
        hidden, calls = shell.enter(ids, mask)
    for index in range(shell.block_count):
        with shell.block(index) as block:
            hidden = calls[index].run(block, hidden)
    with shell.open_ends():
        return shell.logits(hidden, ids, mask)


def assert_same(found: Tensor, expected: Tensor, mask: Tensor | None = None) -> None:
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= ROUNDING * expected.abs().max()


@torch.no_grad()
def test_same_logits(family):
    shell = ModelShell.open(family[1])
    assert shell.known
    assert shell.loss == ""
    assert_same(logits_by_blocks(shell, tokens()), reference(family[1])(tokens()).logits)


@torch.no_grad()
def test_same_logits_of_padded_batches(family):
    mask = torch.ones(3, 23, dtype=torch.int64)
    mask[1, 9:], mask[2, :4] = 0, 0
    expected = reference(family[1])(tokens(3), attention_mask=mask).logits
    assert_same(logits_by_blocks(ModelShell.open(family[1]), tokens(3), mask), expected, mask)


@torch.no_grad()
def test_same_logits_in_bfloat16(family):
    """Bit by bit, where no sum over experts is made in another order."""
    shell = ModelShell.open(family[1], dtype=torch.bfloat16)
    expected = reference(family[1], torch.bfloat16)(tokens()).logits
    found = logits_by_blocks(shell, tokens())
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, expected)


def test_names_and_shapes(family):
    name, folder = family
    shell = ModelShell.open(folder)
    stored = load_stored(folder)
    assert shell.stored_dtype is torch.bfloat16
    assert shell.outside() == ("lm_head",)
    assert shell.kept(1) == KEPT.get(name, ())
    seen = set()
    for index in range(shell.block_count):
        prefix = shell.block_name(index)
        for layer, shape in shell.linears(index).items():
            weight = stored[f"{shell.stored_name(f'{prefix}.{layer}')}.weight"]
            assert weight.shape == (shape.out_features, shape.in_features)
        seen |= set(shell.block_tensors(index))
    assert seen == {name for name in stored if ".layers." in name}


def load_stored(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


@torch.no_grad()
def test_weights_of_several_files(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    found = logits_by_blocks(ModelShell.open(tmp_path), tokens())
    assert_same(found, reference(llama)(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("family_name", ["llama", "gemma2"])
def test_tied_embeddings_are_stored_once(family_name, tmp_path):
    folder = create_tiny_model(family_name, tmp_path, tie_word_embeddings=True, **SMALL)
    assert "lm_head.weight" not in load_stored(folder)
    shell = ModelShell.open(folder)
    assert shell.outside() == ("lm_head",)
    assert_same(logits_by_blocks(shell, tokens()), reference(folder)(tokens()).logits)


def real_bytes(module: torch.nn.Module) -> int:
    tensors = {id(t): t for t in (*module.parameters(), *module.buffers()) if not t.is_meta}
    return sum(tensor.nbytes for tensor in tensors.values())


def test_only_one_block_is_in_memory(family):
    shell = ModelShell.open(family[1])
    model = shell._skeleton.model
    at_rest = real_bytes(model)
    assert at_rest < 10_000
    for index in range(shell.block_count):
        with shell.block(index) as block:
            alive = [weakref.ref(p) for p in block.parameters()]
            held = real_bytes(block)
            assert not any(p.is_meta for p in block.parameters())
            assert real_bytes(model) == at_rest
        # The module is still there, its weights are not.
        assert real_bytes(block) == 0 < held
        assert all(parameter() is None for parameter in alive)
    with shell.open_ends():
        assert real_bytes(model) > at_rest
    assert real_bytes(model) == at_rest


def resident_bytes() -> int:
    """Memory of the process, without what the allocator keeps of freed tensors."""
    ctypes.CDLL(None).malloc_trim(0)
    with Path("/proc/self/statm").open() as stream:
        return int(stream.read().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_the_process_goes_down(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    shell = ModelShell.open(create_tiny_model("llama", tmp_path, **sizes))
    block_bytes = sum(4 * s.out_features * s.in_features for s in shell.linears(0).values())
    before = resident_bytes()
    for index in range(shell.block_count):
        with shell.block(index):
            assert 0.95 < (resident_bytes() - before) / block_bytes < 1.2
        assert (resident_bytes() - before) / block_bytes < 0.2


def test_a_block_is_new_each_time(llama):
    shell = ModelShell.open(llama)
    with shell.block(0) as block:
        block.mlp.up_proj.register_forward_pre_hook(lambda *_: 1 / 0)
        block.mlp.up_proj.weight.zero_()
    with shell.block(0) as block:
        assert block.mlp.up_proj.weight.abs().max() > 0
        block.mlp.up_proj(torch.ones(1, 128))


def test_weights_are_released_when_work_on_them_fails(llama):
    shell = ModelShell.open(llama)
    with pytest.raises(ZeroDivisionError), shell.block(1) as block:
        1 / 0  # noqa: B018
    assert all(parameter.is_meta for parameter in block.parameters())


def test_equal_arguments_are_stored_once(family):
    shell = ModelShell.open(family[1])
    mask = torch.ones(2, 23, dtype=torch.int64)
    mask[1, 20:] = 0
    with shell.open_ends():
        first, second = (shell.enter(tokens(), mask)[1] for _ in range(2))
    tensors = [tensors_of(call) for call in (*first, *second)]
    assert all(len(found) >= 2 for found in tensors)
    distinct = {pointer for found in tensors for pointer in found}
    # Masks and rotations of sliding and of full attention at most, and positions.
    assert len(distinct) <= 7
    assert set().union(*tensors[: len(first)]) == distinct


def tensors_of(call) -> set[int]:
    values = [*call.args, *call.kwargs.values()]
    flat = [item for value in values for item in (value if isinstance(value, tuple) else [value])]
    return {item.data_ptr() for item in flat if isinstance(item, Tensor)}


def test_the_ends_must_be_open(llama):
    shell = ModelShell.open(llama)
    with shell.open_ends():
        with shell.open_ends():
            pass
        shell.enter(tokens(), None)
    with pytest.raises(RuntimeError, match="open_ends"):
        shell.enter(tokens(), None)


def gemma3_with_images(folder: Path) -> Path:
    torch.manual_seed(0)
    text = {**COMMON, **GEMMA, **SMALL}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model, 16)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_the_language_part_of_a_model_that_sees_images(tmp_path):
    folder = gemma3_with_images(tmp_path)
    shell = ModelShell.open(folder)
    assert shell.known
    assert shell.block_count == 2
    assert shell.block_name(1) == "model.language_model.layers.1"
    stored = shell.stored_name("model.language_model.layers.1.mlp.up_proj")
    assert stored == "language_model.model.layers.1.mlp.up_proj"
    assert f"{stored}.weight" in shell.block_tensors(1)
    outside = shell.outside()
    assert "lm_head" in outside
    vision = [name for name in outside if name.startswith("vision_tower.")]
    assert any(name.endswith("encoder.layers.2.mlp.fc1") for name in vision)
    assert not any(name.startswith("language_model.model.layers") for name in outside)
    assert_same(logits_by_blocks(shell, tokens()), reference(folder)(tokens()).logits)


def save_random(config: PreTrainedConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_an_unknown_architecture_is_taken_as_it_is_found(tmp_path):
    sizes = {**COMMON, **SMALL, "num_attention_heads": 2, "head_dim": None}
    folder = save_random(GPTNeoXConfig(**sizes), tmp_path)
    shell = ModelShell.open(folder)
    assert not shell.known
    assert "'gpt_neox'" in shell.loss
    assert shell.block_name(0) == "gpt_neox.layers.0"
    assert [stage.layers for stage in shell.stages(0)] == [
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ]
    assert all(stage.source is None for stage in shell.stages(0))
    assert shell.outside() == ("embed_out",)
    assert_same(logits_by_blocks(shell, tokens()), reference(folder)(tokens()).logits)


@torch.no_grad()
def test_experts_of_an_unknown_architecture_are_taken_apart(tmp_path):
    heads = {"head_dim": 32, "num_key_value_heads": 4}
    sizes = {**COMMON, **SMALL, **heads, "num_experts": 4, "num_experts_per_tok": 2}
    folder = save_random(OlmoeConfig(**sizes), tmp_path)
    shell = ModelShell.open(folder)
    assert not shell.known
    assert "mlp.experts.3.down_proj" in shell.linears(1)
    assert shell.kept(1) == ("model.layers.1.mlp.gate",)
    assert_same(logits_by_blocks(shell, tokens()), reference(folder)(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("family_name", ["qwen2_moe", "qwen3_moe"])
def test_experts_in_one_tensor_stay_in_16_bits(family_name, tmp_path):
    folder = create_tiny_model(family_name, tmp_path, **SMALL)
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    expected = reference(folder)(tokens()).logits
    fused = fuse(stored, "model.layers.1.mlp.experts", 4)
    save_file(fused, file, metadata={"format": "pt"})
    shell = ModelShell.open(folder)
    assert "mlp.experts" in shell.loss
    assert not any("experts" in name for name in shell.linears(1))
    assert "model.layers.1.mlp.experts" in shell.kept(1)
    # They read the norm, too, so no scale may go into it.
    assert "post_attention_layernorm" not in {s.source.module for s in shell.stages(1) if s.source}
    assert_same(logits_by_blocks(shell, tokens()), expected)


def fuse(stored: dict[str, Tensor], prefix: str, count: int) -> dict[str, Tensor]:
    """Puts per-expert weights into transformers' fused parameters."""

    def stack(name: str) -> Tensor:
        return torch.stack([stored[f"{prefix}.{e}.{name}.weight"] for e in range(count)])

    others = {name: value for name, value in stored.items() if not name.startswith(prefix)}
    gate_up = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
    return {
        **others,
        f"{prefix}.gate_up_proj": gate_up,
        f"{prefix}.down_proj": stack("down_proj"),
    }


def test_layers_the_model_does_not_run_are_outside(llama, tmp_path):
    copy_model(llama, tmp_path)
    stored = load_stored(tmp_path)
    stored["model.layers.2.eh_proj.weight"] = torch.ones(4, 8, dtype=torch.bfloat16)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert ModelShell.open(tmp_path).outside() == ("lm_head", "model.layers.2.eh_proj")


def copy_model(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
