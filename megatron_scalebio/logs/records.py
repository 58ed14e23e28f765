"""The lines of `metrics.jsonl`: one JSON object a step."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

METRICS_FILE = "metrics.jsonl"


def write_whole(file: FileIO, data: bytes) -> None:
    """Writes to an unbuffered file, which takes less than all where the disk fills up."""
    if file.write(data) != len(data):
        raise OSError("the disk is full")


def encode_record(record: Mapping[str, Any]) -> bytes:
    """One line of JSON, newline included; NaN and Inf as null."""
    return f"{_encode(record)}\n".encode()


def _encode(value: Any) -> str:
    if isinstance(value, float):
        return float.__repr__(value) if math.isfinite(value) else "null"  # numpy has its own repr
    if isinstance(value, np.ndarray):
        value = value.tolist()
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
