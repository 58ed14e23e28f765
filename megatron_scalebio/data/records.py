"""Streams the records of a JSON array file or of JSONL (one object a line) in constant memory.

`data.tables` does the same for Parquet, Arrow, CSV and TSV; `data.files` chooses.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from megatron_scalebio.data.examples import RecordError
from megatron_scalebio.errors import UserError

_READ_CHARS = 1 << 20
# A decoding error this close to the end of the buffer may only mean that more has to be read
# (the longest JSON literal, "-Infinity", has nine characters).
_CUT_MARGIN_CHARS = 9


_FIX = 'a file is one JSON array of objects, or JSONL: one object a line, such as {"text": "..."}'
FIX_UTF8 = "convert it, as by iconv -f latin1 -t utf-8"


class Spelled(float):
    """A number with a point or exponent, and how it was written: 1.10 is not 1.1 in a prompt."""

    __slots__ = ("spelling",)
    spelling: str

    def __new__(cls, spelling: str) -> "Spelled":
        number = float.__new__(cls, spelling)
        number.spelling = spelling
        return number

    def __reduce__(self) -> tuple[type["Spelled"], tuple[str]]:
        return Spelled, (self.spelling,)


class _TwiceError(ValueError):
    """A field that stands twice in an object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in value if names.count(name) > 1)
        raise _TwiceError(f"the field {twice!r} stands twice in one object")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=Spelled)
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len)  # to step over what is at fault


class Record(NamedTuple):
    """One JSON object of a file, with the line (from 1) on which it starts."""

    line: int
    value: dict[str, Any]


OnBad = Callable[[int, RecordError], None]


class Records(Protocol):
    """The records of a file, one after the other; ``bytes_read`` follows, for progress."""

    bytes_read: int

    def __iter__(self) -> Iterator[Record]: ...


class RecordReader:
    """The records of one JSON or JSONL file, which may be compressed, in constant memory.

    Malformed content raises :class:`UserError` with file and line. In JSONL each line is a record
    of its own, so that a bad one may be left out (``on_bad``).
    """

    def __init__(self, path: Path, on_bad: OnBad | None = None, shown: Path | None = None) -> None:
        self.path, self.shown = path, shown or path
        self.bytes_read = 0
        self._on_bad = on_bad

    def __iter__(self) -> Iterator[Record]:
        with readable(self.path, self.shown) as (file, position):
            head = _first_bytes(file)
            if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
                yield from self._array(file, head, position)
            elif head:
                yield from self._lines(file, head, position)

    def _lines(self, file: BinaryIO, head: bytes, position: Callable[[], int]) -> Iterator[Record]:
        for line, raw in enumerate(_rejoined(head, file), start=1):
            self.bytes_read = position()
            try:
                yield Record(line, self._parsed(line, raw))
            except _NoRecord:
                continue
            except RecordError as error:
                if self._on_bad is None:
                    raise
                self._on_bad(line, error)

    def _parsed(self, line: int, raw: bytes) -> dict[str, Any]:
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
            if not text.strip():
                raise _NoRecord
            value = DECODER.decode(text)
        except UnicodeDecodeError as error:
            raise self._error(line, f"not UTF-8 ({error.reason})", FIX_UTF8) from error
        except json.JSONDecodeError as error:
            raise self._error(line, f"malformed JSON ({error.msg})") from error
        except RecursionError as error:
            raise self._error(line, "malformed JSON (nested too deeply)") from error
        except ValueError as error:
            raise self._error(line, _of_value(error)) from error
        if not isinstance(value, dict):
            raise self._error(line, "not a JSON object")
        return value

    def _array(self, file: BinaryIO, head: bytes, position: Callable[[], int]) -> Iterator[Record]:
        buffer = _ArrayBuffer(self, file, head, position)
        buffer.expect("[", "expecting '['")
        separated = False
        while separated or buffer.peek() != "]":
            try:
                yield buffer.next_object()
            except RecordError as error:
                line = buffer.line
                if self._on_bad is None or not buffer.steps_over():
                    raise
                self._on_bad(line, error)
            separated = buffer.peek() == ","
            if separated:
                buffer.expect(",", "expecting ','")
            elif buffer.peek() != "]":
                buffer.expect("]", "expecting ',' or ']' after an object")
        buffer.expect("]", "expecting ']'")
        if buffer.peek():
            raise self._error(buffer.line, "malformed JSON (text after the end of the array)")

    def _error(self, line: int, message: str, fix: str = _FIX) -> RecordError:
        return RecordError(message, reason="malformed", where=f"{self.shown}:{line}", fix=fix)


class _NoRecord(Exception):
    """A line without a record."""


def _of_value(error: ValueError) -> str:
    if isinstance(error, _TwiceError):
        return str(error)
    return "a number has more digits than Python reads (write it as text)"


class _Streams(io.RawIOBase):
    """What one or more compressed streams hold; `lzma.open` and `bz2.open` pass over damaged ones.

    Args:
        new: makes a decompressor of one stream.
        padding: what may stand between streams and behind them.
    """

    def __init__(self, file: BinaryIO, new: Callable[[], Any], padding: bytes = b"") -> None:
        self._file, self._new, self._padding = file, new, padding
        self._stream = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream.eof:
                if not (rest := self._rest()):
                    return 0
                self._stream = self._new()
            else:
                rest = self._file.read(_READ_CHARS) if self._stream.needs_input else b""
                if self._stream.needs_input and not rest:
                    raise EOFError("it ends within a stream")
            if plain := self._stream.decompress(rest, len(buffer)):
                buffer[: len(plain)] = plain
                return len(plain)

    def _rest(self) -> bytes:
        """What stands behind a stream, without padding; empty at the end of the file."""
        rest = self._stream.unused_data.lstrip(self._padding)
        while not rest and (block := self._file.read(_READ_CHARS)):
            rest = block.lstrip(self._padding)
        return rest


def _zstd(file: BinaryIO) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"))


def _of_streams(new: Callable[[], Any], padding: bytes = b"") -> Callable[[BinaryIO], Any]:
    return lambda file: io.BufferedReader(_Streams(file, new, padding), _READ_CHARS)


_READERS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ\x00": _of_streams(lzma.LZMADecompressor, b"\0"),
    b"BZh": _of_streams(bz2.BZ2Decompressor),
    b"\x28\xb5\x2f\xfd": _zstd,
    # Frames that a reader passes over, with which some writers begin.
    **{bytes([kind]) + b"\x2a\x4d\x18": _zstd for kind in range(0x50, 0x60)},
}


@contextmanager
def readable(path: Path, shown: Path) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A file's bytes, decompressed where they are compressed, and how far it has been read.

    Raises:
        UserError: it cannot be opened, or is compressed and damaged.
    """
    try:
        with open(path, "rb") as file:
            magic = file.peek(6)[:6]
            start = next((start for start in _READERS if magic.startswith(start)), None)
            if start is not None:
                with _READERS[start](file) as plain:
                    yield plain, file.tell
            else:
                yield file, file.tell
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(
            f"{shown}: cannot read the file: {error.strerror} (check the path)"
        ) from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk's, not the content's
        raise UserError(
            f"{shown}: the compressed file is damaged: {error} (get a whole one)"
        ) from error


def _first_bytes(file: BinaryIO) -> bytes:
    """The file's first bytes, up to one that is not white space; nothing if there is none."""
    head = b""
    while block := file.read(4096):
        head += block
        if head.removeprefix(codecs.BOM_UTF8).lstrip():
            return head
    return b""


def _rejoined(head: bytes, file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file of which ``head`` has been read."""
    *whole, cut = head.split(b"\n")
    yield from (line + b"\n" for line in whole)
    for line in file:
        yield cut + line
        cut = b""
    if cut:
        yield cut


class _ArrayBuffer:
    """The unread part of a JSON array file: a window that grows only to hold one object."""

    def __init__(
        self, reader: RecordReader, file: BinaryIO, head: bytes, position: Callable[[], int]
    ) -> None:
        self._reader = reader
        self._file, self._head, self._position = file, head, position
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._ended = False
        self.line = 1

    def expect(self, character: str, message: str) -> None:
        if self.peek() != character:
            raise self._reader._error(self.line, f"malformed JSON ({message})")
        self._at += 1

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self.line += self._text[self._at] == "\n"
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._fill(_READ_CHARS):
                return ""

    def next_object(self) -> Record:
        if self.peek() != "{":
            found = "end of file" if not self.peek() else f"found {self.peek()!r}"
            raise self._reader._error(self.line, f"expecting an object in the array, {found}")
        value, end = self._scanned(DECODER)
        record = Record(self.line, value)
        self._behind(end)
        return record

    def steps_over(self) -> bool:
        """Goes behind the next value, whatever it is; false if it is not even JSON."""
        try:
            self._behind(self._scanned(_LENIENT)[1])
        except RecordError:
            return False
        return True

    def _behind(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end
        # Exact for ASCII, near enough for a progress bar otherwise.
        self._reader.bytes_read = max(0, self._position() - (len(self._text) - end))

    def _scanned(self, decoder: json.JSONDecoder) -> tuple[Any, int]:
        """The value that begins here, and where it ends."""
        wanted = _READ_CHARS
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
                if isinstance(value, dict) or end < len(self._text) or self._ended:
                    return value, end
                self._fill(wanted)  # a number may go on there
            except json.JSONDecodeError as error:
                line = self.line + self._text.count("\n", self._at, error.pos)
                if not self._is_cut(error) or not self._fill(wanted):
                    raise self._reader._error(line, f"malformed JSON ({error.msg})") from error
                wanted *= 2  # so that one huge object is not scanned again for every block
            except RecursionError as error:
                message = "malformed JSON (nested too deeply)"
                raise self._reader._error(self.line, message) from error
            except ValueError as error:
                raise self._reader._error(self.line, _of_value(error)) from error

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        if self._ended:
            return False
        in_string = error.msg.startswith("Unterminated string")
        return in_string or error.pos >= len(self._text) - _CUT_MARGIN_CHARS

    def _fill(self, wanted: int) -> bool:
        """Drops what was consumed and appends about ``wanted`` bytes; false at the end."""
        if self._ended:
            return False
        raw, self._head = self._head or self._file.read(wanted), b""
        self._ended = not raw
        self._text = self._text[self._at :]
        self._at = 0
        try:
            self._text += self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n") + raw[: error.start].count(b"\n")
            raise self._reader._error(line, f"not UTF-8 ({error.reason})", FIX_UTF8) from error
        return not self._ended
