"""Times the parts of a step, and says where in the run this rank is."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_scalebio.guard.stragglers import FORWARD
from megatron_scalebio.progress import PROGRESS


class StepClock:
    """Wall time of the parts of a step, in seconds; entered with each part's name while it lasts.

    The core enters it with its own parts, "forward" around every forward pass among them.
    """

    def __init__(self) -> None:
        self._time_s: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if part == "forward":
            PROGRESS.mark()
            with FORWARD.running():
                yield
            return
        start = time.perf_counter()
        with PROGRESS.at(part):
            yield
        self._time_s[part] = self._time_s.get(part, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The time of each part since it was last asked for."""
        taken, self._time_s = self._time_s, {}
        return taken
