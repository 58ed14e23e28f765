"""metrics.jsonl as arrays over steps, read for the report."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_scalebio.errors import UserError
from megatron_scalebio.logs.records import decode_record
from megatron_scalebio.logs.source_table import LISTED_SOURCES, TABLE_FILE, read_table

STEP_FIELDS = (
    "alpha", "lr_w", "lr_u", "lr_lambda", "validation_loss", "train_loss_w", "train_loss_u",
    "grad_norm_w", "grad_norm_u", "grad_norm_lambda", "tokens", "tokens_per_second",
    "step_time_s", "memory_bytes",
)  # fmt: skip
SOURCE_FIELDS = ("weights", "loss_w", "excess_loss")
ROWS_READ = 300  # of sources.npy: a chart has no more points across


@dataclass
class History:
    """The steps of metrics.jsonl as arrays over T steps; NaN where a value is missing."""

    steps: NDArray[np.int64]
    scalars: dict[str, NDArray[np.float64]]  # STEP_FIELDS, each (T,)
    source_steps: NDArray[np.int64]  # the steps of per_source: all, or with many sources few (R)
    per_source: dict[str, NDArray[np.float64]]  # SOURCE_FIELDS, each (R, S)
    validation: NDArray[np.float64]  # (T, V)
    phases: dict[str, NDArray[np.float64]]  # seconds by phase, each (T,)
    skipped: list[tuple[int, str]]  # step and reason


def read_history(
    path: Path, sources: list[str], validation: list[str], notices: list[str]
) -> History:
    """Reads metrics.jsonl; a step that appears again replaces what came after it.

    Args:
        sources, validation: gain names, "source 0" ..., where the run names none.
        notices: gains a sentence for a missing file and for torn lines.
    """
    place = path.with_name(TABLE_FILE)
    table = read_table(place) if len(sources) > LISTED_SOURCES else None
    listed = len(sources) if table is None else 0
    rows: list[_Row] = []
    torn: list[int] = []
    if not path.exists():
        notices.append(f"There is no {path.name} yet: no step has been recorded.")
    else:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                record = decode_record(line)
                if record is None:
                    torn.append(number)
                    continue
                _invent_names(sources, "source", record.get("weights"))
                _invent_names(validation, "validation set", record.get("validation_losses"))
                listed = listed or (len(sources) if table is None else 0)
                row = _Row(record, listed, len(validation), f"{path}:{number}")
                while rows and rows[-1].step >= row.step:
                    rows.pop()
                rows.append(row)
    if torn:
        lines = ", ".join(map(str, torn[:5])) + (", …" if len(torn) > 5 else "")
        notices.append(
            f"{path.name}: {len(torn)} unreadable line(s) left out (line {lines}), as a run that "
            "is killed while it writes leaves behind; resuming drops them."
        )
    history = _stack(rows, listed, len(validation))
    if table is not None:
        _take_table(history, table, len(sources), str(place))
    return history


def _take_table(history: History, table: NDArray[Any], sources: int, where: str) -> None:
    """Puts the rows of `sources.npy` in place of the lists that the lines lack."""
    every = table[:: math.ceil(len(table) / ROWS_READ)]
    rows = np.concatenate([every, table[-1:]]) if every[-1]["step"] < table[-1]["step"] else every
    history.source_steps = rows["step"].astype(np.int64)
    for name in SOURCE_FIELDS:
        if name not in (rows.dtype.names or ()):
            history.per_source[name] = np.full((len(rows), sources), math.nan)
        elif rows[name].shape[1:] != (sources,):
            raise UserError(
                f"{where}: has {rows[name].shape[-1]} sources, but run.json names {sources} (take "
                "both files from the same run)"
            )
        else:
            history.per_source[name] = rows[name].astype(np.float64)


def _invent_names(names: list[str], kind: str, values: Any) -> None:
    if not names and isinstance(values, list):
        names.extend(f"{kind} {i}" for i in range(len(values)))


class _Row:
    """One step of metrics.jsonl, checked."""

    def __init__(self, record: dict[str, Any], sources: int, validation: int, where: str) -> None:
        self.step = int(record["step"])
        self.scalars = np.array([_number(record.get(name)) for name in STEP_FIELDS])
        self.per_source = [
            _vector(record.get(name), sources, where, name) for name in SOURCE_FIELDS
        ]
        self.validation = _vector(
            record.get("validation_losses"), validation, where, "validation_losses"
        )
        phases = record.get("time_s")
        self.phases = {
            str(phase): _number(seconds)
            for phase, seconds in (phases.items() if isinstance(phases, dict) else ())
        }
        skipped = record.get("skipped")
        self.skipped = str(skipped) if skipped else None


def _stack(rows: list[_Row], sources: int, validation: int) -> History:
    count = len(rows)
    scalars = np.array([row.scalars for row in rows]).reshape(count, len(STEP_FIELDS))
    phases = list(dict.fromkeys(phase for row in rows for phase in row.phases))
    steps = np.array([row.step for row in rows], np.int64)
    return History(
        steps=steps,
        source_steps=steps,
        scalars={name: scalars[:, i] for i, name in enumerate(STEP_FIELDS)},
        per_source={
            name: np.array([row.per_source[i] for row in rows]).reshape(count, sources)
            for i, name in enumerate(SOURCE_FIELDS)
        },
        validation=np.array([row.validation for row in rows]).reshape(count, validation),
        phases={
            phase: np.array([row.phases.get(phase, math.nan) for row in rows]) for phase in phases
        },
        skipped=[(row.step, row.skipped) for row in rows if row.skipped],
    )


def _number(value: Any) -> float:
    """The number, or NaN for null, text and what else JSON may hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _vector(value: Any, length: int, where: str, name: str) -> NDArray[np.float64]:
    if value is None:
        return np.full(length, math.nan)
    if not isinstance(value, list) or len(value) != length:
        found = f"{len(value)} entries" if isinstance(value, list) else "no list"
        raise UserError(
            f"{where}: {name!r} has {found}, but run.json names {length} (take both files from the "
            "same run)"
        )
    return np.array([_number(item) for item in value])


def number_or_none(value: Any) -> float | None:
    """A finite number of a JSON or YAML file, or None for anything else."""
    number = _number(value)
    return None if math.isnan(number) else number
