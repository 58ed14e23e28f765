"""A run's w and u come out as Hugging Face models; --verify finds the layer that departs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

from tests.commands import command, note, noted
from tests.convert.models import content, make
from tests.distributed.harness import run_distributed
from tests.markov import VOCAB, write_two_sources

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# `tests.commands.MODEL` as Llama's configuration, 4 layers of it.
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4,
    "num_hidden_layers": 4, "vocab_size": VOCAB, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
}  # fmt: skip
VERIFIED = ("gpt2", "gpt2-untied", "neox", "neox-serial-tied", "llama-tied-rope3",
            "llama-longrope", "qwen2-yarn", "smollm3", "phi3", "gpt-oss", "qwen3",
            "gemma2", "deepseek2", "deepseek3", "llama4", "llama4-images")  # fmt: skip


def commands(folder_name: str) -> None:
    folder = Path(folder_name)
    code = command("reweight", "--config", folder / "x.yaml", "--output", folder / "run")
    note(folder / "notes", "reweight", code)
    for which in ("w", "u"):
        words = ("--load", folder / "run" / "checkpoints", "--hf-reference", folder / "hf",
                 "--save", folder / which, "--which", which, "--verify")  # fmt: skip
        note(folder / "notes", which, command("convert", "export", *words))
    for name in VERIFIED:
        words = ("--hf", folder / name, "--save", folder / f"{name}-megatron", "--verify")
        note(folder / "notes", name, command("convert", "import", *words))
    spoil(folder)
    note(folder / "notes", "spoiled", verify_spoiled(folder))


def spoil(folder: Path) -> None:
    """The same names and shapes, other numbers in layer 1."""
    shutil.copytree(folder / "qwen3", folder / "spoiled")
    path = folder / "spoiled" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.5
    save_file(tensors, path, {"format": "pt"})


def verify_spoiled(folder: Path) -> tuple[int, str]:
    from megatron_scalebio.convert.verify import verify
    from megatron_scalebio.errors import UserError

    try:
        verify(folder / "spoiled", folder / "qwen3-megatron")
    except UserError as error:
        return 2, str(error)
    return 0, ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bilevel")
    write_two_sources(
        folder, model={"num_layers": 4},
        train={"train_iters": 6}, lisa={"lisa_layers": 2, "lisa_interval": 4},
    )  # fmt: skip
    make(folder / "hf", "llama", **LLAMA)
    for name in VERIFIED:
        make(folder / name, name)
    run_distributed(commands, 1, str(folder))
    return folder


def held(part: Path, key: str) -> torch.Tensor:
    """A tensor of a checkpoint, read by torch's own loader."""
    reader = dcp.FileSystemReader(part)
    entry = reader.read_metadata().state_dict_metadata[key]
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state[key]


def keys(part: Path) -> set[str]:
    return set(dcp.FileSystemReader(part).read_metadata().state_dict_metadata)


def test_w_and_u_are_exported(folder: Path) -> None:
    for name in ("reweight", "w", "u"):
        code, said = noted(folder / "notes", name)
        assert code == 0, said
    assert "no layer departs" in noted(folder / "notes", "u")[1]
    [iteration] = (folder / "run" / "checkpoints").glob("iter_0000006")
    w = load_file(folder / "w" / "model.safetensors")
    u = load_file(folder / "u" / "model.safetensors")
    down = "mlp.linear_fc2.weight"
    stacked = held(iteration, f"decoder.layers.{down}")
    own = keys(iteration / "bilevel")
    apart = 0
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert torch.equal(w[name], stacked[layer])
        key = f"u.decoder.layers.{layer}.{down}"
        want = held(iteration / "bilevel", key) if key in own else stacked[layer]
        assert torch.equal(u[name], want)
        apart += not torch.equal(u[name], w[name])
    assert apart > 0
    assert {k: v for k, v in content(folder / "u").items() if "safetensors" not in k} == {
        k: v for k, v in content(folder / "hf").items() if "safetensors" not in k
    }


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_passes(folder: Path, name: str) -> None:
    code, said = noted(folder / "notes", name)
    assert code == 0, said
    assert "no layer departs from transformers" in said


def test_verify_names_the_first_layer_that_departs(folder: Path) -> None:
    code, said = noted(folder / "notes", "spoiled")
    assert code == 2 and "layer 1 departs from transformers by " in said
