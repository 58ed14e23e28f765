"""Real checkpoints, damaged, foreign, malicious or on a full disk, through the command."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_scalebio.checkpoint.folder import steps_on_disk
from tests.commands import command, metrics, note, noted, the_only_line
from tests.distributed.harness import run_distributed
from tests.markov import write_two_sources

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NEWEST = "checkpoints/iter_0000004"


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    write_two_sources(folder, train={"train_iters": 5})
    return folder


# ---- damage ----------------------------------------------------------------------------------


class Touch:
    """Pickles into the making of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn(part: Path) -> None:
    """Changes 64 bytes in the middle of a tensor: its pickle, sizes and shapes stay right."""
    metadata = FileSystemReader(part).read_metadata()
    index = max(metadata.storage_data, key=lambda i: metadata.storage_data[i].length)
    info = metadata.storage_data[index]
    with (part / info.relative_path).open("r+b") as stream:
        stream.seek(info.offset + info.length // 2)
        before = stream.read(64)
        stream.seek(-64, os.SEEK_CUR)
        stream.write(bytes(byte ^ 1 for byte in before))


def plant_object(part: Path, taken: Path, name: str = "rng_state") -> None:
    """Puts a pickle in place of an object that the checkpoint holds beside its tensors.

    By somebody who knows of the checksums.
    """
    (part / "integrity.json").unlink()
    metadata = FileSystemReader(part).read_metadata()
    blob = io.BytesIO()
    torch.save([{"torch": Touch(taken)}], blob)
    index = next(i for i in metadata.storage_data if i.fqn.startswith(name))
    info = metadata.storage_data[index]
    data = part / info.relative_path
    info.offset, info.length = data.stat().st_size, len(blob.getvalue())
    with data.open("ab") as stream:
        stream.write(blob.getvalue())
    (part / ".metadata").write_bytes(pickle.dumps(metadata))


def newest_loses(name: str) -> Callable[[Path], None]:
    return lambda run: next((run / NEWEST).rglob(name)).unlink()


PASSED_OVER: dict[str, Callable[[Path], Any]] = {
    "short data": lambda run: shorten(next((run / NEWEST / "bilevel").glob("__0_0.distcp"))),
    "short w": lambda run: shorten(next((run / NEWEST).glob("__0_0.distcp"))),
    "turned w": lambda run: turn(run / NEWEST),
    "turned optimizer": lambda run: turn(run / NEWEST / "bilevel"),
    "no checksums": lambda run: (run / NEWEST / "bilevel" / "integrity.json").write_text("{"),
    "no metadata": newest_loses(".metadata"),
    "no bilevel": lambda run: shutil.rmtree(run / NEWEST / "bilevel"),
}
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "all short": (
        lambda run: [shorten(path) for path in (run / "checkpoints").rglob("__0_0.distcp")],
        "no whole checkpoint (restore one, or start in a new folder)",
    ),
    "code in .metadata": (
        lambda run: (run / NEWEST / ".metadata").write_bytes(pickle.dumps(Touch(run / "taken"))),
        "iter_0000004/.metadata: refers to ",
    ),
    "code in the common state": (
        lambda run: plant_object(run / NEWEST / "bilevel", run / "taken", "common_state"),
        "iter_0000004: could not load: ",
    ),
    "code in w's common state": (
        lambda run: plant_object(run / NEWEST, run / "taken", "common_state"),
        "iter_0000004: could not load: ",
    ),
    "code in an object": (
        lambda run: plant_object(run / NEWEST / "bilevel", run / "taken"),
        "iter_0000004: could not load: ",
    ),
}


def damaged(folder_name: str) -> None:
    folder = Path(folder_name)
    config, base = folder / "x.yaml", folder / "base"
    flags = ["reweight", "--config", config]
    note(folder / "noted", "base", command(*flags, "--output", base, "--keep-last", 3))
    shutil.rmtree(base / "checkpoints" / "iter_0000005")
    refused = {name: happens for name, (happens, _) in REFUSED.items()}
    for name, happens in {**PASSED_OVER, **refused}.items():
        run = folder / name
        shutil.copytree(base, run)
        happens(run)
        note(folder / "noted", name, command(*flags, "--output", run))
    one, two = (f"{name}={folder}/data/{name}" for name in ("s0", "s1"))
    load = ["--load", base / "checkpoints", "--output", folder / "elsewhere"]
    for name, changes in {
        "other order": [*load, "--sources", two, one],
        "other order, same folder": ["--output", base, "--sources", two, one],
        "wider": [*load, "--hidden-size", 64],
        "deeper": [*load, "--num-layers", 3],
        "more tokens": [*load, "--vocab-size", 40],
        "more tokens at the start": [
            "--pretrained-checkpoint",
            base / NEWEST,
            *load[2:],
            "--vocab-size",
            40,
        ],
        "other optimizer": [*load, "--use-distributed-optimizer"],
        "other precision": [*load, "--bf16"],
    }.items():
        note(folder / "noted", name, command(*flags, *changes))
    description = folder / "data" / "s1" / "source.json"
    description.write_text(description.read_text().replace('"s1-', '"new-'))
    note(folder / "noted", "other data", command(*flags, *load))


@pytest.fixture(scope="module")
def outcomes(problem: Path) -> Path:
    run_distributed(damaged, 1, str(problem))
    assert noted(problem / "noted", "base")[0] == 0, noted(problem / "noted", "base")
    return problem


@pytest.mark.parametrize("name", PASSED_OVER)
def test_damaged_newest_checkpoint_is_passed_over_with_a_warning(outcomes: Path, name: str) -> None:
    code, said = noted(outcomes / "noted", name)
    assert code == 0, said
    assert "warning: passed over a damaged checkpoint: " in said and "iter_0000004" in said
    assert "from step 2" in said
    assert (outcomes / name / f"{NEWEST}.damaged").is_dir(), "it is there, and does not count"
    assert metrics(outcomes / name) == metrics(outcomes / "base")


@pytest.mark.parametrize("name", REFUSED)
def test_checkpoints_that_cannot_be_read_are_refused(outcomes: Path, name: str) -> None:
    code, said = noted(outcomes / "noted", name)
    assert code == 2, said
    assert REFUSED[name][1] in the_only_line(said)
    assert not (outcomes / name / "taken").exists(), "code in a checkpoint was run"
    assert len(metrics(outcomes / name)) == 5, "what the folder held is still there"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other order", "was made for sources ['s0', 's1'], not ['s1', 's0']"),
        (
            "other order, same folder",
            "holds a run of other sources: the order was s0, s1 (choose",
        ),
        ("other data", "the data of source 's1' has changed since"),
        ("wider", "iter_0000004: holds shape (2, 32) for decoder.layers."),
        ("deeper", "the model needs (3, "),
        ("more tokens", "was saved with a vocabulary of 32, not of 40 (set model.vocab_size to 32"),
        (
            "more tokens at the start",
            "holds 32 rows of embedding.word_embeddings.weight, the vocabulary has 40 (take",
        ),
        ("other optimizer", "use_distributed_optimizer: True cannot resume a run saved with False"),
        ("other precision", "parallel.bf16: True cannot resume a run saved with False"),
    ],
)
def test_checkpoints_of_other_runs_are_refused(outcomes: Path, name: str, words: str) -> None:
    code, said = noted(outcomes / "noted", name)
    assert code == 2 and words in the_only_line(said), said
    assert not (outcomes / "elsewhere" / "metrics.jsonl").exists()


# ---- a full disk -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, leave: int) -> None:
    (disk / "filler").unlink(missing_ok=True)
    free = shutil.disk_usage(disk).free
    (disk / "filler").write_bytes(bytes(max(0, free - leave)))


def full_disk(folder_name: str, disk_name: str) -> None:
    """Three runs that save to the disk: with room, with little left, with nothing left."""
    folder, disk = Path(folder_name), Path(disk_name)
    parallel = ["--pipeline-model-parallel-size", torch.distributed.get_world_size()]
    flags = ["reweight", "--config", folder / "x.yaml", "--save", disk / "checkpoints", *parallel]
    for name, leave, iters in (("room", None, 2), ("little", 60_000, 4), ("nothing", 0, 4)):
        if torch.distributed.get_rank() == 0 and leave is not None:
            fill(disk, leave)
        torch.distributed.barrier()
        outcome = command(*flags, "--output", folder / "out", "--train-iters", iters)
        # The last one may leave ranks in the middle of a collective: no barrier after it.
        note(folder / "noted", name, outcome)


def joined_full_disk(folder_name: str, disk_name: str) -> None:
    torch.distributed.init_process_group("gloo")
    full_disk(folder_name, disk_name)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_leaves_the_checkpoint_before(
    problem: Path, tmp_path: Path, small_disk: Path, ranks: int
) -> None:
    shutil.copy(problem / "x.yaml", tmp_path / "x.yaml")
    run_distributed(joined_full_disk, ranks, str(tmp_path), str(small_disk))
    assert noted(tmp_path / "noted", "room")[0] == 0
    for name in ("little", "nothing"):
        code, said = noted(tmp_path / "noted", name)
        last = said.strip().splitlines()[-1]
        assert code == 2 and "Traceback" not in said, said
        assert "No space left" in last or "could not save step 4" in last, said
        assert "checkpoints" in last
        for rank in range(1, ranks):
            assert noted(tmp_path / "noted", name, rank) == (2, ""), "other ranks are silent"
    save = small_disk / "checkpoints"
    assert steps_on_disk(save) == [2]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
