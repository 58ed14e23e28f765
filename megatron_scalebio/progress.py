"""Where this rank is in the run: its step, the phase of it, and a count of all that was done.

A leaf that costs nothing: the loop and the flush say where they are, the watchdog looks.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Attributes:
    step: the step that is being made, 0 before the first.
    phase: what is being done in it.
    marks: grows with every sign of progress; compared for equality only.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.step, self.phase, self.marks = 0, "start", 0

    def mark(self) -> None:
        self.marks += 1

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """What is done until the end of the block."""
        before, self.phase = self.phase, phase
        self.marks += 1
        yield
        self.phase = before
        self.marks += 1


PROGRESS = Progress()
