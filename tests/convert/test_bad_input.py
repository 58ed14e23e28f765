"""What a user can get wrong: exit code 2, one line naming file and tensor, nothing left behind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import the_only_line
from tests.convert.models import content, convert, edit_json, make

DOWN = "model.layers.1.mlp.down_proj.weight"


def shard_of(hf: Path, name: str) -> Path:
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    return hf / index["weight_map"][name]


def rewrite(hf: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = DOWN) -> None:
    path = shard_of(hf, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def shorten(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def break_header(hf: Path) -> None:
    path = shard_of(hf, DOWN)
    whole = bytearray(path.read_bytes())
    whole[8:12] = b"oops"
    path.write_bytes(whole)


def lie_about_size(hf: Path) -> None:
    path = shard_of(hf, DOWN)
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])


def move_out(hf: Path) -> None:
    path = hf / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][DOWN] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))


def one_dtype_apart(hf: Path) -> None:
    rewrite(hf, lambda tensors: tensors.update({DOWN: tensors[DOWN].bfloat16()}))


def drop_everything(hf: Path) -> None:
    for path in hf.glob("model*"):
        path.unlink()


IMPORTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no folder": (shutil.rmtree, ["config.json: No such file"]),
    "no weights": (drop_everything, ["hf: holds no model.safetensors"]),
    "missing shard": (
        lambda hf: shard_of(hf, DOWN).unlink(), [".safetensors: missing", "tensor model.layers."],
    ),
    "truncated": (lambda hf: shorten(shard_of(hf, DOWN), 7), [".safetensors: cut short", "tensor"]),
    "nothing but a start": (
        lambda hf: shard_of(hf, DOWN).write_bytes(b"abc"), [".safetensors: cut short at 3 bytes"],
    ),
    "header no JSON": (break_header, [".safetensors: not a safetensors file"]),
    "header too long": (lie_about_size, [".safetensors: cut short"]),
    "wrong shape": (
        lambda hf: rewrite(hf, lambda t: t.update({DOWN: torch.ones(3, 4)})),
        [".safetensors:", f"{DOWN} has shape [3, 4], config.json asks for [24, 44]"],
    ),
    "transposed": (
        lambda hf: rewrite(hf, lambda t: t.update({DOWN: t[DOWN].t().contiguous()})),
        [f"{DOWN} has shape [44, 24]"],
    ),
    "unexpected tensor": (
        lambda hf: rewrite(hf, lambda t: t.update({"model.layers.1.extra": torch.ones(3)})),
        [".safetensors: unexpected tensor model.layers.1.extra"],
    ),
    "one layer too many": (
        lambda hf: edit_json(hf / "config.json", num_hidden_layers=2),
        ["unexpected tensor model.layers.2."],
    ),
    "missing tensor": (
        lambda hf: rewrite(hf, lambda t: t.pop(DOWN)),
        [f"lacks tensor {DOWN}, which model.safetensors.index.json places there"],
    ),
    "one layer too few": (
        lambda hf: edit_json(hf / "config.json", num_hidden_layers=4),
        ["lacks tensor model.layers.3."],
    ),
    "two dtypes": (one_dtype_apart, [DOWN, "torch.bfloat16", "torch.float32"]),
    "unknown architecture": (
        lambda hf: edit_json(hf / "config.json", architectures=["MambaForCausalLM"]),
        ["config.json: architectures: 'MambaForCausalLM' is not supported", "LlamaForCausalLM"],
    ),
    "unsupported option": (
        lambda hf: edit_json(hf / "config.json", quantization_config={"bits": 4}),
        ["quantization_config: {'bits': 4} is not supported", "already, delete this key)"],
    ),
    "another option": (
        lambda hf: edit_json(hf / "config.json", attention_bias=True),
        ["config.json: attention_bias: True is not supported"],
    ),
    "index leads out": (move_out, ["model.safetensors.index.json: no index of shards", DOWN]),
    "index no JSON": (
        lambda hf: (hf / "model.safetensors.index.json").write_text("{"),
        ["model.safetensors.index.json: no index of shards"],
    ),
    "index nested deeply": (
        lambda hf: (hf / "model.safetensors.index.json").write_text("[" * 100_000),
        ["model.safetensors.index.json: no index of shards"],
    ),
    "config nested deeply": (
        lambda hf: (hf / "config.json").write_text('{"a":' * 100_000),
        ["config.json: not valid JSON: maximum recursion depth"],
    ),
    "labels of another type": (
        lambda hf: edit_json(hf / "config.json", id2label=5),
        [
            "config.json: id2label: '5' is not supported by transformers: ",
            "(mend it, or fetch the file again)",
        ],
    ),
    "dtype that is none": (
        lambda hf: edit_json(hf / "config.json", dtype="x"), ["config.json: dtype: 'x' is not"],
    ),
    "model type of another type": (
        lambda hf: edit_json(hf / "config.json", model_type=["a"]), ["config.json: model_type: "],
    ),
    "existing output": (
        lambda hf: (hf.parent / "out").mkdir(), ["out: exists (choose a new folder"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder `hf` in shards, and `megatron` made of it."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder / "hf", "llama", shards="8KB")
    words = ("--hf", folder / "hf", "--save", folder / "megatron")
    assert convert("import", *words, "--make-vocab-size-divisible-by", 8) == 0
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "x")
    return tmp_path / "x"


def assert_refused(folder: Path, fragments: list[str], capsys: Any, *argv: object) -> None:
    before = (folder / "out").exists()
    assert convert(*argv) == 2
    line = the_only_line(capsys.readouterr().err)
    for fragment in fragments:
        assert fragment in line
    assert (folder / "out").exists() == before
    assert not list(folder.glob(".*incomplete"))


@pytest.mark.parametrize("name", IMPORTS)
def test_import_refuses(folder: Path, capsys: Any, name: str) -> None:
    spoil, fragments = IMPORTS[name]
    spoil(folder / "hf")
    words = ("import", "--hf", folder / "hf", "--save", folder / "out")
    assert_refused(folder, fragments, capsys, *words)


def other_family(folder: Path) -> None:
    shutil.rmtree(folder / "hf")
    make(folder / "hf", "qwen2")


def tied_reference(folder: Path) -> None:
    shutil.rmtree(folder / "hf")
    make(folder / "hf", "llama-tied-rope3")


def other_size(folder: Path) -> None:
    shutil.rmtree(folder / "hf")
    make(folder / "hf", "llama", intermediate_size=48)


def other_depth(folder: Path) -> None:
    shutil.rmtree(folder / "hf")
    make(folder / "hf", "llama", num_hidden_layers=2)


def larger_vocabulary(folder: Path) -> None:
    shutil.rmtree(folder / "hf")
    make(folder / "hf", "llama", vocab_size=200)


def smaller_vocabulary(folder: Path) -> None:
    shutil.rmtree(folder / "hf")
    make(folder / "hf", "llama", vocab_size=50)


def secret_link(folder: Path) -> None:
    (folder / "secret").write_text("key")
    (folder / "hf" / "notes.txt").symlink_to(folder / "secret")


RELEASE = "megatron/release"
EXPORTS: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no checkpoint": (
        lambda folder: shutil.rmtree(folder / "megatron"), ["megatron: not a Megatron checkpoint"],
    ),
    "tracker of nothing": (
        lambda folder: (folder / "megatron" / "latest_checkpointed_iteration.txt").write_text("7"),
        ["iter_0000007: lacks metadata.json"],
    ),
    "tracker no number": (
        lambda folder: (folder / "megatron" / "latest_checkpointed_iteration.txt").write_text("x"),
        ["latest_checkpointed_iteration.txt: 'x' is not a step"],
    ),
    "truncated data": (
        lambda folder: shorten(folder / RELEASE / "__0_0.distcp", 50_000),
        ["__0_0.distcp: cut short"],
    ),
    "missing data": (
        lambda folder: (folder / RELEASE / "__0_0.distcp").unlink(), ["__0_0.distcp: missing"],
    ),
    "no metadata": (
        lambda folder: (folder / RELEASE / ".metadata").unlink(), ["release: lacks .metadata"],
    ),
    "missing config": (
        lambda folder: (folder / "hf" / "config.json").unlink(), ["config.json: No such file"],
    ),
    "checkpoint of another family": (
        other_family, ["release: lacks tensor decoder.layers.self_attention.linear_qkv.bias"],
    ),
    "tied reference": (
        tied_reference, ["release: holds tensor output_layer.weight, for which LlamaForCausalLM"],
    ),
    "another width": (other_size, ["decoder.layers.mlp.linear_fc1.weight has shape [88, 24]"]),
    "another depth": (other_depth, ["has 3 layers, the reference 2"]),
    "larger vocabulary": (
        larger_vocabulary, ["embedding.word_embeddings.weight has shape [104, 24]", "[200, 24]"],
    ),
    "smaller vocabulary": (
        smaller_vocabulary, ["embedding.word_embeddings.weight has shape [104, 24]", "[50, 24]"],
    ),
    "reference lacks a shard": (
        lambda folder: shard_of(folder / "hf", DOWN).unlink(), [".safetensors: missing"],
    ),
    "broken link in the reference": (
        lambda folder: (folder / "hf" / "notes.txt").symlink_to(folder / "hf" / "gone.txt"),
        ["notes.txt: is a broken link"],
    ),
    "link out of the reference": (secret_link, ["notes.txt: links out of the folder"]),
    "existing output": (lambda folder: (folder / "out").mkdir(), ["out: exists"]),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPORTS)
def test_export_refuses(folder: Path, capsys: Any, name: str) -> None:
    spoil, fragments = EXPORTS[name]
    spoil(folder)
    words = ("--hf-reference", folder / "hf", "--save", folder / "out")
    assert_refused(folder, fragments, capsys, "export", "--load", folder / "megatron", *words)


def test_export_without_a_tokenizer_warns(folder: Path, capsys: Any) -> None:
    (folder / "hf" / "tokenizer.json").unlink()
    words = ["--load", folder / "megatron", "--hf-reference", folder / "hf"]
    assert convert("export", *words, "--save", folder / "out") == 0
    assert (folder / "out" / "config.json").is_file()
    warning = " ".join(capsys.readouterr().err.split())
    assert "hf holds no tokenizer, so" in warning


def test_export_refuses_u_of_an_imported_checkpoint(folder: Path, capsys: Any) -> None:
    words = ("--hf-reference", folder / "hf", "--save", folder / "out", "--which", "u")
    fragments = ["release: holds no u: it is not the checkpoint of a bilevel run"]
    assert_refused(folder, fragments, capsys, "export", "--load", folder / "megatron", *words)


def test_damaged_bytes_are_found(folder: Path, capsys: Any) -> None:
    path = folder / RELEASE / "__0_0.distcp"
    damaged = bytearray(path.read_bytes())
    for place in range(200, len(damaged), 500):
        damaged[place] ^= 0xFF
    path.write_bytes(damaged)
    words = ("--hf-reference", folder / "hf", "--save", folder / "out")
    command = ("export", "--load", folder / "megatron", *words)
    fragments = ["release/__0_0.distcp: its bytes have changed since it was saved"]
    assert_refused(folder, fragments, capsys, *command)
    (folder / RELEASE / "integrity.json").unlink()  # as in a checkpoint of Megatron-LM
    assert_refused(folder, ["release: could not read "], capsys, *command)


@pytest.mark.parametrize("flag", ["--make-vocab-size-divisible-by", "--tensor-model-parallel-size"])
def test_padding_below_one(folder: Path, capsys: Any, flag: str) -> None:
    words = ("import", "--hf", folder / "hf", "--save", folder / "out", flag, 0)
    assert_refused(folder, [f"{flag}: 0 is below 1"], capsys, *words)


def test_full_disk(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1 << 20))
    words = ("import", "--hf", folder / "hf", "--save", folder / "out")
    assert_refused(folder, ["out: needs 0.06 GiB, its disk has 0.00 GiB left"], capsys, *words)


def test_disk_fills_up(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    words = ("import", "--hf", folder / "hf", "--save", folder / "out")
    fragments = ["__0_0.distcp: could not write ", "No space left on device"]
    assert_refused(folder, fragments, capsys, *words)


def test_stopped(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.save", stop)
    assert convert("import", "--hf", folder / "hf", "--save", folder / "out") == 3
    assert "stopped; nothing was written" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "megatron"]


def test_what_a_killed_conversion_left_is_cleared(folder: Path) -> None:
    left = folder / ".out.incomplete"
    left.mkdir()
    (left / "part").write_text("x")
    words = ("--hf-reference", folder / "hf", "--save", folder / "out")
    assert convert("export", "--load", folder / "megatron", *words) == 0
    assert content(folder / "out") == content(folder / "hf")
    assert not left.exists()


def test_a_bin_file_runs_no_code(tmp_path: Path, capsys: Any) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "taken",)

    hf = make(tmp_path / "hf", "llama")
    (hf / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Touch()}, hf / "pytorch_model.bin")
    words = ("import", "--hf", hf, "--save", tmp_path / "out")
    assert_refused(
        tmp_path,
        ["pytorch_model.bin: is damaged, or holds more than plain tensors"],
        capsys,
        *words,
    )
    assert not (tmp_path / "taken").exists()


def test_tied_head_that_differs(tmp_path: Path, capsys: Any) -> None:
    hf = make(tmp_path / "hf", "qwen2-tied")
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][96, 3] += 1
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    words = ("import", "--hf", hf, "--save", tmp_path / "out")
    fragments = ["lm_head.weight is not model.embed_tokens.weight, although tie_word_embeddings"]
    assert_refused(tmp_path, fragments, capsys, *words)
