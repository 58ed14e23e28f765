"""Checksums of a checkpoint's files, by themselves; whole checkpoints are in test_damage.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.validation import save_integrity_manifest

from megatron_scalebio.checkpoint import integrity
from megatron_scalebio.checkpoint.integrity import changed_file, hash_written, seal

NAMES = [".metadata", "metadata.json", *(f"__{rank}_0.distcp" for rank in (0, 1, 11))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).write_bytes(name.encode() * 1000)
    (tmp_path / "bilevel").mkdir()
    return tmp_path


def test_the_manifest_is_the_one_that_megatron_writes(folder: Path) -> None:
    save_integrity_manifest(str(folder))
    theirs = json.loads((folder / "integrity.json").read_text())
    (folder / "integrity.json").unlink()
    for rank in (0, 1, 11):
        hash_written(folder, rank)
    part = json.loads((folder / "integrity-1.part").read_text())
    assert list(part) == ["__1_0.distcp"], "not rank 11's"
    seal(folder)
    assert json.loads((folder / "integrity.json").read_text()) == theirs
    assert set(theirs["files"]) == set(NAMES)
    left = {path.name for path in folder.iterdir()}
    assert left == {*NAMES, "bilevel", "integrity.json"}


def test_what_a_rank_told_is_not_read_again(folder: Path) -> None:
    hash_written(folder, 0)
    (folder / "__0_0.distcp").write_bytes(b"damaged between the two")
    seal(folder)
    assert changed_file(folder).startswith(f"{folder}/__0_0.distcp: its bytes have changed")


def test_what_no_rank_could_tell_is_hashed_at_the_end(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as disk:
        disk.setattr(Path, "rename", full)
        hash_written(folder, 0)
    assert not (folder / "integrity-0.part").exists()
    seal(folder)
    assert changed_file(folder) == ""
    assert set(json.loads((folder / "integrity.json").read_text())["files"]) == set(NAMES)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("name", NAMES)
def test_one_rank_finds_a_changed_byte(folder: Path, ranks: int, name: str) -> None:
    seal(folder)
    assert all(changed_file(folder, rank, ranks) == "" for rank in range(ranks))
    content = bytearray((folder / name).read_bytes())
    content[500] ^= 1
    (folder / name).write_bytes(content)
    found = [changed_file(folder, rank, ranks) for rank in range(ranks)]
    assert [line for line in found if line] == [
        f"{folder / name}: its bytes have changed since it was saved (SHA-256 differs)"
    ]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "metadata.json").unlink(), "metadata.json: No such file"),
        (
            lambda folder: (folder / "integrity.json").write_text("{"),
            "integrity.json: unreadable (",
        ),
        (
            lambda folder: (folder / "integrity.json").write_text("[]"),
            "integrity.json: unreadable (",
        ),
        (
            lambda folder: (folder / "integrity.json").write_text(
                '{"algorithm": "x", "files": {}}'
            ),
            "integrity.json: 'x' is not a checksum that is known here",
        ),
    ],
    ids=["missing file", "cut short", "no manifest", "unknown algorithm"],
)
def test_what_can_not_be_compared_is_told(
    folder: Path, spoil: Callable[[Path], Any], said: str
) -> None:
    seal(folder)
    spoil(folder)
    assert changed_file(folder).startswith(f"{folder}/{said}")


def test_a_checkpoint_without_checksums_is_taken(folder: Path) -> None:
    assert changed_file(folder) == ""
    shutil.rmtree(folder / "bilevel")
    assert not (folder / integrity.MANIFEST).exists()
