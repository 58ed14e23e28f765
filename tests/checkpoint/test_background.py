"""`--async-save`: the same run and the same checkpoints, committed only when they are whole."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

from megatron_scalebio.checkpoint.folder import newest_whole, steps_on_disk
from tests.commands import command, metrics, note, noted, the_only_line
from tests.distributed.harness import run_distributed
from tests.markov import write_two_sources

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SLOW_S = 1.5
SHARDED = ["--bf16", "--use-distributed-optimizer", "--lisa-layers", 1, "--lisa-interval", 3]


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("background")
    write_two_sources(
        folder, train={"train_iters": 6}, checkpoint={"save_interval": 2, "keep_last": 9}
    )
    run_distributed(two_ranks, 2, str(folder))
    run_distributed(slow_disk, 1, str(folder))
    return folder


def run(folder: Path, name: str, *flags: object) -> None:
    words = ["--config", folder / "x.yaml", "--output", folder / name, *flags]
    note(folder / "noted", name, command("reweight", *words))


def two_ranks(folder_name: str) -> None:
    """The same run saved at once and in the background, and one that continues from the latter."""
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    run(folder, "at once", *SHARDED)
    run(folder, "behind", *SHARDED, "--async-save")
    (folder / "from").mkdir(exist_ok=True)
    if dist.get_rank() == 0:
        step = "iter_0000004"
        (folder / "from" / step).symlink_to(folder / "behind" / "checkpoints" / step)
    dist.barrier()
    run(folder, "resumed", *SHARDED, "--async-save", "--load", folder / "from")
    words = ["--config", folder / "x.yaml", "--output", folder / "tuned", "--eval-interval", 2]
    note(folder / "noted", "tuned", command("train", *words, "--async-save"))


def slow_disk(folder_name: str) -> None:
    """Each file takes its time; what is committed when is noted. Then a signal, then a dead writer.

    The writers are forked, so that they have the slow function, too.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megatron_scalebio.checkpoint import folder as folders

    folder = Path(folder_name)
    write, commit = FileSystemWriterAsync.write_preloaded_data, folders.commit
    commits: list[tuple[int, int]] = []

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SLOW_S)
        return write(*args, **kwargs)

    def noted_commit(temporary: Path, save: Path, step: int, keep_last: int) -> None:
        assert newest_whole(temporary.parent)[0] != step, "it was no checkpoint before"
        commit(temporary, save, step, keep_last)
        commits.append((step, len(metrics(save.parent))))

    FileSystemWriterAsync.write_preloaded_data = staticmethod(slow)
    folders.commit = noted_commit
    run(folder, "slow", "--async-save", "--save-interval", 20, "--train-iters", 60)
    (folder / "commits.json").write_text(json.dumps(commits))

    def when_in_flight(name: str, then: Any) -> None:
        save = folder / name / "checkpoints"
        deadline = time.monotonic() + 120
        while not any((path / "bilevel").exists() for path in save.glob("iter_0000004.*")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        then()

    def kill_the_writer() -> None:
        import multiprocessing

        while True:
            for child in multiprocessing.active_children():
                if child.name.startswith("ForkProcess-"):
                    child.kill()
                    return

    for name, then in (
        ("signalled", lambda: os.kill(os.getpid(), signal.SIGTERM)),
        ("writer killed", kill_the_writer),
    ):
        threading.Thread(target=when_in_flight, args=(name, then)).start()
        run(folder, name, "--async-save", "--save-interval", 4, "--train-iters", 60)


def files(run: Path) -> dict[str, bytes]:
    """What the checkpoints hold, without the order of pickled metadata."""
    save = run / "checkpoints"
    return {
        str(path.relative_to(save)): path.read_bytes() for path in save.rglob("*.distcp")
    }  # fmt: skip


def test_the_run_and_its_checkpoints_are_those_saved_at_once(problem: Path) -> None:
    for name in ("at once", "behind"):
        assert noted(problem / "noted", name)[0] == 0, noted(problem / "noted", name)
    assert metrics(problem / "behind") == metrics(problem / "at once")
    assert steps_on_disk(problem / "behind" / "checkpoints") == [2, 4, 6]
    assert files(problem / "behind") == files(problem / "at once")
    for save in (problem / name / "checkpoints" for name in ("behind", "at once")):
        for part in (save / "iter_0000004", save / "iter_0000004" / "bilevel"):
            told = json.loads((part / "integrity.json").read_text())
            held = {path.name for path in part.iterdir() if path.is_file()} - {"integrity.json"}
            assert set(told["files"]) == held and len(held) >= 3
            verify_integrity_manifest(str(part))  # Megatron's own
    for name in ("weights.json", "blend.txt"):
        assert (problem / "behind" / name).read_text() == (problem / "at once" / name).read_text()


def test_resumed_equals_never_stopping(problem: Path) -> None:
    code, said = noted(problem / "noted", "resumed")
    assert code == 0 and "from step 4" in said, said
    assert metrics(problem / "resumed") == metrics(problem / "behind")[4:]


def test_train_saves_its_last_and_its_best(problem: Path) -> None:
    code, said = noted(problem / "noted", "tuned")
    assert code == 0, said
    assert steps_on_disk(problem / "tuned" / "checkpoints") == [2, 4, 6]
    assert len(steps_on_disk(problem / "tuned" / "best")) == 1
    assert not list((problem / "tuned").rglob("*.incomplete"))


def test_steps_go_on_and_a_checkpoint_counts_when_it_is_whole(problem: Path) -> None:
    commits = json.loads((problem / "commits.json").read_text())
    assert [step for step, _ in commits] == [20, 40, 60]
    assert commits[0][1] > 20, "steps were made meanwhile"
    assert commits[-1][1] == 60 and noted(problem / "noted", "slow")[0] == 0


def test_a_signal_waits_for_the_checkpoint_in_flight(problem: Path) -> None:
    code, said = noted(problem / "noted", "signalled")
    assert code == 3, said
    reached = len(metrics(problem / "signalled"))
    assert steps_on_disk(problem / "signalled" / "checkpoints")[-1] == reached


def test_a_writer_that_dies_ends_the_run_and_leaves_no_checkpoint(problem: Path) -> None:
    code, said = noted(problem / "noted", "writer killed")
    assert code == 2, said
    last = the_only_line(said.strip().splitlines()[-1])
    assert "checkpoints: could not save step 4: " in last and "no step is saved yet" in last
    save = problem / "writer killed" / "checkpoints"
    assert not list(save.glob("iter_*")), "neither whole nor half"
