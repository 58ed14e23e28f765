"""Which checkpoint a run continues from, without models: its own, then another's, then a start."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_scalebio.checkpoint import folder as folders
from megatron_scalebio.checkpoint import saver
from megatron_scalebio.commands.early import refuse_missing_start, refuse_wrong_paths
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.engine import start
from megatron_scalebio.errors import UserError

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


@pytest.mark.parametrize(
    ("saved", "same"),
    [
        ([["v", "1", 0.75], ["w", "2", 0.25]], True),
        ([["v", "1", 0.5], ["w", "2", 0.5]], False),  # other weights
        ([["v", "1", 0.75], ["x", "2", 0.25]], False),
        ([["v", "1", 0.75], ["w", "3", 0.25]], False),  # other data
        ([["v", "1", 1.0]], False),
    ],
)
def test_a_run_goes_on_towards_its_own_goal_alone(saved: list, same: bool) -> None:
    ours = {"sources": [["a", "0"]], "validation": [["v", "1", 0.75], ["w", "2", 0.25]]}
    state: Any = SimpleNamespace(stage="reweight", common_state=lambda: ours)
    with nullcontext() if same else pytest.raises(UserError, match="other validation sets"):
        saver._check_sources(state, {"run": {**ours, "validation": saved}}, OWN)


def test_what_is_damaged_is_set_aside_in_the_runs_own_folder_alone(
    folder_of: Callable[..., list[Any]],
) -> None:
    done = folder_of(20, ["iter 30: cut short"], ["optimizer.lr 1 -> 2", "lisa.x 1 -> 2"])
    warnings = [
        "passed over a damaged checkpoint: iter 30: cut short",
        "continues with other settings: optimizer.lr 1 -> 2, lisa.x 1 -> 2",
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


def test_a_run_does_not_go_on_from_an_ordinary_megatron_checkpoint(
    folder_of: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder_of(None, ["iter 30: lacks metadata.json"])
    monkeypatch.setattr(folders, "is_plain", lambda folder: folder == OWN)
    words = r"^checkpoint.load: own: is an ordinary Megatron checkpoint, .* --pretrained-checkpoint"
    with pytest.raises(UserError, match=words):
        saver.load_latest(None, OWN, required=True)
    for folder, required in ((OWN, False), (OTHER, True)):
        with pytest.raises(UserError, match="no whole checkpoint"):
            saver.load_latest(None, folder, required=required)


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
        step=7,
        config=SimpleNamespace(
            checkpoint=SimpleNamespace(load=load and str(load)),
            train=SimpleNamespace(train_iters=7),
        ),
    )
    warnings = start.resume_or_start(state, Path("out"), OWN)
    assert asked == done
    assert warnings == [f"warning of {name}" for name in done if name != "pretrained"]


@pytest.mark.parametrize("save", [None, "apart"])
def test_a_run_that_goes_on_needs_no_longer_what_it_began_from(
    tmp_path: Path, save: str | None
) -> None:
    own = tmp_path / save if save else tmp_path / "run" / "checkpoints"
    gone = str(tmp_path / "gone")
    config = load_config(None, {
        "train": {"output": str(tmp_path / "run")}, "model": {"pretrained_checkpoint": gone},
        "checkpoint": {"save": save and str(own), "load": gone},
    })  # fmt: skip
    for refuse in (refuse_wrong_paths, refuse_missing_start):
        with pytest.raises(UserError, match="gone"):
            refuse(config)
    folders.iteration_folder(own, 4).mkdir(parents=True)
    refuse_wrong_paths(config)
    refuse_missing_start(config)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Starts a run in tmp_path/run; gives what was imported, if anything, and what it starts from.

    An import is a folder that holds the bytes of the weights.
    """
    imported: list[Path] = []
    loaded: list[Path] = []

    def import_checkpoint(hf: Path, save: Path) -> None:
        imported.append(hf)
        save.mkdir(parents=True)
        (save / "weights").write_bytes((hf / "model.safetensors").read_bytes())

    monkeypatch.setattr(start.runtime, "on_main", lambda work: work())
    monkeypatch.setattr(start, "import_checkpoint", import_checkpoint)
    monkeypatch.setattr(start.saver, "load_pretrained", lambda w, path, size: loaded.append(path))

    def begin(hf: Path | None, pretrained: Path | None = None) -> tuple[list[Path], Path | None]:
        imported.clear()
        loaded.clear()
        model = SimpleNamespace(
            pretrained_checkpoint=pretrained and str(pretrained), hf=hf and str(hf)
        )
        state: Any = SimpleNamespace(
            config=SimpleNamespace(model=model),
            training=SimpleNamespace(w=[]),
            data=SimpleNamespace(vocab_size=32),
        )
        start.load_start(state, tmp_path / "run")
        return list(imported), loaded[0] if loaded else None

    return begin


def write_hf(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_given_weights_go_before_a_hugging_face_models(
    starts: Callable[..., Any], tmp_path: Path
) -> None:
    assert starts(None) == ([], None)
    assert starts(write_hf(tmp_path / "org"), tmp_path / "given") == ([], tmp_path / "given")


def test_a_hugging_face_model_is_imported_once(starts: Callable[..., Any], tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "org")
    imported, first = starts(hf)
    assert imported == [hf] and first.parent == tmp_path / "run"
    (hf / "README.md").write_text("no part of the model")
    assert starts(hf) == ([], first)
    assert starts(write_hf(tmp_path / "copy")) == ([], first)


@pytest.mark.parametrize("change", ["weights", "same size", "config", "other folder"])
def test_a_changed_hugging_face_model_is_imported_anew(
    starts: Callable[..., Any], tmp_path: Path, change: str
) -> None:
    hf = write_hf(tmp_path / "org")
    _, first = starts(hf)
    if change == "config":
        (hf / "config.json").write_text('{"rope_theta": 1}')
    else:
        hf = write_hf(tmp_path / "other" if change == "other folder" else hf,
                      b"longer weights" if change == "weights" else b"WEIGHTS")  # fmt: skip
    imported, second = starts(hf)
    assert imported == [hf] and second != first
    assert (second / "weights").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert (first / "weights").read_bytes() == b"weights", "what reads it is not disturbed"


def test_parts_of_a_run_start_from_the_same_model(
    starts: Callable[..., Any], tmp_path: Path
) -> None:
    hf = write_hf(tmp_path / "org")
    starts(hf)
    (tmp_path / "run" / "reference").mkdir()
    metrics = tmp_path / "run" / "reference" / "metrics.jsonl"
    metrics.touch()
    starts(write_hf(hf, b"changed before a step"))
    metrics.write_text("{}")
    assert not starts(hf)[0]
    write_hf(hf, b"changed after a step")
    assert starts(hf, tmp_path / "given") == ([], tmp_path / "given")
    with pytest.raises(UserError, match=r"^model.hf: .*/org: is not the model that .*/run was "):
        starts(hf)


def test_only_later_checkpoints_are_set_aside(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        folders.iteration_folder(tmp_path, step).mkdir()
    folders.set_aside(tmp_path, after=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "iter_0000010", "iter_0000020", "iter_0000030.damaged", "iter_0000040.damaged",
    ]  # fmt: skip
    assert folders.steps_on_disk(tmp_path) == [10, 20]


def test_a_checkpoint_is_found_by_its_tracker_or_is_the_folder_itself(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a Megatron checkpoint"):
        folders.find_checkpoint(tmp_path)
    (tmp_path / "metadata.json").touch()
    assert folders.find_checkpoint(tmp_path) == tmp_path
    for told, name in (("12\n", "iter_0000012"), ("release", "release")):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(told)
        assert folders.find_checkpoint(tmp_path) == tmp_path / name
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("-3")
    with pytest.raises(UserError, match="'-3' is not a step"):
        folders.find_checkpoint(tmp_path)


def test_random_states_of_another_kind_of_device_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's generator has 16 bytes, a CPU's 5,056."""
    saved: dict[str, Any] = {
        "torch": torch.Generator().manual_seed(7).get_state(),
        "device": torch.zeros(16, dtype=torch.uint8), "tracker": {"x": torch.zeros(16)},
    }  # fmt: skip
    here = torch.Generator().manual_seed(3).get_state()
    taken: dict[str, Any] = {}
    monkeypatch.setattr(saver, "random_state", lambda: None)
    monkeypatch.setattr(saver.dist_checkpointing, "load", lambda wanted, source: {"rng": saved})
    monkeypatch.setattr(torch, "set_rng_state", partial(taken.__setitem__, "torch"))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: here)
    monkeypatch.setattr(torch.cuda, "set_rng_state", partial(taken.__setitem__, "device"))
    tracker = SimpleNamespace(set_states=partial(taken.__setitem__, "tracker"))
    monkeypatch.setattr(saver, "get_cuda_rng_tracker", lambda: tracker)
    saver._load_random_state(Path("x"))
    assert taken == {"torch": saved["torch"]}
    saved["device"] = here.clone()
    saver._load_random_state(Path("x"))
    assert taken == saved
