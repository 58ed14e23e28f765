"""Which process this is, so that others can tell whether it still lives, without any clock.

Imports nothing heavy: helper processes start with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_scalebio.errors import EXIT_LOST

_PR_SET_PDEATHSIG = 1  # prctl(2)
_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # looked up before any fork


@dataclass(frozen=True)
class Process:
    """A process on some machine.

    Attributes:
        boot: the machine's boot and the process's namespace: equal where one can see the other.
        started: when it started, in ticks since the boot; tells it from a later one of its number.
    """

    host: str
    boot: str
    pid: int
    started: int

    @classmethod
    def this(cls) -> Process:
        return cls(socket.gethostname(), _boot(), os.getpid(), _started(os.getpid()))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Process:
        """Raises KeyError, TypeError or ValueError where these are no process's values."""
        host, boot = str(values["host"]), str(values["boot"])
        return cls(host, boot, int(values["pid"]), int(values["started"]))

    def is_near(self) -> bool:
        """Whether it runs, or ran, where this process can see it."""
        return self.boot != "" and self.boot == _boot()

    def is_dead(self) -> bool:
        """True only where it is certain; a process on another machine is not."""
        return self.is_near() and _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}"


def _boot() -> str:
    """Identity of the running kernel and of its process numbers here; "" where nothing tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int:
    """Start of a living process, in ticks since the boot; -1 if there is none."""
    try:
        # The name, in parentheses, may hold anything: the fields are counted from its end.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -1
    return -1 if fields[0] in "ZX" else int(fields[19])


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, which has that number.

    Linux only; nothing elsewhere. It holds for the thread of the parent that started this process.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(EXIT_LOST)  # it was faster
