"""TensorBoard's view of a run: one event a step, written at once by TensorBoard's own encoder.

Not by its `SummaryWriter`: that makes an event of every scalar (60 scalars cost 2.4 ms of Python a
step, 0.5 ms here), writes in a thread, which prints a traceback when the disk is full, and loads
TensorFlow where that is installed.
"""

import io
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_scalebio.logs.records import write_whole
from megatron_scalebio.logs.source_table import LISTED_SOURCES, heaviest

STEP_TAGS = {
    # Megatron-LM's tags, of the same meaning, except that `throughput` counts tokens a second.
    "lm loss": "train_loss_w",
    "lm loss validation": "validation_loss",
    "learning-rate": "lr_w",
    "grad-norm": "grad_norm_w",
    "iteration-time": "step_time_s",
    "throughput": "tokens_per_second",
    "mem-allocated-bytes": "memory_bytes",
    # Of the two levels.
    "bilevel/L1": "validation_loss",
    "bilevel/L2_w": "train_loss_w",
    "bilevel/L2_u": "train_loss_u",
    "bilevel/alpha": "alpha",
    "bilevel/grad_norm_u": "grad_norm_u",
    "bilevel/grad_norm_lambda": "grad_norm_lambda",
    "learning-rate-u": "lr_u",
    "learning-rate-lambda": "lr_lambda",
}
SAMPLES_TAGS = {
    "lm loss vs samples": "train_loss_w",
    "lm loss validation vs samples": "validation_loss",
}
SOURCE_TAGS = {
    "mixture/weight": "weights",
    "mixture/excess_loss": "excess_loss",
    "mixture/loss_w": "loss_w",
    "mixture/loss_u": "loss_u",
}
# A TensorBoard scalar costs about 10 us of Python, so per-source scalars come seldom enough to
# average at most this many a step: every step up to 50 sources, every other with 100.
SOURCE_SCALARS_PER_STEP = 200
# Nobody looks at 40,000 curves, and TensorBoard does not load them: of more sources, those among
# the heaviest at some time, and no more than this.
SOURCES_DRAWN = LISTED_SOURCES


def source_interval(num_sources: int, interval: int) -> int:
    """Steps between points of the sources, where others come every `interval`."""
    drawn = min(num_sources, SOURCES_DRAWN)
    spread = math.ceil(len(SOURCE_TAGS) * drawn / SOURCE_SCALARS_PER_STEP)
    return interval * max(1, spread)


class TensorBoardLog:
    """One event a step, which holds all of that step's scalars, in a new file for each start.

    Per-source scalars (4 S of them, of at most SOURCES_DRAWN sources) come every `source_interval`
    steps; all else every `interval`.
    """

    def __init__(
        self,
        directory: Path,
        sources: Sequence[str],
        validation: Sequence[str],
        global_batch_size: int,
        interval: int = 1,
        resume_step: int = 0,
    ) -> None:
        self.interval = interval
        self.source_interval = source_interval(len(sources), interval)
        self._global_batch_size = global_batch_size
        self._resume_step = resume_step
        self._sources, self._validation = sources, validation
        self._drawn = dict.fromkeys(range(len(sources) if len(sources) <= SOURCES_DRAWN else 0))
        self._last_without_sources: Mapping[str, Any] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        # Readers take a folder's files in the order of their names, and a run may resume within
        # the second that it stopped in.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(directory / name, "ab", buffering=0)  # noqa: SIM115
        # What SummaryWriter's purge_step writes: readers drop the events of this step and later.
        start = SessionLog(status=SessionLog.START)
        self._write(
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            Event(step=resume_step + 1, session_log=start),
        )

    def log(self, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        if step % self.interval:
            return
        batch: tuple[str, float | None] = ("batch-size", self._global_batch_size)
        scalars = [batch, *step_scalars(record, self._validation)]
        if step % self.source_interval == 0:
            scalars += self._source_scalars(record)
            self._last_without_sources = None
        else:
            self._last_without_sources = record
        samples = step * self._global_batch_size
        self._write(_event(step, scalars), _event(samples, _pick(record, SAMPLES_TAGS)))

    def log_samples_again(self, record: Mapping[str, Any]) -> None:
        """Repeats a kept step's ` vs samples` twins after a resume.

        They are filed under the samples consumed, so the purge by step wipes those of earlier
        steps too.
        """
        samples = int(record["step"]) * self._global_batch_size
        if samples > self._resume_step and int(record["step"]) % self.interval == 0:
            self._write(_event(samples, _pick(record, SAMPLES_TAGS)))

    def close(self) -> None:
        record = self._last_without_sources
        if record is not None:
            self._write(_event(int(record["step"]), self._source_scalars(record)))
        self._file.close()

    def _write(self, *events: Event) -> None:
        """Writes the events in one system call."""
        data = io.BytesIO()
        for event in events:
            RecordWriter(data).write(event.SerializeToString())
        write_whole(self._file, data.getvalue())

    def _source_scalars(self, record: Mapping[str, Any]) -> list[tuple[str, float | None]]:
        weights = record.get("weights")
        if len(self._sources) > SOURCES_DRAWN and weights is not None:
            top = heaviest(np.asarray(weights)).tolist()
            self._drawn.update(dict.fromkeys(top[: SOURCES_DRAWN - len(self._drawn)]))
        scalars = []
        for prefix, field in SOURCE_TAGS.items():
            values: Any = record.get(field)
            for number in self._drawn if values is not None and len(values) else ():
                scalars.append((f"{prefix}/{self._sources[number]}", values[number]))
        return scalars


def step_scalars(
    record: Mapping[str, Any], validation: Sequence[str]
) -> Iterator[tuple[str, float | None]]:
    """What a step's record has, but for single sources."""
    yield from _pick(record, STEP_TAGS)
    for name, loss in zip(validation, record.get("validation_losses") or (), strict=False):
        yield f"lm loss validation-{name}", loss
    for name, weight in zip(validation, record.get("validation_weights") or (), strict=False):
        yield f"mixture/validation/{name}", weight
    for field in ("rank", "ratio") if record.get("straggler") else ():
        yield f"straggler/{field}", record["straggler"][field]
    for name, weight in (record.get("group_weights") or {}).items():
        yield f"mixture/group/{name}", weight
    for phase, seconds in (record.get("time_s") or {}).items():
        yield f"time/{phase}", seconds


def _event(step: int, scalars: Sequence[tuple[str, float | None]]) -> Event:
    values = [
        Summary.Value(tag=tag, simple_value=value)
        for tag, value in scalars
        if value is not None and math.isfinite(value)
    ]
    return Event(wall_time=time.time(), step=step, summary=Summary(value=values))


def _pick(record: Mapping[str, Any], tags: Mapping[str, str]) -> list[tuple[str, float | None]]:
    return [(tag, record.get(field)) for tag, field in tags.items()]
