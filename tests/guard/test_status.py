"""What a rank tells of itself, and when that is too long a wait. No processes, no clocks."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_scalebio.errors import UserError
from megatron_scalebio.guard import board, watchdog
from megatron_scalebio.guard.board import Board, read_board
from megatron_scalebio.guard.process import Process
from megatron_scalebio.guard.status import (
    ENDED,
    FAILED,
    STEP_PHASES,
    Place,
    Status,
    Stillness,
    gone_line,
    stall_line,
    stalled,
)
from megatron_scalebio.guard.watchdog import Watchdog
from megatron_scalebio.progress import PROGRESS

REDUCE, GATHER, OUTSIDE = Place("all_reduce", "x"), Place("all_gather", "x"), Place("", "x")


def rank(number: int = 0, **values: Any) -> Status:
    return Status(
        number, Process("node1", "", 100 + number, 0),
        **{"step": 7, "phase": "flush", "place": "all_reduce", **values},
    )  # fmt: skip


def test_standing_still_and_waiting_are_summed_from_look_to_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PROGRESS, "marks", 5)
    seen, times = Stillness(), []
    for place, moves in (
        (REDUCE, 0), (REDUCE, 0), (REDUCE, 0), (GATHER, 0), (GATHER, 0), (OUTSIDE, 0), (OUTSIDE, 0),
        (REDUCE, 0), (REDUCE, 0), (REDUCE, 1), (REDUCE, 0),
    ):  # fmt: skip
        PROGRESS.marks += moves
        seen.look(place, 2.0)
        times.append((seen.still_s, seen.waiting_s))
    assert times == [
        (0, 0), (2, 2), (4, 4), (6, 0), (8, 2), (10, 0), (12, 0), (14, 0), (16, 2), (0, 0), (2, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "too_long"),
    [
        (rank(still_s=60, waiting_s=60), True),
        (rank(still_s=59, waiting_s=59), False),
        (rank(still_s=60, waiting_s=0), True),  # in a step, outside any collective
        (rank(still_s=60, waiting_s=0, phase="start"), False),  # an import, a build
        (rank(still_s=60, waiting_s=0, phase="save"), False),
        (rank(still_s=60, waiting_s=59, phase="save"), False),
        (rank(still_s=60, waiting_s=60, phase="save"), True),
        (rank(still_s=60, waiting_s=60, state=ENDED), False),
        (rank(still_s=60, waiting_s=60, state=FAILED), False),
    ],
)
def test_a_stall_is_a_rank_that_waits_or_stands_still_in_a_step(
    status: Status, too_long: bool
) -> None:
    assert stalled([rank(1), status], 60.0) == too_long
    assert not stalled([rank(1)], 60.0)


def test_what_ranks_tell_is_written_six_times_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, written = [100.0], Board(tmp_path)
    monkeypatch.setattr(board.time, "monotonic", lambda: now[0])
    for passed, step, told in ((0.0, 1, 1), (9.9, 2, 1), (10.1, 3, 3), (19.9, 4, 3), (20.2, 5, 5)):
        now[0] = 1000.0 + passed
        written.tell([rank(step=step)])
        assert read_board(tmp_path)["ranks"][0]["step"] == told


def test_phases_of_a_step_are_those_of_the_loop() -> None:
    assert STEP_PHASES == ("data", "period", "flush", "update")


def test_lines_say_who_where_and_who_waits() -> None:
    ended, late = rank(1, state=ENDED), rank(4, step=6, phase="data", place="", still_s=12)
    ranks = [rank(0, waiting_s=3), ended, rank(2, waiting_s=3), rank(3, waiting_s=3), late]
    assert stall_line(ranks) == (
        "rank 4 (node1, pid 104) is behind: nothing has moved for 12 s in step 6, phase data; "
        "ranks 0, 2-3 waiting for it in step 7, phase flush (all_reduce)"
    )
    many = [replace(late, rank=n) for n in range(4, 9)] + [rank(0, waiting_s=3)]
    assert stall_line(many) == (
        "rank 4 (node1, pid 104), rank 5 (node1, pid 104), rank 6 (node1, pid 104), … are behind: "
        "nothing has moved for 12 s in step 6, phase data; rank 0 waiting for it in step 7, phase "
        "flush (all_reduce)"
    )
    alike = [rank(n, waiting_s=3, still_s=12) for n in range(2)]
    alike.append(rank(2, waiting_s=3, place="all_gather"))
    assert stall_line(alike) == (
        "nothing has moved for 12 s and no rank is behind the others: 2 in step 7, phase flush "
        "(all_reduce); 1 in step 7, phase flush (all_gather)"
    )
    gone = rank(2, step=0, phase="start", place="")
    assert gone_line(gone, "died", [gone, ended]) == (
        "rank 2 (node1, pid 102) died, last heard of in phase start; no other rank waits for it"
    )


def test_a_status_reads_as_it_was_written() -> None:
    told = rank(3, beat=9, state=FAILED, marks=17, still_s=1.5, waiting_s=0.5, error="it was full")
    assert Status.decode(told.encode()) == told
    assert Status.decode(told.encode().encode()) == told


# ---- who judges what, and when -----------------------------------------------------------------


class Judge(Watchdog):
    """Notes its verdicts; a beat is two seconds."""

    def __init__(self, timeout_s: float, pending: BaseException | None = None) -> None:
        self._timeout_s, self._beat_s, self._rank, self._size = timeout_s, 2.0, 0, 3
        self._since_s = 2.0
        self._seen, self._pending, self._verdict = {}, pending, ""
        self._told, self._board = watchdog.threading.Event(), None
        self.ranks: list[Status] = []

    def _read(self, rank: int) -> Status:
        return self.ranks[rank]

    def _give(self, line: str, by: int) -> None:
        self._verdict = self._verdict or f"{by}: {line}"

    def looks(self, *ranks: Status, at_most: int = 400) -> int:
        """How often it has to look at ranks that stay as they are; -1: it says nothing."""
        self.ranks = list(ranks)
        for look in range(at_most):
            living = [replace(r, beat=look) if r.rank != ranks[-1].rank else r for r in ranks]
            self._judge(living)
            if self._verdict or self._told.is_set():
                return look
        return -1


def test_a_silent_rank_is_given_up_after_a_minute_in_a_step() -> None:
    """Of its own time: 30 beats of two seconds; at once where the others have waited for long."""
    judge = Judge(600.0)
    assert judge.looks(rank(0), rank(1), rank(2)) == 30
    assert judge._verdict.startswith("0: rank 2 (node1, pid 102) gives no sign of life for 60 s")
    assert Judge(40.0).looks(rank(0), rank(1), rank(2)) == 20, "never longer than the limit"
    assert Judge(600.0).looks(rank(0), rank(1), rank(2, phase="save")) == 300
    assert Judge(600.0).looks(rank(0), rank(1), rank(2, state=ENDED)) == -1
    waits = rank(1, still_s=600, waiting_s=600)
    judge = Judge(600.0)
    # Who is silent for five beats is gone; who still tells of itself is behind.
    assert judge.looks(rank(0), waits, rank(2)) == 0 and "behind" in judge._verdict


def test_the_lowest_living_rank_tells_of_one_that_is_gone() -> None:
    judge = Judge(600.0)
    judge.looks(rank(0, state=ENDED), rank(1), rank(2))
    assert judge._verdict.startswith(
        "1: rank 2 (node1, pid 102) gives no sign of life for 60 s, last heard of in step 7"
    )


def test_a_failure_of_one_rank_is_told_after_a_grace_and_one_of_all_is_not() -> None:
    failed = rank(2, state=FAILED, error="UserError: the disk is full")
    judge = Judge(600.0)
    assert judge.looks(rank(0), rank(1), failed) == 5
    assert judge._verdict.startswith("0: rank 2 (node1, pid 102) ended with UserError: the disk")
    judge = Judge(600.0, pending=UserError("the disk is full"))
    assert judge.looks(rank(0), rank(1), failed) == 0 and not judge._verdict
    judge = Judge(600.0, pending=RuntimeError("connection closed"))
    assert judge.looks(rank(0), rank(1), failed) == 0 and judge._verdict
    bug = rank(2, state=FAILED, error="ValueError: a bug")
    judge = Judge(600.0, pending=UserError("the disk is full"))
    assert judge.looks(rank(0), rank(1), bug) == 0 and "ValueError" in judge._verdict


class Told:
    """The ranks' store, as those of one node have written to it."""

    def __init__(self, ranks: list[Status]) -> None:
        self.held = {str(each.rank): each.encode().encode() for each in ranks}

    def check(self, keys: list[str]) -> bool:
        return set(keys) <= self.held.keys()

    def get(self, key: str) -> bytes:
        return self.held[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.held[key] for key in keys]


def looking(number: int, told: list[Status], pending: BaseException | None = None) -> list[Any]:
    """What a rank does about what three ranks tell, once."""
    judge, done = Judge(600.0, pending), []
    judge._rank, judge._store, judge._neighbour = number, Told(told), None
    judge.ranks = sorted(told, key=lambda each: each.rank)
    judge._judge = lambda ranks: done.append([each.rank for each in ranks])
    judge._judge_gone = lambda gone, what: done.append((gone.rank, what))
    judge._find_verdict()
    return done


def test_the_first_and_the_last_rank_judge_and_each_watches_the_next() -> None:
    alive = Process.this()
    all_well = [replace(rank(number), process=alive) for number in range(3)]
    assert [looking(number, all_well) for number in range(3)] == [[[0, 1, 2]], [], [[0, 1, 2]]]
    assert looking(1, all_well, RuntimeError("a collective failed")) == [[0, 1, 2]]
    assert looking(0, all_well[:2]) == [], "one has not come so far"
    dead = replace(alive, started=alive.started - 1)
    died = [replace(each, process=dead) if each.rank == 2 else each for each in all_well]
    assert looking(1, died) == [(2, "died")] and looking(0, died) == [[0, 1, 2]]
    died = [replace(each, process=dead) if each.rank == 0 else each for each in all_well]
    assert looking(2, died) == [(0, "died")], "after the last comes the first"
    ended = [replace(each, state=ENDED) if each.rank == 0 else each for each in died]
    assert looking(2, ended) == [[0, 1, 2]], "it may"


def test_the_first_verdict_counts() -> None:
    class Store:
        held = ""

        def compare_set(self, key: str, expected: str, wanted: str) -> bytes:
            self.held = self.held or wanted
            return self.held.encode()

    judge = Judge(600.0)
    judge._store = Store()  # type: ignore[assignment]
    Watchdog._give(judge, "rank 2 died", 1)
    Watchdog._give(judge, "rank 1 died", 1)
    assert judge._verdict == "rank 2 died"
    assert json.loads(judge._store.held) == {"line": "rank 2 died", "by": 1}


def test_looking_at_the_stacks_keeps_nothing_of_them_alive() -> None:
    """What a function had is gone when it has ended, not when garbage is collected."""

    class Held:
        pass

    def looked_at() -> weakref.ref[Held]:
        held = Held()
        watcher = threading.Thread(target=Place.now)
        watcher.start()
        watcher.join()
        return weakref.ref(held)

    gc.collect()
    gc.disable()
    try:
        assert looked_at()() is None
    finally:
        gc.enable()
