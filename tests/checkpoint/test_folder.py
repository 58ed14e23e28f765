"""The checkpoint folder without a model: commit, keep-last, and which damage is seen."""

from __future__ import annotations

import errno
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_scalebio.checkpoint import folder as folders
from megatron_scalebio.errors import UserError, disk_errors_named


def write_part(folder: Path, size: int = 100) -> None:
    """What a distributed checkpoint folder holds, with one file of data."""
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    torch.save({"a": 1}, folder / "common.pt")
    (folder / "data.distcp").write_bytes(b"x" * size)
    info = _StorageInfo(relative_path="data.distcp", offset=20, length=size - 20)
    content = Metadata(state_dict_metadata={}, storage_data={MetadataIndex("a"): info})
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def write_checkpoint(save: Path, step: int, name: Any = folders.iteration_folder) -> Path:
    folder: Path = name(save, step)
    write_part(folder)
    write_part(folder / folders.BILEVEL)
    return folder


def test_newest_is_the_last_one_committed(tmp_path: Path) -> None:
    assert folders.newest_whole(tmp_path / "nowhere") == (None, [])
    for step in (5, 10, 20):
        write_checkpoint(tmp_path, step)
    write_checkpoint(tmp_path, 30, folders.temporary_folder)
    (tmp_path / "iter_junk").mkdir()
    assert folders.newest_whole(tmp_path) == (20, []), "an incomplete one does not count"


@pytest.mark.parametrize(("keep", "left"), [(1, [40]), (2, [30, 40]), (9, [10, 20, 30, 40])])
def test_commit_keeps_the_last_ones(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (10, 20, 30, 40):
        whole = write_checkpoint(tmp_path, step, folders.temporary_folder)
        folders.commit(whole, tmp_path, step, keep)
        assert (tmp_path / folders.TRACKER).read_text() == str(step)
    assert folders.steps_on_disk(tmp_path) == left
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.incomplete"))


def test_commit_never_drops_what_it_has_just_written(tmp_path: Path) -> None:
    """After falling back, later (damaged) steps lie in the folder too."""
    write_checkpoint(tmp_path, 90)
    whole = write_checkpoint(tmp_path, 20, folders.temporary_folder)
    folders.commit(whole, tmp_path, 20, keep_last=1)
    assert 20 in folders.steps_on_disk(tmp_path)


def test_a_save_clears_away_those_that_were_cut_off(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1)
    write_checkpoint(tmp_path, 2, folders.temporary_folder)
    write_checkpoint(tmp_path, 3, folders.temporary_folder)
    begun = folders.begin(tmp_path, 3)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "iter_0000001", begun]
    assert not list(begun.iterdir()) and begun != folders.temporary_folder(tmp_path, 3)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_used_up_quota_are_named(tmp_path: Path, number: int) -> None:
    with pytest.raises(UserError) as refusal, disk_errors_named(tmp_path / "here"):
        raise OSError(number, os.strerror(number))
    assert f"here: can't write: {os.strerror(number)} (choose a folder" in str(refusal.value)


DAMAGE = {
    "no metadata.json": lambda part: (part / "metadata.json").unlink(),
    "no common.pt": lambda part: (part / "common.pt").unlink(),
    "no .metadata": lambda part: (part / ".metadata").unlink(),
    "short common.pt": lambda part: shorten(part / "common.pt", 200),
    "empty common.pt": lambda part: shorten(part / "common.pt", 0),
    "flipped common.pt": lambda part: flip(part / "common.pt"),
    "short .metadata": lambda part: shorten(part / ".metadata", 60),
    "empty .metadata": lambda part: shorten(part / ".metadata", 0),
    "foreign .metadata": lambda part: (part / ".metadata").write_bytes(pickle.dumps([1, 2])),
    "no data": lambda part: (part / "data.distcp").unlink(),
    "short data": lambda part: shorten(part / "data.distcp", 99),
}


def shorten(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"\x80\x02") + 3] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("inside", ["", folders.BILEVEL], ids=["w", "bilevel"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_passed_over(tmp_path: Path, name: str, inside: str) -> None:
    write_checkpoint(tmp_path, 1)
    DAMAGE[name](write_checkpoint(tmp_path, 2) / inside)
    step, problems = folders.newest_whole(tmp_path)
    assert step == 1 and len(problems) == 1, problems
    assert str(tmp_path / "iter_0000002" / inside) in problems[0]
    assert name.split()[-1].removeprefix("data") in problems[0] and "\n" not in problems[0]


def test_no_damage_of_metadata_ends_in_a_traceback(tmp_path: Path) -> None:
    write_part(tmp_path / "part")
    path = tmp_path / "part" / ".metadata"
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path.write_bytes(content[: generator.randint(1, len(content) + 50)])
        try:
            problem = folders.damage(tmp_path / "part")
        except UserError as error:
            problem = str(error)
        assert isinstance(problem, str)


def forget(save: Path) -> None:
    (save / folders.TRACKER).unlink()


def release(save: Path) -> None:
    (save / "iter_0000007").rename(save / "release")
    (save / folders.TRACKER).write_text("release")


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        (lambda save: None, True),
        (release, True),
        (lambda save: shorten(save / "iter_0000007" / "data.distcp", 99), False),
        (lambda save: write_part(save / "iter_0000007" / folders.BILEVEL), False),
        (lambda save: (save / "iter_0000007" / folders.BILEVEL).mkdir(), False),
        (forget, False),
    ],
    ids=["Megatron-LM's", "converted", "cut short", "a run's", "a run's, damaged", "no tracker"],
)
def test_a_checkpoint_of_megatron_lm_is_known_from_a_damaged_one(
    tmp_path: Path, change: Any, plain: bool
) -> None:
    write_part(tmp_path / "iter_0000007")
    (tmp_path / folders.TRACKER).write_text("7")
    change(tmp_path)
    assert folders.is_plain(tmp_path) == plain


class Payload:
    """Pickles into a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "payload",
    [
        Payload(Path.touch, Path("taken")),
        Payload(eval, "open('taken', 'w')"),
        Payload(torch.serialization.save, 1, "taken"),
        Payload(torch.distributed.checkpoint.filesystem.FileSystemWriter, "taken"),
    ],
    ids=["method", "eval", "torch.save", "class of torch's checkpoints"],
)
def test_metadata_cannot_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payload: Payload
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_checkpoint(tmp_path, 1)
    (folder / ".metadata").write_bytes(pickle.dumps({"a": payload}))
    with pytest.raises(UserError, match="which a checkpoint may not run") as refusal:
        folders.newest_whole(tmp_path)
    assert str(folder / ".metadata") in str(refusal.value)
    assert not (tmp_path / "taken").exists()
