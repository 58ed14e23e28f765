"""Errors that a user can cause. The CLI prints them as one line and exits with code 2."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_SIGNALLED = 3  # stopped by SIGTERM or SIGUSR1 after saving
EXIT_LOST = 4  # a rank died or hung, or another run took the folder over; nothing was saved

WRITABLE = "choose a folder on a disk with room, that you may write to"


class UserError(Exception):
    """A mistake in input or configuration, in one line: `where: what is wrong (what to do)`.

    Args:
        message: the line, or what is wrong where the other two are told apart.
        where: the file (with line) or configuration field that it concerns.
        fix: what the user can do about it.
    """

    def __init__(self, message: str, *, where: str = "", fix: str = "") -> None:
        text = f"{where}: {message}" if where else message
        if fix:
            text = f"{text} ({fix})"
        super().__init__(" ".join(text.split()))


class RankLost(Exception):
    """Another rank died or hung; which one has been printed already."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Lets SIGTERM (a scheduler's) clean up like Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def disk_error(error: OSError, path: Path) -> UserError:
    """What an operating system's refusal to write at a path is to a user."""
    there = Path(error.filename or path)
    if isinstance(error, FileExistsError) and there.is_file():
        return not_a_folder(there)
    return UserError(f"can't write: {error.strerror or error}", where=str(path), fix=WRITABLE)


def not_a_folder(path: Path) -> UserError:
    return UserError(f"{path}: is a file, and a folder is to be made there (choose another name)")


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turns what a disk refuses into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from None
