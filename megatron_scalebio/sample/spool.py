"""Encoded rows of a sample, kept on disk until the order in which they are written is known."""

import json
import math
from array import array
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_scalebio.sample.rows import Row

SOURCE_FIELD = "sampled_from"


class Stored(NamedTuple):
    """A row as it is written: its JSONL line (empty for token ids alone) and its examples."""

    line: bytes
    tokens: np.ndarray
    mask: np.ndarray
    lengths: list[int]


class Spool:
    """A file of encoded rows with an index. Memory: about 150 bytes a row.

    line | tokens, int32 | mask, uint8 | lengths, int32     one behind the other for every row
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "w+b")  # noqa: SIM115  `close` closes it
        self._entry: dict[tuple[int, int], int] = {}
        self._start, self._line_bytes = array("q"), array("q")
        self._tokens, self._pieces = array("q"), array("q")
        self._end = 0
        self.rows: Counter[int] = Counter()  # of each source

    def close(self) -> None:
        self._file.close()

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._entry

    def add(self, source: int, name: str, row: Row) -> None:
        """Keeps a row of a source, under (source, row number)."""
        line = b"" if row.record is None else json_line({**row.record, SOURCE_FIELD: name})
        self._entry[source, row.number] = len(self._start)
        self.rows[source] += 1
        for column, value in (
            (self._start, self._end),
            (self._line_bytes, len(line)),
            (self._tokens, len(row.tokens)),
            (self._pieces, len(row.lengths)),
        ):
            column.append(value)
        lengths = np.asarray(row.lengths, np.int32)
        stored = b"".join([line, row.tokens.tobytes(), row.mask.tobytes(), lengths.tobytes()])
        self._file.write(stored)
        self._end += len(stored)

    def pieces(self, source: int, number: int) -> int:
        """Examples that the row became."""
        return self._pieces[self._entry[source, number]]

    def get(self, source: int, number: int) -> Stored:
        entry = self._entry[source, number]
        size, tokens, pieces = self._line_bytes[entry], self._tokens[entry], self._pieces[entry]
        self._file.seek(self._start[entry])
        stored = self._file.read(size + 5 * tokens + 4 * pieces)
        at = size + 4 * tokens
        return Stored(
            stored[:size],
            np.frombuffer(stored[size:at], np.int32),
            np.frombuffer(stored[at : at + tokens], np.uint8),
            np.frombuffer(stored[at + tokens :], np.int32).tolist(),
        )


def json_line(record: dict[str, Any]) -> bytes:
    """A JSONL line; a record with half a surrogate pair, which UTF-8 cannot hold, is escaped.

    What JSON does not know (a date of a Parquet file, NaN) is written as text.
    """
    try:
        text = json.dumps(record, ensure_ascii=False, default=str, allow_nan=False)
    except ValueError:
        record = _with_text_for_nan(record)
        text = json.dumps(record, ensure_ascii=False, default=str, allow_nan=False)
    try:
        return (text + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(record, default=str) + "\n").encode()


def _with_text_for_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_text_for_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_text_for_nan(item) for item in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value
