"""Which checkpoint a run goes on from, without models: its own, then another's, then a start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_scalebio.checkpoint import folder as folders
from megatron_scalebio.checkpoint import saver
from megatron_scalebio.errors import UserError
from megatron_scalebio.train import start

OWN, OTHER = Path("own"), Path("other")


@pytest.fixture
def folder_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Makes `load_latest` find a step and damage; what it then loads and sets aside is noted."""
    monkeypatch.setattr(saver.runtime, "on_main", lambda work: work())
    monkeypatch.setattr(saver, "_changed_file", lambda folder: "")

    def holds(step: int | None, problems: list[str], changed: list[str] | None = None) -> list[Any]:
        done: list[Any] = []

        def load(state: Any, source: Path) -> list[str]:
            done.append(("load", source))
            return changed or []

        monkeypatch.setattr(saver.folders, "newest_whole", lambda folder, before: (step, problems))
        monkeypatch.setattr(saver, "_load", load)
        monkeypatch.setattr(
            saver.folders, "set_aside", lambda *words: done.append(("aside", *words))
        )
        return done

    return holds


def test_what_is_damaged_is_set_aside_in_the_runs_own_folder_alone(
    folder_of: Callable[..., list[Any]],
) -> None:
    done = folder_of(20, ["iter 30: cut short"], ["optimizer.lr 1 -> 2", "lisa.x 1 -> 2"])
    warnings = [
        "passed over a damaged checkpoint: iter 30: cut short",
        "goes on with other settings: optimizer.lr 1 -> 2, lisa.x 1 -> 2",
    ]
    loaded = ("load", OWN / "iter_0000020")
    assert saver.load_latest(None, OWN) == (True, warnings)
    assert done == [loaded, ("aside", OWN, 20)]
    done.clear()
    assert saver.load_latest(None, OWN, required=True) == (True, warnings)
    assert done == [loaded]


def test_nothing_is_made_of_no_checkpoint(folder_of: Callable[..., list[Any]]) -> None:
    done = folder_of(None, [])
    assert saver.load_latest(None, OWN) == (False, [])
    with pytest.raises(UserError, match=r"^checkpoint.load: own: no checkpoint here"):
        saver.load_latest(None, OWN, required=True)
    folder_of(None, ["iter 30: cut short"])
    with pytest.raises(UserError, match=r"^iter 30: cut short: no whole checkpoint"):
        saver.load_latest(None, OWN)
    assert not done


@pytest.mark.parametrize(
    ("own", "load", "done"),
    [
        (True, OTHER, ["own"]),
        (False, OTHER, ["own", "other"]),
        (False, None, ["own", "pretrained"]),
    ],
)
def test_its_own_comes_first_and_pretrained_weights_last(
    monkeypatch: pytest.MonkeyPatch, own: bool, load: Path | None, done: list[str]
) -> None:
    asked: list[str] = []

    def load_latest(state: Any, folder: Path, required: bool = False) -> tuple[bool, list[str]]:
        assert required == (folder == OTHER)
        asked.append(str(folder))
        return required or own, [f"warning of {folder}"]

    monkeypatch.setattr(start.saver, "load_latest", load_latest)
    monkeypatch.setattr(start, "load_start", lambda state, folder: asked.append("pretrained"))
    state: Any = SimpleNamespace(
        config=SimpleNamespace(checkpoint=SimpleNamespace(load=load and str(load)))
    )
    warnings = start.resume_or_start(state, Path("out"), OWN)
    assert asked == done
    assert warnings == [f"warning of {name}" for name in done if name != "pretrained"]


@pytest.mark.parametrize(
    ("pretrained", "hf", "there", "want", "imports"),
    [
        (None, None, False, None, False),
        ("given", "org", False, "given", False),
        (None, "org", False, "hf_import", True),
        (None, "org", True, "hf_import", False),
    ],
)
def test_given_weights_go_before_a_hugging_face_models_which_is_imported_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    pretrained: str | None, hf: str | None, there: bool, want: str | None, imports: bool,
) -> None:  # fmt: skip
    imported: list[Any] = []
    monkeypatch.setattr(start.runtime, "on_main", lambda work: work())
    monkeypatch.setattr(start, "import_checkpoint", lambda *words: imported.append(words))
    if there:
        (tmp_path / "hf_import").mkdir()
    model = SimpleNamespace(
        pretrained_checkpoint=pretrained and str(tmp_path / pretrained), hf=hf
    )  # fmt: skip
    state: Any = SimpleNamespace(config=SimpleNamespace(model=model))
    assert start.pretrained_checkpoint(state, tmp_path) == (want and tmp_path / want)
    assert imported == ([(Path("org"), tmp_path / "hf_import")] if imports else [])


def test_only_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        folders.iteration_folder(tmp_path, step).mkdir()
    folders.set_aside(tmp_path, after=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000010", "iter_0000020", "iter_0000030.damaged", "iter_0000040.damaged",
    ]  # fmt: skip
    assert folders.steps_on_disk(tmp_path) == [10, 20]


def test_a_checkpoint_is_found_by_its_tracker_or_is_the_folder_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no Megatron checkpoint"):
        folders.find_checkpoint(tmp_path)
    (tmp_path / "metadata.json").touch()
    assert folders.find_checkpoint(tmp_path) == tmp_path
    for told, name in (("12\n", "iter_0000012"), ("release", "release")):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(told)
        assert folders.find_checkpoint(tmp_path) == tmp_path / name
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("-3")
    with pytest.raises(UserError, match="'-3' is no step"):
        folders.find_checkpoint(tmp_path)
