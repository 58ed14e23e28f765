"""The rows of a source that a sample can take: here the raw records of JSON and JSONL files.

Rows are read in two ways: `scan` looks once at every row and marks what repeats an evaluation
example; `fetch` encodes chosen rows, in ascending order. Neither holds more than a row at a time.
`sample.documents` does the same for token ids.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_scalebio.data.dialogue import ExampleEncoder
from megatron_scalebio.data.encode_pool import Batch, EncodePool
from megatron_scalebio.data.formats import detect_format, parse_record
from megatron_scalebio.data.prepare import Progress
from megatron_scalebio.data.records import Record, RecordReader
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.errors import UserError
from megatron_scalebio.sample.contamination import (
    KINDS,
    EvaluationIndex,
    WordIds,
    any_texts,
    prompt_text,
    whole_text,
)

Ints = npt.NDArray[np.int64]
Statuses = npt.NDArray[np.uint8]
OnProgress = Callable[[Progress], None]

# What a row is: usable, or why not. Rows that give no example are only found when encoded.
STATUSES = ("usable", *KINDS, "empty", "no_target", "too_long", "not_selected")
CODES = {reason: code for code, reason in enumerate(STATUSES)}
REPORT_ROWS = 4096


class Row(NamedTuple):
    """One row as the training examples that it becomes.

    record: its JSON object; None where only token ids are known.
    tokens: int32 [sum(lengths)]; mask: uint8 of the same shape; lengths: of its examples.
    status: an index of ``STATUSES``; not 0 where it becomes no example.
    """

    number: int
    record: dict[str, Any] | None
    tokens: np.ndarray
    mask: np.ndarray
    lengths: list[int]
    status: int
    truncated: int


class RawRows:
    """The records of JSON and JSONL files, numbered from 0 over all files.

    Args:
        pool: encodes what is fetched; None: nothing will be.
        encoder: that of sources which are token ids: an evaluation set is compared as it would read
            decoded too, with the words of the chat template.
    """

    def __init__(
        self,
        name: str,
        files: tuple[Path, ...],
        format: str,
        text_key: str,
        pool: EncodePool | None,
        encoder: ExampleEncoder | None = None,
    ) -> None:
        self.name, self.files = name, files
        self.rows_in_file: list[int] = []
        self.formats: dict[str, None] = {}
        self._format, self._text_key, self._pool = format, text_key, pool
        self._encoder = encoder

    def scan(self, index: EvaluationIndex, words: WordIds, on_progress: OnProgress) -> Statuses:
        """Counts the rows of every file and marks those that repeat an evaluation example."""
        statuses = array("B")
        total = sum(file.stat().st_size for file in self.files)
        before = 0
        for file in self.files:
            rows_before, reader = len(statuses), RecordReader(file)
            for format_name, record in self._records(reader):
                kind = None
                if index.examples:
                    kind = index.kind(*words.of(*self._texts(file, format_name, record)))
                statuses.append(CODES[kind] if kind else 0)
                if len(statuses) % REPORT_ROWS == 0:
                    done = before + reader.bytes_read
                    on_progress(Progress(self.name, done, total, len(statuses)))
            before += reader.bytes_read
            self.rows_in_file.append(len(statuses) - rows_before)
        on_progress(Progress(self.name, total, total, len(statuses), finished=True))
        return np.frombuffer(statuses, np.uint8).copy()

    def index_all(self, index: EvaluationIndex, words: WordIds) -> None:
        """Adds every row to the index: this is an evaluation set."""
        for file in self.files:
            count = 0
            for record in RecordReader(file):
                texts, *decoded = self._evaluation_forms(file, record)
                index.add(*words.learn(*texts))
                for form in decoded:
                    index.add_form(*words.learn(*form))
                count += 1
            self.rows_in_file.append(count)

    def fetch(self, wanted: Ints) -> Iterator[Row]:
        """Encodes the wanted rows (ascending, each once); needs an earlier :meth:`scan`."""
        return self._encode(self._wanted(wanted))

    def head(self, count: int) -> Iterator[Row]:
        """Encodes the first rows of the first file; needs no scan."""
        reader = RecordReader(self.files[0])
        return self._encode(
            (number, Batch(str(reader.path), format_name, [record], 0))
            for number, (format_name, record) in enumerate(islice(self._records(reader), count))
        )

    def _wanted(self, wanted: Ints) -> Iterator[tuple[int, Batch]]:
        first = 0
        for file, count in zip(self.files, self.rows_in_file, strict=True):
            inside = wanted[(wanted >= first) & (wanted < first + count)] - first
            for number, (format_name, record) in _pick(self._records(RecordReader(file)), inside):
                yield first + number, Batch(str(file), format_name, [record], 0)
            first += count

    def _encode(self, numbered: Iterator[tuple[int, Batch]]) -> Iterator[Row]:
        assert self._pool is not None
        under_way: deque[int] = deque()

        def batches() -> Iterator[Batch]:
            for number, batch in numbered:
                under_way.append(number)
                yield batch

        for batch, encoded in self._pool.map(batches()):
            self.formats[batch.format] = None
            reasons = [CODES[reason] for reason, count in encoded.dropped.items() if count]
            yield Row(
                under_way.popleft(),
                batch.records[0].value,
                encoded.tokens,
                encoded.mask,
                encoded.lengths,
                reasons[0] if reasons else 0,
                encoded.truncated,
            )

    def examples_per_row(self) -> float | None:
        return None  # not known before some are encoded

    def _records(self, reader: RecordReader) -> Iterator[tuple[str, Record]]:
        """The records of a file with their format; ``auto`` goes by the first, as in prepare."""
        format_name = self._format
        for record in reader:
            if format_name == "auto":
                where = f"{reader.path}:{record.line}"
                format_name = detect_format(record.value, where, self._text_key)
            yield format_name, record

    def _evaluation_forms(self, file: Path, record: Record) -> list[tuple[str, str]]:
        """The texts of a record, which may be in a format of a benchmark's own; also decoded."""
        try:
            format_name = detect_format(record.value, "", self._text_key)
        except UserError:
            return [any_texts(record.value)]
        forms = [self._texts(file, format_name, record)]
        if self._encoder is not None:
            where = f"{file}:{record.line}"
            example = parse_record(record.value, format_name, where, self._text_key)
            try:
                ids, mask = self._encoder.encode(example, where)
            except UserError:
                return forms  # of what the chat template refuses there are no prepared rows
            forms.append(decoded_texts(np.array(ids), np.array(mask), self._encoder.tokenizer))
        return forms

    def _texts(self, file: Path, format_name: str, record: Record) -> tuple[str, str]:
        where = f"{file}:{record.line}"
        example = parse_record(record.value, format_name, where, self._text_key)
        return whole_text(example), prompt_text(example)


def decoded_texts(tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer) -> tuple[str, str]:
    """The text of token ids, and that of their prompt."""
    prompt = tokens[: prompt_length(mask)]
    return tokenizer.decode(tokens.tolist()), tokenizer.decode(prompt.tolist())


def prompt_length(mask: np.ndarray) -> int:
    """How many tokens precede the first target; 0 for plain text, with one behind its first."""
    targets = np.flatnonzero(mask)
    return int(targets[0]) if len(targets) and targets[0] > 1 else 0


def _pick(
    records: Iterator[tuple[str, Record]], wanted: Ints
) -> Iterator[tuple[int, tuple[str, Record]]]:
    """The wanted of a stream of records (ascending, from 0), without reading on behind the last."""
    at = -1
    for number in wanted.tolist():
        for found in records:
            at += 1
            if at == number:
                yield number, found
                break
