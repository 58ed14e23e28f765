"""Streams the records of a JSON array file or of JSONL (one object a line) in constant memory."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from megatron_scalebio.errors import UserError

_READ_CHARS = 1 << 20
# A decoding error this close to the end of the buffer may only mean that more has to be read
# (the longest JSON literal, "-Infinity", has nine characters).
_CUT_MARGIN_CHARS = 9


class Record(NamedTuple):
    """One JSON object of a file, with the line (from 1) on which it starts."""

    line: int
    value: dict[str, Any]


class RecordReader:
    """Iterates over the records of one JSON or JSONL file in constant memory.

    ``bytes_read`` follows the iteration, for progress. Malformed content raises
    :class:`UserError` with file and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Record]:
        try:
            first = self._first_character()
            if first == b"[":
                yield from self._array()
            elif first:
                yield from self._lines()
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise UserError(f"{self.path}: cannot read the file: {error.strerror}") from error

    def _first_character(self) -> bytes:
        with open(self.path, "rb") as file:
            head = file.read(len(codecs.BOM_UTF8))
            head = b"" if head == codecs.BOM_UTF8 else head
            while True:
                if head.lstrip():
                    return head.lstrip()[:1]
                head = file.read(4096)
                if not head:
                    return b""

    def _lines(self) -> Iterator[Record]:
        with open(self.path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                self.bytes_read += len(raw)
                try:
                    text = raw.decode("utf-8-sig" if line == 1 else "utf-8")
                    if not text.strip():
                        continue
                    value = json.loads(text)
                except UnicodeDecodeError as error:
                    raise self._error(line, f"not UTF-8 ({error.reason})") from error
                except json.JSONDecodeError as error:
                    raise self._error(line, f"malformed JSON ({error.msg})") from error
                except RecursionError as error:
                    raise self._error(line, "malformed JSON (nested too deeply)") from error
                if not isinstance(value, dict):
                    raise self._error(line, "not a JSON object")
                yield Record(line, value)

    def _array(self) -> Iterator[Record]:
        with open(self.path, "rb") as file:
            buffer = _ArrayBuffer(self, file)
            buffer.expect("[", "expecting '['")
            separated = False
            while separated or buffer.peek() != "]":
                yield buffer.next_object()
                separated = buffer.peek() == ","
                if separated:
                    buffer.expect(",", "expecting ','")
                elif buffer.peek() != "]":
                    buffer.expect("]", "expecting ',' or ']' after an object")
            buffer.expect("]", "expecting ']'")
            if buffer.peek():
                raise self._error(buffer.line, "malformed JSON (text after the end of the array)")

    def _error(self, line: int, message: str) -> UserError:
        return UserError(
            f"{self.path}:{line}: {message} (a file is one JSON array of objects, or JSONL: one "
            "object a line)"
        )


class _ArrayBuffer:
    """The unread part of a JSON array file: a window that grows only to hold one object."""

    def __init__(self, reader: RecordReader, file: BinaryIO) -> None:
        self._reader = reader
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._scan = json.JSONDecoder().raw_decode
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
        wanted = _READ_CHARS
        while True:
            try:
                value, end = self._scan(self._text, self._at)
                break
            except json.JSONDecodeError as error:
                line = self.line + self._text.count("\n", self._at, error.pos)
                if not self._is_cut(error) or not self._fill(wanted):
                    raise self._reader._error(line, f"malformed JSON ({error.msg})") from error
                wanted *= 2  # so that one huge object is not scanned again for every block
            except RecursionError as error:
                message = "malformed JSON (nested too deeply)"
                raise self._reader._error(self.line, message) from error
        record = Record(self.line, value)
        self.line += self._text.count("\n", self._at, end)
        self._at = end
        # Exact for ASCII, near enough for a progress bar otherwise.
        self._reader.bytes_read = max(0, self._file.tell() - (len(self._text) - end))
        return record

    def _is_cut(self, error: json.JSONDecodeError) -> bool:
        if self._ended:
            return False
        in_string = error.msg.startswith("Unterminated string")
        return in_string or error.pos >= len(self._text) - _CUT_MARGIN_CHARS

    def _fill(self, wanted: int) -> bool:
        """Drops what was consumed and appends about ``wanted`` bytes; false at the end."""
        if self._ended:
            return False
        raw = self._file.read(wanted)
        self._ended = not raw
        self._text = self._text[self._at :]
        self._at = 0
        try:
            self._text += self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            line = self.line + self._text.count("\n") + raw[: error.start].count(b"\n")
            raise self._reader._error(line, f"not UTF-8 ({error.reason})") from error
        return not self._ended
