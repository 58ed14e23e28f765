"""How far a run is with opening its sources, shown where they are many and it takes a moment."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_scalebio.progress import PROGRESS

_MANY = 100  # sources; fewer take long only on a busy machine
_SILENT_S = 1.0
_LINE_EVERY_S = 10.0


@contextmanager
def opening(quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Gives what is to be told how many sources are open, of how many: a bar, or lines in a log."""
    console = Console(stderr=True, quiet=quiet, highlight=False)
    begun = time.monotonic()
    shown_at = begun + _SILENT_S - _LINE_EVERY_S
    columns = (TextColumn("opening sources"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    task = bar.add_task("")

    def show(done: int, of: int) -> None:
        nonlocal shown_at
        PROGRESS.mark()
        now = time.monotonic()
        if of < _MANY:
            return
        if console.is_terminal:
            if now - begun > _SILENT_S:
                bar.start()
                bar.update(task, completed=done, total=of)
        elif now - shown_at > _LINE_EVERY_S:
            shown_at = now
            console.print(f"opening sources: {done:,} of {of:,}")

    try:
        yield show
    finally:
        if bar.live.is_started:  # stopped unstarted, it leaves an empty line
            bar.stop()
