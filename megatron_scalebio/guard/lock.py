"""One run at a time in a folder: a lock file that its holder keeps writing to.

    FOLDER/run.lock     holder (host, pid, SLURM job), token, count: one line, rewritten every 5 s

A newcomer takes the folder over at once from a process that it can see to be dead, and from an
earlier start of its own SLURM job. Otherwise it watches, by its own clock, whether the count moves:
nodes' clocks are never compared. Made for NFS: the file is made with O_EXCL, and rewritten in place
between an open and a close, which is what NFS promises to show to others.

A holder that finds another's token (it had been cut off for long) ends its process: two writers
would spoil the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_scalebio.errors import EXIT_LOST, WRITABLE, UserError
from megatron_scalebio.guard.process import Process

LOCK_FILE = "run.lock"
RENEW_S = 5.0
PATIENCE_S = 60.0  # without a change, until a holder counts as dead
_POLL_S = 1.0
_SAID_AFTER_S = 10.0
_SETTLE_S = 0.5  # two newcomers that take over at once: the later one to write has it
_LINE_BYTES = 1024


@dataclass(frozen=True)
class Holder:
    """Who holds a folder."""

    process: Process
    job: str  # SLURM_JOB_ID, "" without SLURM
    restart: int  # how often SLURM has requeued that job
    token: str

    @classmethod
    def this(cls) -> Holder:
        job, restart = os.environ.get("SLURM_JOB_ID", ""), os.environ.get("SLURM_RESTART_COUNT", "")
        token = uuid.uuid4().hex
        return cls(Process.this(), job, int(restart) if restart.isdecimal() else 0, token)

    @classmethod
    def read(cls, line: bytes) -> Holder | None:
        """The holder that a lock file's line tells; None of a torn or foreign one."""
        try:
            values = json.loads(line)
            process = Process.from_dict(values["process"])
            restart, token = int(values["restart"]), str(values["token"])
            return cls(process, str(values["job"]), restart, token)
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def line(self, count: int) -> bytes:
        """Always of the same length, so that rewriting never leaves a part of the old one."""
        values: dict[str, Any] = {
            "process": asdict(self.process), "job": self.job, "restart": self.restart,
            "token": self.token, "count": count,
        }  # fmt: skip
        return json.dumps(values).encode().ljust(_LINE_BYTES - 1) + b"\n"

    def gives_way_to(self, newcomer: Holder) -> bool:
        """Whether it is certain that this holder writes no more."""
        if self.process == newcomer.process:
            return True  # an earlier run of this very process
        requeued = self.job != "" and self.job == newcomer.job
        return self.process.is_dead() or (requeued and self.restart < newcomer.restart)

    def __str__(self) -> str:
        return (f"SLURM job {self.job} on " if self.job else "") + str(self.process)


@contextlib.contextmanager
def held(
    *folders: Path, patience_s: float = PATIENCE_S, renew_s: float = RENEW_S
) -> Iterator[None]:
    """Holds folders (those inside another one need none of their own) until the block ends.

    Raises:
        UserError: if another run holds one of them.
    """
    outer: list[Path] = []
    for folder in folders:
        if not any(folder.resolve().is_relative_to(other.resolve()) for other in outer):
            outer.append(folder)
    with contextlib.ExitStack() as stack:
        for folder in outer:
            lock = FolderLock(folder / LOCK_FILE, renew_s)
            lock.acquire(patience_s)
            stack.callback(lock.release)
        yield


class FolderLock:
    """The lock file of one folder; a process ends when another one has taken it over."""

    def __init__(self, path: Path, renew_s: float = RENEW_S) -> None:
        self.path, self.holder, self.count, self._renew_s = path, Holder.this(), 0, renew_s
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, patience_s: float = PATIENCE_S) -> None:
        """Takes the folder and keeps it.

        Raises:
            UserError: if another run writes to it, or the disk refuses.
        """
        try:
            while not (self._create() or self._take_over(patience_s)):
                pass
        except OSError as error:
            raise UserError(
                f"{self.path}: can't write: {error.strerror or error} ({WRITABLE})"
            ) from None
        self._thread = threading.Thread(target=self._renew, name="folder lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Gives the folder back; harmless if it is another's by now."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        with contextlib.suppress(OSError):
            if self._is_ours(self.path.read_bytes()):
                self.path.unlink()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "wb") as stream:
                self._write(stream)
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self, patience_s: float) -> bool:
        """Waits for the holder's end and follows it; False if the file is gone meanwhile."""
        stale = self._watch(patience_s)
        try:
            with self.path.open("r+b") as stream:
                if stale is None or stream.read() != stale:
                    return False
                stream.seek(0)
                self._write(stream)
            time.sleep(_SETTLE_S)
            return self._is_ours(self.path.read_bytes())
        except FileNotFoundError:
            return False

    def _watch(self, patience_s: float) -> bytes | None:
        """What a dead holder left; None if nothing. Seconds are counted by polls: a server that
        stands still delays the holder and this process alike.

        Raises:
            UserError: if the holder lives.
        """
        seen, unchanged_s = self._content(), 0.0
        while seen is not None:
            holder = Holder.read(seen)
            if holder and holder.gives_way_to(self.holder):
                return seen
            if holder and holder.process.is_near():
                raise self._refusal(holder)  # it is not dead
            if unchanged_s >= patience_s:
                return seen
            time.sleep(min(_POLL_S, patience_s / 4))
            unchanged_s += min(_POLL_S, patience_s / 4)
            if unchanged_s - _POLL_S < _SAID_AFTER_S <= unchanged_s:
                print(
                    f"megatron-scalebio: {self.path}: waiting {patience_s:g} s for a sign of life "
                    f"of {holder or 'its holder'}", file=sys.stderr,
                )  # fmt: skip
            now = self._content()
            # A line that can't be read is one that is just being made.
            if now is not None and now != seen and holder and Holder.read(now):
                raise self._refusal(Holder.read(now) or holder)
            if now != seen:
                seen, unchanged_s = now, 0.0
        return None

    def _content(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def _refusal(self, holder: Holder) -> UserError:
        return UserError(
            f"{self.path.parent}: another run writes here ({holder}) (wait until it has ended, or "
            "choose another train.output)"
        )

    def _renew(self) -> None:
        while not self._ended.wait(self._renew_s):
            try:
                with self.path.open("r+b") as stream:
                    content = stream.read()
                    if not self._is_ours(content):
                        break
                    stream.seek(0)
                    self._write(stream)
            except FileNotFoundError:  # someone tidied up
                with contextlib.suppress(OSError):
                    self._create()
            except OSError:  # a full disk or a server that is away: next time, then
                continue
        else:
            return
        holder = Holder.read(content)
        why = f"{self.path.parent}: taken over by another run ({holder or 'unknown'})"
        print(f"megatron-scalebio: error: {why}; this process ends", file=sys.stderr, flush=True)
        os._exit(EXIT_LOST)

    def _is_ours(self, content: bytes) -> bool:
        holder = Holder.read(content)
        return holder is not None and holder.token == self.holder.token

    def _write(self, stream: Any) -> None:
        self.count += 1
        stream.write(self.holder.line(self.count))
        stream.flush()
        os.fsync(stream.fileno())
