"""One run at a time in a folder: real processes that hold it, die, freeze and race for it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_scalebio.errors import EXIT_LOST, UserError
from megatron_scalebio.guard import lock as lock_module
from megatron_scalebio.guard.lock import LOCK_FILE, FolderLock, Holder, held
from megatron_scalebio.guard.process import Process
from tests.commands import ROOT

# Takes the folder, says so, and works on until it is told to end.
HOLDER = """
import sys
from dataclasses import replace
from pathlib import Path
from megatron_scalebio.errors import UserError
from megatron_scalebio.guard import lock as lock_module
from megatron_scalebio.guard.lock import LOCK_FILE, FolderLock
folder, place, patience = sys.argv[1:]
lock = FolderLock(Path(folder) / LOCK_FILE, renew_s=0.1)
if place == "far":
    far = replace(lock.holder.process, host="node9", boot="another boot")
    lock.holder = replace(lock.holder, process=far)
try:
    lock.acquire(float(patience))
except UserError:
    sys.exit(2)
print("held", flush=True)
sys.stdin.read()
lock.release()
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that holds `tmp_path`, near or as if on another node."""
    running = []

    def begin(place: str = "near", patience_s: float = 1.0, **environment: str):
        words = [sys.executable, "-c", HOLDER, str(tmp_path), place, str(patience_s)]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )  # fmt: skip
        running.append(process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def wait_until_held(process: subprocess.Popen[str]) -> None:
    assert process.stdout and process.stdout.readline() == "held\n", process.communicate()


def take(folder: Path, patience_s: float = 1.0) -> float:
    """Seconds until the folder was taken."""
    before = time.monotonic()
    with held(folder, patience_s=patience_s, renew_s=0.1):
        return time.monotonic() - before


@pytest.mark.parametrize("place", ["near", "far"])
def test_a_living_holder_is_refused_in_one_line(start: Start, tmp_path: Path, place: str) -> None:
    holder = start(place, SLURM_JOB_ID="71")
    wait_until_held(holder)
    os.utime(tmp_path / LOCK_FILE, (0, 0))  # times of files tell nothing
    with pytest.raises(UserError) as refusal:
        take(tmp_path)
    host = "node9" if place == "far" else Process.this().host
    words = f"another run writes here (SLURM job 71 on {host}, pid {holder.pid}) (wait until"
    assert words in str(refusal.value)
    holder.communicate("", timeout=60)
    assert not (tmp_path / LOCK_FILE).exists(), "released"
    assert take(tmp_path, patience_s=60) < 30


def test_what_a_killed_holder_left_is_taken_over_at_once(start: Start, tmp_path: Path) -> None:
    holder = start()
    wait_until_held(holder)
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert take(tmp_path, patience_s=60) < 30
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_dead_holder_on_another_node_is_waited_out(start: Start, tmp_path: Path) -> None:
    holder = start("far")
    wait_until_held(holder)
    holder.kill()
    holder.wait()
    tomorrow = time.time() + 86_400
    os.utime(tmp_path / LOCK_FILE, (tomorrow, tomorrow))
    assert 1.0 <= take(tmp_path, patience_s=1.0) < 30


@pytest.mark.parametrize(
    ("job", "restart", "waits"), [("71", 1, False), ("71", 0, True), ("72", 1, True)]
)
def test_only_a_requeued_job_follows_itself_at_once(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    job: str, restart: int, waits: bool,
) -> None:  # fmt: skip
    """Two steps of one job (same number, same restart) are two runs."""
    holder = start("far", SLURM_JOB_ID="71")
    wait_until_held(holder)
    holder.kill()
    holder.wait()
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    assert (take(tmp_path, patience_s=2.0) >= 2.0) == waits


def test_a_number_that_another_process_has_by_now_is_no_holder(tmp_path: Path) -> None:
    ours = Holder.this()
    earlier = replace(ours.process, started=ours.process.started - 1)
    (tmp_path / LOCK_FILE).write_bytes(replace(ours, process=earlier).line(9))
    assert take(tmp_path, patience_s=60) < 30


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 80, Holder.this().line(3)[:100]])
def test_a_lock_that_cannot_be_read_is_waited_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    assert 1.0 <= take(tmp_path, patience_s=1.0) < 30


def test_of_many_newcomers_one_follows_a_dead_holder(start: Start, tmp_path: Path) -> None:
    far = replace(Holder.this().process, host="node9", boot="another boot")
    (tmp_path / LOCK_FILE).write_bytes(replace(Holder.this(), process=far).line(9))
    rivals = [start("far", patience_s=1.0) for _ in range(5)]
    codes = [None] * len(rivals)
    deadline = time.monotonic() + 30
    while codes.count(2) < len(rivals) - 1:
        codes = [rival.poll() for rival in rivals]
        assert time.monotonic() < deadline and codes.count(EXIT_LOST) == 0, codes
        time.sleep(0.05)
    [winner] = [rival for rival, code in zip(rivals, codes, strict=True) if code is None]
    wait_until_held(winner)
    winner.communicate("", timeout=60)
    assert winner.returncode == 0


def test_a_holder_that_was_frozen_ends_when_it_wakes(start: Start, tmp_path: Path) -> None:
    holder = start("far")
    wait_until_held(holder)
    holder.send_signal(signal.SIGSTOP)
    with held(tmp_path, patience_s=1.0, renew_s=0.1):
        holder.send_signal(signal.SIGCONT)
        assert holder.wait(timeout=10) == EXIT_LOST
        _, said = holder.communicate()
        assert "taken over by another run" in said and len(said.splitlines()) == 1
        assert (tmp_path / LOCK_FILE).exists(), "what is another's stays"


def test_errors_release_and_a_folder_inside_needs_no_lock(tmp_path: Path) -> None:
    inner, beside = tmp_path / "run" / "checkpoints", tmp_path / "saves"
    inner.mkdir(parents=True)
    beside.mkdir()
    with contextlib.suppress(ZeroDivisionError), held(tmp_path / "run", inner, beside):
        locks = sorted(path.parent.name for path in tmp_path.rglob(LOCK_FILE))
        assert locks == ["run", "saves"]
        raise ZeroDivisionError
    assert not list(tmp_path.rglob(LOCK_FILE))


def test_a_lock_that_was_tidied_away_comes_back(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / LOCK_FILE, renew_s=0.05)
    lock.acquire()
    lock.path.unlink()
    deadline = time.monotonic() + 10
    while not lock.path.exists():
        assert time.monotonic() < deadline
    lock.release()
    assert not lock.path.exists()


# ---- what a line tells, without processes ------------------------------------------------------


def test_a_lines_length_never_changes_and_it_reads_as_it_was_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    for told, restart in (("3", 3), ("x", 0), ("", 0)):
        monkeypatch.setenv("SLURM_RESTART_COUNT", told)
        ours = Holder.this()
        assert (ours.job, ours.restart) == ("71", restart)
        lines = [ours.line(count) for count in (1, 10**6)]
        assert {len(line) for line in lines} == {1024} and lines[0] != lines[1]
        assert [Holder.read(line) for line in lines] == [ours, ours]
    assert Holder.this().token != Holder.this().token


@pytest.mark.parametrize(
    ("theirs", "ours", "gives_way"),
    [
        (("71", 0), ("71", 1), True), (("71", 1), ("71", 1), False), (("71", 2), ("71", 1), False),
        (("71", 0), ("72", 1), False), (("", 0), ("", 1), False), (("", 0), ("71", 1), False),
    ],
)  # fmt: skip
def test_a_holder_elsewhere_gives_way_to_its_own_jobs_later_start(
    theirs: tuple[str, int], ours: tuple[str, int], gives_way: bool
) -> None:
    this = Holder.this()
    far = replace(this.process, host="node9", boot="another boot")
    holder = replace(this, process=far, job=theirs[0], restart=theirs[1])
    assert holder.gives_way_to(replace(this, job=ours[0], restart=ours[1])) == gives_way
    assert replace(holder, process=this.process).gives_way_to(this), "an earlier run of its own"


def test_a_holder_counts_as_dead_after_a_minute_of_twelve_missed_renewals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(lock_module.time, "sleep", slept.append)
    far = replace(Holder.this().process, host="node9", boot="another boot", pid=12)
    left = replace(Holder.this(), process=far).line(9)
    (tmp_path / LOCK_FILE).write_bytes(left)
    lock = FolderLock(tmp_path / LOCK_FILE)
    assert (lock._renew_s, lock_module.PATIENCE_S) == (5.0, 60.0)
    assert lock._watch(lock_module.PATIENCE_S) == left
    assert slept == [1.0] * 60
    [said] = capsys.readouterr().err.splitlines()
    assert said.endswith("waiting 60 s for a sign of life of node9, pid 12")


@pytest.mark.parametrize("overwritten", [True, False])
def test_of_two_that_take_over_at_once_the_later_one_to_write_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwritten: bool
) -> None:
    slept: list[float] = []
    path = tmp_path / LOCK_FILE
    later = replace(Holder.this(), token="later").line(1)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if overwritten:
            path.write_bytes(later)

    monkeypatch.setattr(lock_module.time, "sleep", sleep)
    path.write_bytes(Holder.this().line(9))  # of an earlier run of this process
    assert FolderLock(path)._take_over(60.0) is not overwritten
    assert slept == [0.5], "time enough for the other one's line to arrive from a server"


def test_a_line_that_comes_to_be_read_starts_the_wait_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    path = tmp_path / LOCK_FILE
    far = replace(Holder.this().process, host="node9", boot="another boot")
    whole = replace(Holder.this(), process=far).line(9)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            path.write_bytes(whole)

    monkeypatch.setattr(lock_module.time, "sleep", sleep)
    path.write_bytes(whole[:40])
    assert FolderLock(path)._watch(8.0) == whole
    assert slept == [1.0] * (3 + 8)
