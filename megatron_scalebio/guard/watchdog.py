"""A rank that dies or hangs: one line says which, where, and who waits for it; then all ranks end.

    each rank   a thread writes its `Status` to the ranks' store every 2 s, looks whether the next
                rank of its node lives, and whether a verdict has been given
    two ranks   (the first and the last) read all statuses and judge
    verdict     the lowest living rank prints it, and every rank's process ends with EXIT_LOST

Messages are told apart by count, and durations are measured where they pass: no clocks are
compared. A crash of this rank's own is a traceback, as ever; the others are told by the verdict.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from megatron_scalebio.errors import RankLost, UserError
from megatron_scalebio.guard.board import Board
from megatron_scalebio.guard.process import Process
from megatron_scalebio.guard.status import (
    ENDED,
    FAILED,
    RUNNING,
    STEP_PHASES,
    Place,
    Status,
    Stillness,
    collective_in,
    gone_line,
    stall_line,
    stalled,
)
from megatron_scalebio.launcher import end_lost, tell_torchrun
from megatron_scalebio.progress import PROGRESS

BEAT_S = 2.0
_SILENT_S = 60.0  # in a step; a start may keep the interpreter busy for longer
_GRACE_BEATS = 5  # a failure of all ranks reaches all of them meanwhile
_VERDICT = "verdict"
_generation = 0


class Watchdog:
    """Watches the ranks of a run while the block lasts; all ranks enter it.

    Args:
        timeout_s: how long a rank may wait in a collective.
        before_end: what to do before the process ends without cleaning up.
        board: where rank 0 leaves what the ranks tell, and who ended the run.
    """

    def __init__(
        self, timeout_s: float, before_end: Callable[[], None], beat_s: float = BEAT_S,
        board: Board | None = None,
    ) -> None:  # fmt: skip
        global _generation
        _generation += 1  # a process may run several commands in one store
        self._timeout_s, self._beat_s, self._before_end = timeout_s, beat_s, before_end
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._board = board
        # A connection of its own: the main thread may be blocked in the other one.
        shared: Any = dist.distributed_c10d._get_default_store()
        store = shared.clone()
        self._store = dist.PrefixStore(f"watchdog/{_generation}", store)
        self._store.set_timeout(datetime.timedelta(seconds=max(10.0, 5 * beat_s)))
        self._own = Status(self._rank, Process.this())
        self._stillness = Stillness()
        self._since_s = 0.0  # the last look, at most a beat
        self._seen: dict[int, tuple[Status, float]] = {}  # and for how long it is the same
        self._neighbour: int | None = None
        self._keeper = self._own  # rank 0's status, which is gone with its store
        self._wake, self._stopped, self._told = (threading.Event() for _ in range(3))
        self._failed = threading.Event()
        self._pending: BaseException | None = None  # what the main thread wants explained
        self._verdict = ""
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        PROGRESS.reset()
        self._publish(RUNNING)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        """Names the rank that is to blame, where an error came out of a collective.

        Raises:
            RankLost: if it is another one.
        """
        # A checkpoint's RuntimeError, say, became a UserError on the way.
        cause = error.__context__ if isinstance(error, UserError) else error
        if cause is not None and _in_collective(cause.__traceback__):
            self._pending = error
            self._wake.set()
            self._told.wait(2 * _GRACE_BEATS * self._beat_s)
        elif error is not None:
            self._failed.set()
            with contextlib.suppress(dist.DistError):
                self._publish(FAILED, f"{type(error).__name__}: {error}")
                self._linger()
        self._stopped.set()
        self._wake.set()
        self._thread.join(timeout=10)
        if self._pending and self._verdict:
            time.sleep(2 * self._beat_s if self._rank == 0 else 0)  # others read it in its store
            raise RankLost(self._verdict) from None
        if error is None:
            with contextlib.suppress(dist.DistError):  # the store's keeper may have ended first
                self._publish(ENDED)

    def _linger(self) -> None:
        """Lets the others read what ended the keeper of their store, unless they end as well."""
        deadline = time.monotonic() + 2 * self._beat_s
        while self._rank == 0 and time.monotonic() < deadline:
            if all(self._read(rank).state != RUNNING for rank in range(1, self._size)):
                return
            time.sleep(self._beat_s / 10)

    def _run(self) -> None:
        beats_without_store = 0
        while not (self._stopped.is_set() or self._failed.is_set()):
            try:
                self._publish(RUNNING)
                self._find_verdict()
                beats_without_store = 0
            except dist.DistError:
                beats_without_store += 1
                self._judge_store(beats_without_store)
            if self._verdict:
                self._tell()
            if self._told.is_set():
                return
            self._since_s = self._rest()

    def _rest(self) -> float:
        """Until the next look is due, or asked for. For how long; a late one counts as due."""
        due_s = self._beat_s / 4 if self._pending else self._beat_s
        start = time.monotonic()
        self._wake.wait(due_s)
        self._wake.clear()
        return min(time.monotonic() - start, due_s)

    def _publish(self, state: str, error: str = "") -> None:
        place = Place.now()
        self._stillness.look(place, self._since_s)
        self._own = Status(
            self._rank, self._own.process, self._own.beat + 1, state, PROGRESS.step, PROGRESS.phase,
            str(place), PROGRESS.marks, self._stillness.still_s, self._stillness.waiting_s,
            " ".join(error.split())[:300],
        )  # fmt: skip
        self._store.set(str(self._rank), self._own.encode())

    def _find_verdict(self) -> None:
        if self._store.check([_VERDICT]):
            self._adopt(self._store.get(_VERDICT))
            return
        everyone = [str(rank) for rank in range(self._size)]
        if not self._store.check(everyone):
            return  # some rank has not come so far
        if self._neighbour is None:
            self._neighbour = self._next_on_this_node(everyone)
        self._keeper = self._read(0)
        neighbour = self._read(self._neighbour)
        if neighbour.state == RUNNING and neighbour.process.is_dead():
            self._judge_gone(self._read(self._neighbour), "died")
        elif self._rank in (0, self._size - 1) or self._pending:
            self._judge([self._read(rank) for rank in range(self._size)])

    def _next_on_this_node(self, everyone: list[str]) -> int:
        processes = [Status.decode(text).process for text in self._store.multi_get(everyone)]
        near = [rank for rank, process in enumerate(processes) if process.is_near()] or [self._rank]
        return next((rank for rank in near if rank > self._rank), near[0])

    def _read(self, rank: int) -> Status:
        return Status.decode(self._store.get(str(rank)))

    def _judge(self, ranks: list[Status]) -> None:
        if self._board and self._rank == 0:
            self._board.tell(ranks)
        for status in ranks:
            before, silent_s = self._seen.get(status.rank, (None, 0.0))
            self._seen[status.rank] = (status, silent_s + self._since_s if status == before else 0)
        over = stalled(ranks, self._timeout_s)
        grace_s = _GRACE_BEATS * self._beat_s
        for status, silent_s in self._seen.values():
            bound_s = min(_SILENT_S, self._timeout_s)
            if status.phase not in STEP_PHASES:
                bound_s = self._timeout_s
            if over and silent_s >= grace_s:
                bound_s = 0.0
            if status.state == FAILED and (silent_s >= grace_s or self._pending):
                return self._judge_failed(status, ranks)
            if status.state == RUNNING and silent_s >= bound_s and status.rank != self._rank:
                return self._judge_gone(status, f"gives no sign of life for {silent_s:.0f} s")
        if over:
            self._give(stall_line(ranks), min(r.rank for r in ranks if r.state == RUNNING))
        return None

    def _judge_gone(self, gone: Status, what: str) -> None:
        if gone.state == ENDED:
            return
        if gone.state == FAILED:  # it said so between two looks, and is gone since
            what = f"ended with {gone.error}"
        ranks = [self._read(rank) for rank in range(self._size)]
        living = [r.rank for r in ranks if r.state == RUNNING and r.rank != gone.rank]
        self._give(gone_line(gone, what, ranks), min(living, default=self._rank))

    def _judge_failed(self, failed: Status, ranks: list[Status]) -> None:
        """A refusal (of a full disk, say) is one of all ranks that have met it."""
        if isinstance(self._pending, UserError) and failed.error.startswith(UserError.__name__):
            self._told.set()
            return
        living = [r.rank for r in ranks if r.state == RUNNING]
        self._give(gone_line(failed, f"ended with {failed.error}", ranks), min(living))

    def _judge_store(self, beats: int) -> None:
        """Rank 0, or the launcher, keeps the store; it may just have ended before this rank."""
        if self._keeper.state == FAILED and isinstance(self._pending, UserError):
            self._told.set()
        if self._told.is_set() or (beats < _GRACE_BEATS and not self._pending):
            return
        if "TORCHELASTIC_RUN_ID" in os.environ:
            line, by = f"the launcher's store does not answer; here: {self._own.where}", 0
        else:
            failed = self._keeper.state == FAILED
            what = f"ended with {self._keeper.error}" if failed else "is gone with its store"
            line, by = gone_line(self._keeper, what, [self._own]), 1
        self._adopt(json.dumps({"line": line, "by": by}).encode())

    def _give(self, line: str, by: int) -> None:
        """The first verdict counts."""
        verdict = json.dumps({"line": line, "by": by})
        self._adopt(self._store.compare_set(_VERDICT, "", verdict))

    def _adopt(self, verdict: bytes) -> None:
        values = json.loads(verdict)
        self._verdict = values["line"]
        said = f"megatron-scalebio: error: {self._verdict}"
        tell_torchrun(said)
        if values["by"] == self._rank:
            if self._board:
                self._board.close(self._verdict)
            print(said, file=sys.stderr, flush=True)

    def _tell(self) -> None:
        """Hands the verdict to the main thread where that can end the process, else ends it."""
        self._told.set()
        if self._stopped.wait(self._beat_s):
            return
        # Where this rank's store is read by others: they have to see the verdict first.
        time.sleep(2 * self._beat_s if self._rank == 0 else 0)
        self._before_end()
        end_lost()


def _in_collective(traceback: TracebackType | None) -> bool:
    """Whether an error was raised inside a collective, where other ranks may be its cause."""
    last: FrameType | None = None
    while traceback is not None:
        last, traceback = traceback.tb_frame, traceback.tb_next
    return collective_in(last) != ""
