"""The record of a run, one object a step: `metrics.jsonl`, and the same numbers in TensorBoard.

`metrics.jsonl` is the record, TensorBoard a view of it. Both are cut back to the checkpoint's step
when a run resumes, so that no step appears twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

from megatron_scalebio.errors import UserError
from megatron_scalebio.report.event_file import EventFile

METRICS_FILE = "metrics.jsonl"

# Megatron-LM's tags, of the same meaning, except that `throughput` counts tokens a second.
MEGATRON_TAGS = {
    "lm loss": "train_loss_w",
    "lm loss validation": "validation_loss",
    "learning-rate": "lr_w",
    "grad-norm": "grad_norm_w",
    "iteration-time": "step_time_s",
    "throughput": "tokens_per_second",
    "mem-allocated-bytes": "memory_bytes",
}
BILEVEL_TAGS = {
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
# A TensorBoard scalar costs about 2 us of Python, so per-source scalars come seldom enough to
# average at most this many a step: every step up to 50 sources, every 20th with 1,000.
SOURCE_SCALARS_PER_STEP = 200


class MetricsLog:
    """Appends each step to `metrics.jsonl` and to TensorBoard. For rank 0 alone.

    A step's line is written in one system call, so a kill between steps loses nothing and a kill
    inside one leaves at most a torn last line, which resuming drops.

    Args:
        run_dir: the run's output folder, made if missing.
        sources: names, in the order of the records' per-source lists (length S).
        validation: names, in the order of the records' `validation_losses`.
        global_batch_size: training sequences a step.
        resume_step: last step to keep of an earlier run in this folder (0: start afresh).
        tensorboard_dir: where events go [run_dir/tensorboard].
        tensorboard_log_interval: steps between TensorBoard points.

    Raises:
        UserError: when the folder can't be written.
    """

    def __init__(
        self,
        run_dir: Path | str,
        sources: Sequence[str],
        validation: Sequence[str],
        *,
        global_batch_size: int,
        resume_step: int = 0,
        tensorboard_dir: Path | str | None = None,
        tensorboard_log_interval: int = 1,
    ) -> None:
        self.path = Path(run_dir) / METRICS_FILE
        self.tensorboard_dir = Path(tensorboard_dir or Path(run_dir) / "tensorboard")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            truncate_metrics(self.path, resume_step)
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
            self._tensorboard = TensorBoardLog(
                self.tensorboard_dir, sources, validation, global_batch_size,
                tensorboard_log_interval, resume_step,
            )  # fmt: skip
        except OSError as error:
            raise self._disk_error(error) from None
        for record in read_records(self.path):
            self._tensorboard.log_samples_again(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Records one step; the fields are those of `metrics.jsonl`, as plain Python numbers.

        Floats in lists keep 9 significant digits (all that float32 has); NaN and Inf become null.

        Raises:
            UserError: when the disk is full or gone.
        """
        line = encode_record(record)
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk is full")
            self._tensorboard.log(record)
        except OSError as error:
            raise self._disk_error(error) from None

    def close(self) -> None:
        """Writes what TensorBoard still holds and closes both."""
        self._file.close()
        try:
            self._tensorboard.close()
        except OSError as error:
            raise self._disk_error(error) from None

    def _disk_error(self, error: OSError) -> UserError:
        return UserError(
            f"can't write: {error.strerror or error}",
            where=str(self.path),
            mend="free or remount the disk, then start again: it resumes from the last checkpoint",
        )


class TensorBoardLog:
    """One event a step, which holds all of that step's scalars, in a new file for each start.

    Per-source scalars (4 S of them) come every `source_interval` steps; all else every `interval`.
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
        spread = math.ceil(len(SOURCE_TAGS) * len(sources) / SOURCE_SCALARS_PER_STEP)
        self.source_interval = interval * max(1, spread)
        self._global_batch_size = global_batch_size
        self._resume_step = resume_step
        self._validation_tags = [f"lm loss validation-{name}" for name in validation]
        self._source_tags = {
            field: [f"{prefix}/{name}" for name in sources] for prefix, field in SOURCE_TAGS.items()
        }
        self._last_without_sources: Mapping[str, Any] | None = None
        self._file = EventFile(directory)
        # What SummaryWriter's purge_step writes: readers drop the events of this step and later.
        start = SessionLog(status=SessionLog.START)
        self._file.write([Event(step=resume_step + 1, session_log=start)])

    def log(self, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        if step % self.interval:
            return
        scalars = [*self._step_scalars(record)]
        if step % self.source_interval == 0:
            scalars += self._source_scalars(record)
            self._last_without_sources = None
        else:
            self._last_without_sources = record
        samples = step * self._global_batch_size
        self._file.write([_event(step, scalars), _event(samples, _pick(record, SAMPLES_TAGS))])

    def log_samples_again(self, record: Mapping[str, Any]) -> None:
        """Repeats a kept step's ` vs samples` twins after a resume.

        They are filed under the samples consumed, so the purge by step wipes those of earlier
        steps too.
        """
        samples = int(record["step"]) * self._global_batch_size
        if samples > self._resume_step and int(record["step"]) % self.interval == 0:
            self._file.write([_event(samples, _pick(record, SAMPLES_TAGS))])

    def close(self) -> None:
        record = self._last_without_sources
        if record is not None:
            self._file.write([_event(int(record["step"]), self._source_scalars(record))])
        self._file.close()

    def _step_scalars(self, record: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
        yield "batch-size", self._global_batch_size
        yield from _pick(record, MEGATRON_TAGS)
        yield from _pick(record, BILEVEL_TAGS)
        yield from zip(self._validation_tags, record.get("validation_losses") or (), strict=False)
        for field in ("rank", "ratio") if record.get("straggler") else ():
            yield f"straggler/{field}", record["straggler"][field]
        for phase, seconds in (record.get("time_s") or {}).items():
            yield f"time/{phase}", seconds

    def _source_scalars(self, record: Mapping[str, Any]) -> list[tuple[str, float | None]]:
        return [
            scalar
            for field, tags in self._source_tags.items()
            for scalar in zip(tags, record.get(field) or (), strict=False)
        ]


def _event(step: int, scalars: Sequence[tuple[str, float | None]]) -> Event:
    values = [
        Summary.Value(tag=tag, simple_value=value)
        for tag, value in scalars
        if value is not None and math.isfinite(value)
    ]
    return Event(wall_time=time.time(), step=step, summary=Summary(value=values))


def _pick(record: Mapping[str, Any], tags: Mapping[str, str]) -> list[tuple[str, float | None]]:
    return [(tag, record.get(field)) for tag, field in tags.items()]


def encode_record(record: Mapping[str, Any]) -> bytes:
    """One line of JSON, newline included; NaN and Inf as null."""
    fields = (f"{json.dumps(key)}:{_encode(value)}" for key, value in record.items())
    return ("{" + ",".join(fields) + "}\n").encode()


def _encode(value: Any) -> str:
    if isinstance(value, float):
        return float.__repr__(value) if math.isfinite(value) else "null"  # numpy has its own repr
    if isinstance(value, (list, tuple)):
        # Nine digits are quicker to write than repr's 17, and halve the file of 1,000 sources.
        items = [
            f"{item:.9g}" if type(item) is float and math.isfinite(item) else _encode(item)
            for item in value
        ]
        return "[" + ",".join(items) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{json.dumps(k)}:{_encode(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The readable steps of a metrics file, in order; torn or foreign lines are passed over."""
    with open(path, "rb") as file:
        for line in file:
            record = decode_record(line)
            if record is not None:
                yield record


def decode_record(line: bytes) -> dict[str, Any] | None:
    """The step that a line of `metrics.jsonl` holds, or None if it is torn or no step."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError among them
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return record if type(step) is int and 0 < step < 2**53 else None


def truncate_metrics(path: Path, last_step: int) -> None:
    """Keeps the readable lines of steps <= last_step; the old file stays until the new is whole."""
    if last_step == 0 or not path.exists():
        path.unlink(missing_ok=True)
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(path, "rb") as old, open(temporary, "wb") as new:
        for line in old:
            record = decode_record(line)
            if record is not None and record["step"] <= last_step:
                new.write(line.rstrip(b"\n") + b"\n")
        new.flush()
        os.fsync(new.fileno())
    temporary.replace(path)
