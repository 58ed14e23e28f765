"""`sources.npy`: what a run of many sources logs of each, in rows that come seldom.

    np.load("sources.npy", mmap_mode="r")["weights"]      [rows, S], by ["step"]

With few sources, `metrics.jsonl` has all of them in every step. With ten thousand that would be a
gigabyte in an hour, of values that mostly stand still: there a step's line has the heaviest.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_scalebio.logs.records import write_whole

TABLE_FILE = "sources.npy"
LISTED_SOURCES = 100  # a run of more has the table
_HEAVIEST = 20  # sources in a step's line
SOURCE_FIELDS = ("weights", "loss_w", "loss_u", "excess_loss")
_SOURCES_A_STEP = 500  # on average


class SourceTable:
    """Takes the per-source values out of records, and appends a row of them at intervals.

    A row has the weights of its step; losses are means over the steps since the row before, each
    source's over those that had it, and NaN for one that none had.

    Args:
        path: the file, which a resumed run goes on with.
        sources: how many (S).
        resume_step: last step of the rows to keep (0: start afresh).
    """

    def __init__(self, path: Path, sources: int, resume_step: int = 0) -> None:
        self.interval = math.ceil(sources / _SOURCES_A_STEP)
        self._path, self._sources, self._resume_step = path, sources, resume_step
        self._rows = 0
        self._file: Any = None
        self._last: tuple[int, npt.NDArray[np.float64] | None] | None = None
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._counts: dict[str, npt.NDArray[np.float64]] = {}
        if resume_step == 0:
            path.unlink(missing_ok=True)

    def take(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The record with its heaviest sources alone; writes a row where one is due."""
        held = {
            field: np.asarray(record[field], np.float64)
            for field in SOURCE_FIELDS
            if record.get(field) is not None
        }
        rest = {field: value for field, value in record.items() if field not in held}
        if not held:
            return rest
        weights_S = held.pop("weights", None)
        if self._file is None:
            self._open(["weights"] * (weights_S is not None) + list(held))
        for field, value_S in held.items():
            seen_S = np.isfinite(value_S)
            self._sums[field] += np.where(seen_S, value_S, 0.0)
            self._counts[field] += seen_S
        step = int(record["step"])
        self._last = step, weights_S
        if step % self.interval == 0:
            self._append()
        if weights_S is not None:
            top = heaviest(weights_S)
            values = {field: value_S[top].tolist() for field, value_S in held.items()}
            rest["heaviest"] = {
                "source": top.tolist(), "weights": weights_S[top].tolist(), **values
            }  # fmt: skip
        return rest

    def close(self) -> None:
        """Writes the row of the last step, if it has none yet."""
        if self._file is not None:
            if self._last is not None:
                self._append()
            self._file.close()

    def _open(self, fields: list[str]) -> None:
        shape = (self._sources,)
        self._dtype = np.dtype([("step", "<i8"), *((field, "<f4", shape) for field in fields)])
        losses = [field for field in fields if field != "weights"]
        self._sums = {field: np.zeros(self._sources) for field in losses}
        self._counts = {field: np.zeros(self._sources) for field in losses}
        kept = read_table(self._path)
        if kept is not None and kept.dtype == self._dtype:
            self._rows = int(np.searchsorted(kept["step"], self._resume_step, "right"))
        self._file = open(self._path, "r+b" if self._rows else "w+b", buffering=0)  # noqa: SIM115
        self._write_header()
        self._begin = self._file.tell()

    def _append(self) -> None:
        assert self._last is not None
        row = np.zeros(1, self._dtype)
        row["step"], weights_S = self._last
        if weights_S is not None:
            row["weights"] = weights_S
        for field, sum_S in self._sums.items():
            count_S = self._counts[field]
            nothing_S = np.full(self._sources, np.nan)
            row[field] = np.divide(sum_S, count_S, out=nothing_S, where=count_S > 0)
            sum_S[:], count_S[:] = 0.0, 0.0
        self._file.seek(self._begin + self._rows * self._dtype.itemsize)
        write_whole(self._file, row.tobytes())
        self._rows += 1
        # Last: until then, readers see the rows before.
        self._write_header()
        self._last = None

    def _write_header(self) -> None:
        """NumPy pads it, so that it keeps its length as the rows become more."""
        self._file.seek(0)
        described = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self._file, {**described, "shape": (self._rows,)})


def heaviest(weights_S: npt.NDArray[np.floating]) -> npt.NDArray[np.intp]:
    """The heaviest of many sources, in order."""
    top = np.argpartition(-weights_S, _HEAVIEST)[:_HEAVIEST]
    return top[np.argsort(-weights_S[top], kind="stable")]


def read_table(path: Path) -> npt.NDArray[Any] | None:
    """The rows of a table, as a map of the file; None if there are none."""
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    named = rows.dtype.names is not None and "step" in rows.dtype.names
    return rows if named and rows.ndim == 1 and len(rows) else None
