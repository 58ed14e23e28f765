"""Ends processes that tests started, with those that they have started in turn."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time

import psutil


def _signal_all(pid: int, number: int) -> None:
    """Returns when they are dead; they may wait for their parents to notice."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        for each in (*launcher.children(recursive=True), launcher):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)
                deadline = time.monotonic() + 10
                while each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.01)


def kill_all(pid: int) -> None:
    """kill -9 of a launcher, its ranks and what they started; harmless if they are gone."""
    _signal_all(pid, signal.SIGKILL)


def end_all(pid: int) -> None:
    """Ends what hangs; those with `faulthandler` write their stacks first."""
    _signal_all(pid, signal.SIGABRT)
    kill_all(pid)


def finish(process: subprocess.Popen[str], limit_s: float = 120) -> tuple[str, str]:
    """Waits for a process of `start_command`: stdout and stderr.

    Raises:
        TimeoutError: with the stacks of it and what it started, if it takes longer.
    """
    try:
        return process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        end_all(process.pid)
    said, complained = "", ""
    with contextlib.suppress(subprocess.TimeoutExpired):  # an orphan keeps them open
        said, complained = process.communicate(timeout=10)
    raise TimeoutError(f"it hangs after {limit_s:.0f} s\n{said}\n{complained}")
