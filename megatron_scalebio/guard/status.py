"""Where each rank of a run is, and which one the others wait for. Pure, but for `Place.now`.

A rank that waits is inside a collective; the one that they wait for is not, or is gone, or is in an
earlier step. That is exact with gloo. Under NCCL a host runs ahead of its GPU and waits where it
reads a result: then the step decides, and torch's flight recorder knows more.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from megatron_scalebio.guard.process import Process
from megatron_scalebio.progress import PROGRESS

PACKAGE = str(Path(__file__).resolve().parents[1])
# Files in which a process waits for others; the outermost function there is the collective.
_COLLECTIVES = (
    "torch/distributed/distributed_c10d.py",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/distributed/param_and_grad_buffer.py",
)
_ASIDE = ("/guard/", "/progress.py")
# In these a rank that stands still is stuck even if it is seen in no collective.
STEP_PHASES = ("data", "period", "flush", "update")
RUNNING, ENDED, FAILED = "running", "ended", "failed"


@dataclass(frozen=True)
class Place:
    """What a process is doing.

    Attributes:
        collective: what it waits in, "" if it does not.
        code: the innermost function of this package.
    """

    collective: str
    code: str

    @classmethod
    def now(cls) -> Place:
        """Of the main thread; collectives of the backward pass run in torch's threads."""
        frames = sys._current_frames()
        # Its own frame would hold `frames`, which holds it: a circle, which would keep everything
        # that the other stacks hold alive until the garbage collector came. (On Python 3.12.1 the
        # process then dies, if a view of a BytesIO is among it: CPython's issue 111211.)
        del frames[threading.get_ident()]
        found = [collective_in(frame) for frame in frames.values()]
        main = frames.get(threading.main_thread().ident or 0)
        return cls(next((name for name in found if name), ""), _code(main))

    def __str__(self) -> str:
        return " in ".join(part for part in (self.collective, self.code) if part)


def collective_in(frame: FrameType | None) -> str:
    """The collective that a stack is inside of."""
    name = ""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(_COLLECTIVES) and code.co_name != "wrapper":
            name = code.co_name
        frame = frame.f_back
    return name


def _code(frame: FrameType | None) -> str:
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE) and not any(part in path for part in _ASIDE):
            return f"{frame.f_code.co_name} ({path.removeprefix(PACKAGE)[1:]}:{frame.f_lineno})"
        frame = frame.f_back
    return ""


@dataclass(frozen=True)
class Status:
    """What a rank tells of itself every few seconds.

    Attributes:
        beat: grows with each message.
        still_s, waiting_s: how long nothing has moved; and it was in one collective all that time.
        error: what ended it, if it failed.
    """

    rank: int
    process: Process
    beat: int = 0
    state: str = RUNNING
    step: int = 0
    phase: str = "start"
    place: str = ""
    marks: int = 0
    still_s: float = 0.0
    waiting_s: float = 0.0
    error: str = ""

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes | str) -> Status:
        values = json.loads(text)
        return cls(**{**values, "process": Process.from_dict(values["process"])})

    @property
    def where(self) -> str:
        step = f"step {self.step}, " if self.step else ""
        return f"{step}phase {self.phase}" + (f" ({self.place})" if self.place else "")

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.process})"


class Stillness:
    """How long this rank stands still, seen by one look after another."""

    def __init__(self) -> None:
        self._marks, self._collective = -1, ""
        self.still_s = self.waiting_s = 0.0

    def look(self, place: Place, since_s: float) -> None:
        """Args:
        since_s: the last look. One that comes late, of a process that was stopped, say, tells of
            no more than the usual time.
        """
        moved = PROGRESS.marks != self._marks
        self.still_s = 0.0 if moved else self.still_s + since_s
        waits = place.collective != "" and place.collective == self._collective and not moved
        self.waiting_s = self.waiting_s + since_s if waits else 0.0
        self._marks, self._collective = PROGRESS.marks, place.collective


def stalled(ranks: Sequence[Status], timeout_s: float) -> bool:
    """Whether some rank has waited for too long."""
    return any(
        rank.state == RUNNING
        and rank.still_s >= timeout_s
        and (rank.waiting_s >= timeout_s or rank.phase in STEP_PHASES)
        for rank in ranks
    )


def behind(ranks: Sequence[Status]) -> list[Status]:
    """The ranks that the others wait for; all of them where nothing tells."""
    running = [rank for rank in ranks if rank.state == RUNNING]
    outside = [rank for rank in running if rank.waiting_s == 0]
    if 0 < len(outside) < len(running):
        return outside
    first = min(rank.step for rank in running)
    return [rank for rank in running if rank.step == first]


def stall_line(ranks: Sequence[Status]) -> str:
    """Which ranks are behind, where, and who waits for them."""
    late = behind(ranks)
    still = max(rank.still_s for rank in ranks)
    if len(late) == sum(rank.state == RUNNING for rank in ranks):
        places = Counter(rank.where for rank in late).most_common(3)
        each = "; ".join(f"{count} in {where}" for where, count in places)
        return f"nothing has moved for {still:.0f} s and no rank is behind the others: {each}"
    names = ", ".join(str(rank) for rank in late[:3]) + (", …" if len(late) > 3 else "")
    verb = "is" if len(late) == 1 else "are"
    head = f"{names} {verb} behind: nothing has moved for {still:.0f} s in {late[0].where}"
    return f"{head}; {waiting_line(ranks, late)}"


def gone_line(gone: Status, what: str, ranks: Sequence[Status]) -> str:
    """Which rank is no more, where it was last heard of, and who waits for it."""
    return f"{gone} {what}, last heard of in {gone.where}; {waiting_line(ranks, [gone])}"


def waiting_line(ranks: Sequence[Status], late: Sequence[Status]) -> str:
    others = [rank for rank in ranks if rank not in late and rank.state == RUNNING]
    if not others:
        return "no other rank waits for it"
    where = Counter(rank.where for rank in others).most_common(1)[0][0]
    names = spans([rank.rank for rank in others])
    return f"{'rank' if len(others) == 1 else 'ranks'} {names} waiting for it in {where}"


def spans(numbers: Sequence[int]) -> str:
    """0, 2-7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
