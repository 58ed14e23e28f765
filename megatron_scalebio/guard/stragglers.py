"""The slowest rank: who takes longer than its peers for what each rank does by itself.

All ranks' steps take equally long, since they wait for the slowest. What tells is the time in
which a rank waits for nobody: reading its data, and its forward passes (measured on the GPU where
there is one). Peers are the ranks of one pipeline stage, which do the same work: a rank alone on
its stage has none and is never the slowest. Ranks of one tensor-parallel group share their layers'
waits and look alike. One small gather every `log_interval` steps.
"""

import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_scalebio import runtime

PARTS = ("data", "forward")
# A line in the log is for a rank that is slow twice in a row and costs a tenth of the run's time.
SLOW_RATIO, COSTLY_SHARE = 1.5, 0.1


class ForwardTimer:
    """Time of this rank's forward passes since it was last asked for, in seconds."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if runtime.on_cuda():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def take(self) -> float:
        """To be asked after a step, whose losses have been read: the GPU has passed the events."""
        seconds = self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


FORWARD = ForwardTimer()


@dataclass(frozen=True)
class Slowest:
    """The slowest rank of some steps.

    Attributes:
        ratio: its own time over the median of its peers'.
        part: what it loses most in.
        seconds, peers_s: a step's time in that part, its own and its peers' median.
    """

    rank: int
    host: str
    ratio: float
    part: str
    seconds: float
    peers_s: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} ({self.host}) takes {self.ratio:.1f} times as long as its peers: "
            f"{self.part} {1000 * self.seconds:.3g} ms a step against {1000 * self.peers_s:.3g} ms"
        )


def slowest(
    times_RP: Sequence[Sequence[float]], hosts_R: Sequence[str], stages_R: Sequence[int]
) -> Slowest | None:
    """The rank that is slowest against the median of its peers; None where no rank has any.

    Args:
        times_RP: seconds of each rank in each part, in the order of `PARTS`.
        stages_R: pipeline stages.
    """
    ranks = range(len(times_RP))
    found: Slowest | None = None
    for rank in ranks:
        peers = [r for r in ranks if r != rank and stages_R[r] == stages_R[rank]]
        if not peers:
            continue
        usual = median(sum(times_RP[peer]) for peer in peers)
        ratio = sum(times_RP[rank]) / usual if usual > 0 else 1.0
        if found is None or ratio > found.ratio:
            usual_P = [median(times_RP[peer][p] for peer in peers) for p in range(len(PARTS))]
            p = max(range(len(PARTS)), key=lambda p: times_RP[rank][p] - usual_P[p])
            found = Slowest(rank, hosts_R[rank], ratio, PARTS[p], times_RP[rank][p], usual_P[p])
    return found


class Stragglers:
    """Gathers the times of all ranks every `interval` steps. A collective, like `after_step`."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._data_s = self._whole_s = 0.0
        self._steps = 0
        self._suspect: int | None = None
        self._hosts_R: list[str] = []
        self._stages_R: list[int] = []
        if runtime.world_size() > 1:
            places: list[Any] = [None] * runtime.world_size()
            stage = parallel_state.get_pipeline_model_parallel_rank()
            dist.all_gather_object(places, (socket.gethostname(), stage))
            self._hosts_R = [host for host, _ in places]
            self._stages_R = [stage for _, stage in places]
        FORWARD.take()

    def after_step(
        self, step: int, time_s: Mapping[str, float], whole_s: float
    ) -> tuple[Slowest | None, str]:
        """The slowest rank, at steps that are logged; a line where that is worth one.

        Args:
            time_s: this step's phases on this rank.
            whole_s: the whole step.
        """
        self._data_s += time_s.get("data", 0.0)
        self._whole_s += whole_s
        self._steps += 1
        if step % self._interval:
            return None, ""
        own = [self._data_s / self._steps, FORWARD.take() / self._steps]
        step_s = self._whole_s / self._steps
        self._data_s, self._whole_s, self._steps = 0.0, 0.0, 0
        if not self._hosts_R:
            return None, ""
        gathered = torch.empty(len(self._hosts_R), len(own), device=runtime.device())
        dist.all_gather_into_tensor(gathered, torch.tensor([own], device=runtime.device()))
        found = slowest(gathered.tolist(), self._hosts_R, self._stages_R)
        return found, self._line(found, step_s)

    def _line(self, found: Slowest | None, step_s: float) -> str:
        slow = found is not None and found.ratio >= SLOW_RATIO
        if not slow or found is None or found.seconds - found.peers_s < COSTLY_SHARE * step_s:
            self._suspect = None
            return ""
        again, self._suspect = self._suspect == found.rank, found.rank
        return str(found) if again else ""
