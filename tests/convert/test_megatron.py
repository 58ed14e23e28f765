"""Imported checkpoints are what Megatron-Core saves, and exports come from any layout and rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_scalebio.convert.exporter import export_checkpoint
from megatron_scalebio.convert.importer import import_checkpoint
from tests.commands import command, note, noted
from tests.convert.models import MODELS, content, convert, make
from tests.distributed.harness import next_layout, run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

EVERY = ("gpt2", "neox", "llama", "llama-tied-rope3", "qwen2-tied", "qwen3", "gemma2")
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": PP2,
    "vpp": {**PP2, "num_layers_per_virtual_pipeline_stage": 1},
    "tp2-layers-apart": {"tensor_model_parallel_size": 2},
}
# Megatron's other form: decoder.layers.3.…, each layer's tensors of their own.
FORMS = {**dict.fromkeys(LAYOUTS), "tp2-layers-apart": {"non_homogeneous_layers": True}}


def make_with_4_layers(folder: Path, name: str) -> Path:
    key = "n_layer" if MODELS[name][0] == "GPT2" else "num_hidden_layers"
    return make(folder, name, shards="20KB", **{key: 4})


def save_again(folder_name: str) -> None:
    """Loads every imported model under every layout of two ranks, and lets Megatron save it."""
    from megatron.core import dist_checkpointing

    from megatron_scalebio import runtime
    from megatron_scalebio.checkpoint import saver
    from megatron_scalebio.checkpoint.sharding import model_state
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.model.provider import build_model
    from megatron_scalebio.model.settings import transformer_config

    folder = Path(folder_name)
    for name in EVERY:
        for layout, parallel in LAYOUTS.items():
            model = {"hf": str(folder / name / "hf"), "make_vocab_size_divisible_by": 8}
            config = load_config(None, {"model": model, "parallel": parallel})
            runtime.start(config)
            assert config.model.vocab_size is not None
            chunks = build_model(config, transformer_config(config), config.model.vocab_size)
            saver.load_pretrained(chunks, folder / name / "megatron", config.model.vocab_size)
            saved = folder / name / layout
            runtime.on_main(saved.mkdir)
            state: dict[str, Any] = {**model_state(chunks, FORMS[layout]), "iteration": 1}
            dist_checkpointing.save(state, str(saved))
            next_layout()


def convert_on_ranks(folder_name: str) -> None:
    folder = Path(folder_name)
    convert_words = (
        ("import", "--hf", folder / "hf", "--save", folder / "megatron-2"),
        ("export", "--load", folder / "megatron-2", "--hf-reference", folder / "hf",
         "--save", folder / "back-2"),
        ("import", "--hf", folder / "hf", "--save", folder / "megatron-2"),
    )  # fmt: skip
    for number, words in enumerate(convert_words):
        note(folder / "notes", str(number), command("convert", *words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    for name in EVERY:
        hf = make_with_4_layers(folder / name / "hf", name)
        options = {"make_vocab_size_divisible_by": 8, "tensor_model_parallel_size": 2}
        import_checkpoint(hf, folder / name / "megatron", **options)
    run_distributed(save_again, 2, str(folder))
    return folder


def metadata(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


def tensors(held: Metadata) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {
        name: (tuple(entry.size), entry.properties.dtype)
        for name, entry in held.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


@pytest.mark.parametrize("name", EVERY)
def test_names_shapes_and_dtypes_are_megatrons(folder: Path, name: str) -> None:
    ours = metadata(folder / name / "megatron" / "release")
    theirs = metadata(folder / name / "tp2")
    assert tensors(ours) == tensors(theirs)
    assert set(theirs.state_dict_metadata) <= set(ours.state_dict_metadata), "objects"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EVERY)
def test_export_from_any_layout_is_bit_identical(folder: Path, name: str, layout: str) -> None:
    hf, back = folder / name / "hf", folder / name / f"back-{layout}"
    export_checkpoint(folder / name / layout, hf, back)
    assert content(back) == content(hf)


def test_ranks_share_the_work(tmp_path: Path) -> None:
    hf = make_with_4_layers(tmp_path / "hf", "llama")
    run_distributed(convert_on_ranks, 2, str(tmp_path))
    for rank in (0, 1):
        assert noted(tmp_path / "notes", "0", rank)[0] == 0, noted(tmp_path / "notes", "0", rank)
        assert noted(tmp_path / "notes", "1", rank)[0] == 0, noted(tmp_path / "notes", "1", rank)
        assert noted(tmp_path / "notes", "2", rank)[0] == 2
    assert content(tmp_path / "back-2") == content(hf)
    files = sorted(p.name for p in (tmp_path / "megatron-2" / "release").glob("*.distcp"))
    assert files == ["__0_0.distcp", "__1_0.distcp"]
    reference = "--hf-reference", hf, "--save", tmp_path / "back-1"
    assert convert("export", "--load", tmp_path / "megatron-2", *reference) == 0
    assert content(tmp_path / "back-1") == content(hf)
