"""A rank that dies, hangs, freezes or fails: the others end, and one line names it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_scalebio.errors import EXIT_LOST
from megatron_scalebio.guard.board import read_board
from megatron_scalebio.guard.process import Process
from megatron_scalebio.guard.status import Status, behind, spans, stall_line
from tests.commands import ROOT
from tests.ports import free_port

# Ranks that reduce over and over, and one that stops doing so in its fifth step.
RANK = """
import os, pathlib, signal, sys, time
import torch, torch.distributed as dist
from megatron_scalebio.errors import RankLost, UserError
from megatron_scalebio.guard.board import Board
from megatron_scalebio.guard.watchdog import Watchdog
from megatron_scalebio.launcher import end_lost
from megatron_scalebio.progress import PROGRESS
bad, fault = int(sys.argv[1]), sys.argv[2]
RANKS = 3  # `bad`: all of them
dist.init_process_group("gloo")
def hang():
    time.sleep(3600)
def fail():
    raise ValueError("of its own")
def refuse():
    raise UserError("the disk is full")
def misuse():
    dist.all_reduce(torch.ones(1, dtype=torch.complex64), op=dist.ReduceOp.MAX)
faults = {"hang": hang, "fail": fail, "refuse": refuse, "misuse": misuse,
          "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
          "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP)}
try:
    with Watchdog(timeout_s=3.0, before_end=lambda: print("tidied", flush=True), beat_s=0.2,
                  board=Board(pathlib.Path(sys.argv[3]))):
        for step in range(1, 10):
            PROGRESS.step = step
            with PROGRESS.at("data"):
                if step == 5 and bad in (dist.get_rank(), RANKS):
                    time.sleep(0.6)  # so that its place is known
                    faults[fault]()
            with PROGRESS.at("flush"):
                dist.all_reduce(torch.ones(1))
except RankLost:
    end_lost()
except UserError:
    sys.exit(2)
"""
RANKS = 3


def run(bad: int, fault: str, folder: Path) -> tuple[list[subprocess.Popen[str]], list[str], float]:
    port = free_port()
    started = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(bad), fault, str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": str(RANKS),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    said = ["" for _ in ranks]
    try:
        for number, rank in enumerate(ranks):
            if not (fault == "freeze" and number == bad):
                said[number] = rank.communicate(timeout=240)[1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return ranks, said, time.monotonic() - started


def our_line(said: list[str]) -> str:
    lines = [
        line for text in said for line in text.splitlines() if line.startswith("megatron-scalebio")
    ]
    assert len(lines) == 1, said
    return lines[0]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("bad", "fault", "words"),
    [
        (
            1,
            "hang",
            "is behind: nothing has moved for 3 s in step 5, phase data; ranks 0, 2 ",
        ),
        (
            0,
            "hang",
            "is behind: nothing has moved for 3 s in step 5, phase data; ranks 1-2 ",
        ),
        (1, "freeze", "gives no sign of life for "),
        (1, "die", "died, last heard of in step 5, phase data; ranks 0, 2 waiting for it in step"),
        (0, "die", "is gone with its store, last heard of in step"),
        (1, "fail", "ended with ValueError: of its own, last heard of in step 5, phase data"),
        (2, "refuse", "ended with UserError: the disk is full, last heard of in step 5, phase"),
    ],
)
def test_the_rank_is_named_and_all_end(bad: int, fault: str, words: str, tmp_path: Path) -> None:
    ranks, said, _ = run(bad, fault, tmp_path)
    line = our_line(said)
    board = read_board(tmp_path)
    assert f"error: {board['verdict']}" in line
    assert [rank["rank"] for rank in board["ranks"]] == [0, 1, 2]
    if bad != 0:
        assert board["ranks"][0]["where"].startswith("step ")
    assert f"rank {bad} ({Process.this().host}, pid {ranks[bad].pid}) {words}" in line
    own = {"hang": EXIT_LOST, "die": -signal.SIGKILL, "freeze": -signal.SIGKILL, "fail": 1}
    codes = [rank.returncode for rank in ranks]
    assert codes == [own.get(fault, 2) if n == bad else EXIT_LOST for n in range(RANKS)], said
    if fault == "hang":
        assert "(all_reduce)" in line, "the collective that they wait in"
    assert ("ValueError" in said[bad]) == (fault == "fail"), "a bug has its traceback"


@pytest.mark.distributed
def test_an_error_of_all_ranks_in_a_collective_is_told_as_it_is(tmp_path: Path) -> None:
    """Not as a stall: ranks look more often while they ask whose fault it is."""
    ranks, said, _ = run(RANKS, "misuse", tmp_path)
    assert [rank.returncode for rank in ranks] == [1] * RANKS, said
    assert all("complex tensors" in text for text in said), said
    assert "nothing has moved" not in "".join(said)


# ---- who is behind, without processes ---------------------------------------------------------


def waiting(rank: int, step: int = 7, seconds: float = 600.0) -> Status:
    near = Process("node1", "", 100 + rank, 0)
    return Status(
        rank, near, step=step, phase="flush", place="all_reduce", still_s=600, waiting_s=seconds
    )


def test_behind_is_who_waits_for_nobody_else_who_is_in_an_earlier_step() -> None:
    ranks = [waiting(rank) for rank in range(6)]
    assert behind([*ranks[:3], waiting(3, seconds=0), *ranks[4:]]) == [waiting(3, seconds=0)]
    assert behind([*ranks[:3], waiting(3, step=6), *ranks[4:]]) == [waiting(3, step=6)]
    assert behind(ranks) == ranks
    assert "no rank is behind the others: 6 in step 7, phase flush (all_reduce)" in stall_line(
        ranks
    )
    late = replace(waiting(3, seconds=0), phase="data", place="example (data/sources.py:88)")
    assert stall_line([*ranks[:3], late, *ranks[4:]]) == (
        "rank 3 (node1, pid 103) is behind: nothing has moved for 600 s in step 7, phase data "
        "(example (data/sources.py:88)); ranks 0-2, 4-5 waiting for it in step 7, phase flush "
        "(all_reduce)"
    )


def test_ranks_are_listed_briefly() -> None:
    assert spans([9, 0, 2, 3, 4, 7, 8]) == "0, 2-4, 7-9"
