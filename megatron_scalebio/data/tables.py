"""Streams the rows of Parquet, Arrow, CSV and TSV files as records; see `data.records`."""

import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_scalebio.data.examples import RecordError
from megatron_scalebio.data.records import FIX_UTF8, OnBad, Record, Records, readable
from megatron_scalebio.errors import UserError

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TABLE_SUFFIXES = (".parquet", ".arrow", ".csv", ".tsv")
_ROWS = 1024
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


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
                if number == 0:
                    _refuse_twice(batch.schema, self.shown)
                self.bytes_read = int(share * size)
                batch.validate(full=True)  # a damaged one would end the process
                for row in self._rows(batch):
                    number += 1
                    yield Record(number, _without_nulls(row))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, FileNotFoundError | PermissionError):
                problem = error.strerror or "cannot be read"
            else:
                said = " ".join(str(error).split())
                problem = f"is damaged, or of another kind than its name says: {said}"
            raise UserError(f"{self.shown}: {problem} (get the file again)") from error
        self.bytes_read = size

    def _rows(self, batch: Any) -> list[dict[str, Any]]:
        try:
            return batch.to_pylist()
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.shown}: holds a value that Python cannot take: {error} (write its column "
                "as text, or leave it out)"
            ) from error

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
                stream = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                source.seek(0)
            else:
                for batch in stream:
                    yield from self._cut(batch, source.tell() / size)
                self._check_end(source)
                return
            file = pyarrow.ipc.open_file(source)
            for number in range(file.num_record_batches):
                yield from self._cut(file.get_batch(number), number / file.num_record_batches)

    @staticmethod
    def _check_end(source: Any) -> None:
        """Raises ArrowInvalid unless a stream that has been read ended by its mark, and there.

        A stream cut between two batches reads like a whole one. (Before Arrow 0.15, the mark and
        every message began without the four bytes.)
        """
        import pyarrow

        end = source.tell()
        if end != source.size():
            raise pyarrow.ArrowInvalid("something stands behind its end")
        source.seek(0)
        first = source.read(4)
        source.seek(max(0, end - len(_END_OF_STREAM)))
        if first == _END_OF_STREAM[:4] and source.read() != _END_OF_STREAM:
            raise pyarrow.ArrowInvalid("it was cut off, since its end is not marked")

    @staticmethod
    def _cut(batch: Any, share: float) -> Iterator[tuple[Any, float]]:
        for start in range(0, batch.num_rows, _ROWS):
            yield batch.slice(start, _ROWS), share


def _refuse_twice(columns: Iterable[Any], shown: Path) -> None:
    """Refuses two columns, or two fields of a struct, of one name: one of them would be lost."""
    import pyarrow

    fields = list(columns)
    names = [field.name for field in fields]
    if twice := [name for name in names if names.count(name) > 1]:
        raise _twice(twice[0], shown)
    for kind in [field.type for field in fields]:
        while pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
            kind = kind.value_type
        if pyarrow.types.is_struct(kind):
            _refuse_twice(kind, shown)


def _twice(name: str, shown: Path) -> UserError:
    return UserError(f"{shown}: the column {name!r} stands twice (give one another name)")


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
                names = list(rows.fieldnames or ())
                if twice := [name for name in names if names.count(name) > 1]:
                    raise _twice(twice[0], self.shown)
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
