"""Streams the rows of Parquet, Arrow, CSV and TSV files as records; see `data.records`."""

import csv
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_scalebio.data.examples import RecordError
from megatron_scalebio.data.records import FIX_UTF8, OnBad, Record, Records, readable
from megatron_scalebio.errors import UserError

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow", ".csv", ".tsv")
_ROWS = 1024


def bare_suffix(path: Path) -> str:
    """The suffix that tells the kind of a file, in lower case and without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


class ArrowRows:
    """The rows of a Parquet file, or of an Arrow file as `datasets` saves them."""

    def __init__(self, path: Path, on_bad: OnBad | None = None, shown: Path | None = None) -> None:
        self.path, self.shown = path, shown or path
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Record]:
        import pyarrow

        size, number = self.path.stat().st_size, 0
        try:
            for batch, share in self._batches():
                self.bytes_read = int(share * size)
                for row in batch.to_pylist():
                    number += 1
                    yield Record(number, _without_nulls(row))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
            if isinstance(error, FileNotFoundError | PermissionError):
                problem = error.strerror or "cannot be read"
            else:
                problem = f"is damaged, or of another kind than its name says: {error}"
            raise UserError(f"{self.shown}: {problem} (get the file again)") from error
        self.bytes_read = size

    def _batches(self) -> Iterator[tuple[Any, float]]:
        """Batches of rows, with the share of the file that has been read."""
        import pyarrow
        import pyarrow.parquet

        if bare_suffix(self.path) == ".parquet":
            with pyarrow.parquet.ParquetFile(self.path) as file:
                rows, done = max(1, file.metadata.num_rows), 0
                for batch in file.iter_batches(_ROWS):
                    done += batch.num_rows
                    yield batch, done / rows
            return
        with pyarrow.memory_map(str(self.path)) as source:
            size = max(1, source.size())
            try:
                for batch in pyarrow.ipc.open_stream(source):
                    yield from self._cut(batch, source.tell() / size)
                return
            except pyarrow.ArrowInvalid:
                source.seek(0)
            file = pyarrow.ipc.open_file(source)
            for number in range(file.num_record_batches):
                yield from self._cut(file.get_batch(number), number / file.num_record_batches)

    @staticmethod
    def _cut(batch: Any, share: float) -> Iterator[tuple[Any, float]]:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS), share


def _without_nulls(value: Any) -> Any:
    """Columns of structs hold every key of every row, as null where a row has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


class DelimitedRows:
    """The rows of a CSV or TSV file whose first line names the columns; every value is text."""

    def __init__(self, path: Path, on_bad: OnBad | None = None, shown: Path | None = None) -> None:
        self.path, self.shown = path, shown or path
        self.bytes_read = 0
        self._on_bad = on_bad

    def __iter__(self) -> Iterator[Record]:
        csv.field_size_limit(sys.maxsize)
        with readable(self.path, self.shown) as (file, position):
            text = io.TextIOWrapper(file, "utf-8-sig", newline="")
            delimiter = "\t" if bare_suffix(self.path) == ".tsv" else ","
            rows = csv.DictReader(text, delimiter=delimiter, strict=True)
            line = 1
            try:
                for row in rows:
                    first, line = line + 1, rows.line_num
                    self.bytes_read = position()
                    if None in row or None in row.values():
                        error = self._error(first, "has another number of cells than the header")
                        if self._on_bad is None:
                            raise error
                        self._on_bad(first, error)
                        continue
                    yield Record(first, row)
            except csv.Error as error:
                raise self._error(line + 1, f"is not CSV: {error}") from error
            except UnicodeDecodeError as error:
                raise self._error(line + 1, f"not UTF-8 ({error.reason})", FIX_UTF8) from error

    def _error(self, line: int, message: str, fix: str = "mend the line") -> RecordError:
        return RecordError(message, reason="malformed", where=f"{self.shown}:{line}", fix=fix)


TABLES: dict[str, Callable[[Path, Any, Path | None], Records]] = {
    ".parquet": ArrowRows,
    ".arrow": ArrowRows,
    ".csv": DelimitedRows,
    ".tsv": DelimitedRows,
}
