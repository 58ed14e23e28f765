"""Checkpoints written while the run goes on, through Megatron's own queue of asynchronous saves.

    save   tensors copied to host memory ─▶ a forked process on each rank writes w, then bilevel/
    poll   written on all ranks? ─▶ metadata ─▶ commit: only now it is the newest checkpoint
    drain  waits for that: before the next save, at the end, on a signal, on an error of all ranks

At most one is in flight. On CPU the copy is fork's own: pages are copied as the run changes them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from megatron_scalebio import runtime
from megatron_scalebio.checkpoint import folder as folders
from megatron_scalebio.checkpoint import saver
from megatron_scalebio.checkpoint.folder import BILEVEL
from megatron_scalebio.checkpoint.helpers import helpers
from megatron_scalebio.checkpoint.integrity import hash_written
from megatron_scalebio.checkpoint.run import Run
from megatron_scalebio.checkpoint.sharding import bilevel_state, w_state
from megatron_scalebio.errors import UserError
from megatron_scalebio.guard.process import die_with
from megatron_scalebio.progress import PROGRESS

# The other strategy, the default, needs the package nvidia-resiliency-ext.
_IN_BACKGROUND: dict[str, Any] = {"async_sharded_save": True, "async_strategy": "mcore"}


@dataclass(frozen=True)
class _InFlight:
    step: int
    folder: Path
    temporary: Path
    keep_last: int


class Saves:
    """The checkpoints of a run. All methods are collectives.

    Args:
        in_background: whether `save` returns before the checkpoint is whole.
    """

    def __init__(self, in_background: bool) -> None:
        self._in_background = in_background
        self._queue = AsyncCallsQueue()
        self._in_flight: _InFlight | None = None

    def save(self, state: Run, folder: Path, keep_last: int | None = None) -> None:
        """Begins a checkpoint of the current step, after the one before is whole.

        Raises:
            UserError: if the disk refuses this one or the one before; earlier ones are untouched.
        """
        with PROGRESS.at("save"):
            self._save(state, folder, keep_last)

    def _save(self, state: Run, folder: Path, keep_last: int | None) -> None:
        self.drain()
        if not self._in_background:
            saver.save(state, folder, keep_last)
            return
        with helpers():
            temporary = runtime.on_main(lambda: folders.begin(folder, state.step))
            with saver.writing(state.step, folder, temporary):
                w = dist_checkpointing.save(w_state(state), str(temporary), **_IN_BACKGROUND)
                runtime.on_main(lambda: folders.make_empty(temporary / BILEVEL))
                bilevel = dist_checkpointing.save(
                    bilevel_state(state), str(temporary / BILEVEL), **_IN_BACKGROUND
                )
                self._queue.schedule_async_request(
                    _in_turn([(w, temporary), (bilevel, temporary / BILEVEL)])
                )
        keep_last = keep_last or state.config.checkpoint.keep_last
        self._in_flight = _InFlight(state.step, folder, temporary, keep_last)

    def poll(self, wait: bool = False) -> None:
        """Commits the checkpoint in flight if all ranks have written it.

        Raises:
            UserError: if a rank could not write it.
        """
        this = self._in_flight
        if this is None:
            return
        try:
            with PROGRESS.at("save"), saver.writing(this.step, this.folder, this.temporary):
                if not self._queue.maybe_finalize_async_calls(blocking=wait):
                    return
        except UserError:
            self._in_flight = None
            raise
        self._in_flight = None
        runtime.on_main(
            lambda: folders.commit(this.temporary, this.folder, this.step, this.keep_last)
        )

    def drain(self) -> None:
        """Waits until nothing is in flight."""
        self.poll(wait=True)

    def __enter__(self) -> Saves:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """All ranks end a run together, and by a UserError, too; a crash may be of this rank alone.

        What is in flight is then given up: collecting it would wait for ranks that are gone.
        """
        if kind is None or issubclass(kind, UserError):
            self.drain()
        elif self._in_flight:
            self._queue.async_calls[0].async_caller.close(abort=True)


def _in_turn(requests: list[tuple[AsyncRequest, Path]]) -> AsyncRequest:
    """One request for several, each into its folder: all writers of a rank report in one queue, in
    their order.
    """
    finalize: list[Callable[[], None]] = [fn for each, _ in requests for fn in each.finalize_fns]
    writing = [(each, folder) for each, folder in requests if each.async_fn is not None]
    if not writing:
        return AsyncRequest(None, (), finalize)
    staged = partial(_staged, writing)
    return AsyncRequest(_write, (os.getpid(), None), finalize, preload_fn=staged)


Staged = tuple[Callable[..., None], list[Any], Path]


def _staged(requests: list[tuple[AsyncRequest, Path]]) -> list[Staged]:
    """Each writer with its arguments, tensors copied to the host, and its folder."""
    staged = []
    for each, folder in requests:
        arguments = list(each.async_fn_args)
        arguments[1] = each.preload_fn()
        staged.append((each.async_fn, arguments, folder))
    return staged


def _write(rank_process: int, staged: list[Staged]) -> None:
    """Runs in the writer's process."""
    die_with(rank_process)
    for write, arguments, folder in staged:
        write(*arguments)
        hash_written(folder, runtime.rank())
