"""The rows of a source that a sample can take: here the raw records of JSON and JSONL files.

Rows are read in two ways: `scan` looks once at every row and marks what repeats an evaluation
example; `fetch` encodes chosen rows, in ascending order. Neither holds more than a row at a time.
`sample.documents` does the same for token ids.
"""

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_scalebio.data.dialogue import ExampleEncoder
from megatron_scalebio.data.encode_config import EncodeConfig
from megatron_scalebio.data.encode_pool import Batch, EncodePool
from megatron_scalebio.data.examples import RecordError
from megatron_scalebio.data.files import open_records
from megatron_scalebio.data.formats import detect_format, parse_record
from megatron_scalebio.data.prepare import DROPPED, Progress
from megatron_scalebio.data.record_fields import ALL_FIELDS, FORMATS
from megatron_scalebio.data.records import OnBad, Record, Records
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.mixture.sampler import Ints
from megatron_scalebio.sample.contamination import (
    KINDS,
    EvaluationIndex,
    WordIds,
    any_texts,
    prompt_text,
    whole_text,
)

Statuses = npt.NDArray[np.uint8]
OnProgress = Callable[[Progress], None]

# What a row is: usable, or why not. Rows that give no example are only found when encoded.
NO_EXAMPLE = (*DROPPED, "bad_record")
STATUSES = ("usable", *KINDS, *NO_EXAMPLE, "not_selected")
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
    """The records of files, numbered from 0 over all files.

    Args:
        config: how records are read.
        pool: encodes what is fetched; None: nothing will be.
        encoder: that of sources which are token ids: an evaluation set is compared as it would read
            decoded too, with the words of the chat template.
        date: what the chat template calls today; empty: as the pool's settings say.
    """

    def __init__(
        self,
        name: str,
        files: tuple[Path, ...],
        config: EncodeConfig,
        pool: EncodePool | None,
        encoder: ExampleEncoder | None = None,
        date: str = "",
    ) -> None:
        self.name, self.files = name, files
        self.rows_in_file: list[int] = []
        self.formats: dict[str, None] = {}
        self._config, self._pool, self._encoder, self._date = config, pool, encoder, date
        self._of_evaluation = replace(config, ignore_fields=(ALL_FIELDS,))

    def scan(self, index: EvaluationIndex, words: WordIds, on_progress: OnProgress) -> Statuses:
        """Counts the rows of every file and marks those that repeat an evaluation example."""
        statuses = array("B")
        total = sum(file.stat().st_size for file in self.files)
        before = 0
        for file in self.files:
            rows_before, reader = len(statuses), self._reader(file)
            for format_name, record in self._records(file, reader):
                statuses.append(self._status(file, format_name, record, index, words))
                if len(statuses) % REPORT_ROWS == 0:
                    done = before + reader.bytes_read
                    on_progress(Progress(self.name, done, total, len(statuses)))
            before += file.stat().st_size
            self.rows_in_file.append(len(statuses) - rows_before)
        on_progress(Progress(self.name, total, total, len(statuses), finished=True))
        return np.frombuffer(statuses, np.uint8).copy()

    def _status(
        self, file: Path, format_name: str, record: Record, index: EvaluationIndex, words: WordIds
    ) -> int:
        try:
            where = f"{file}:{record.line}"
            example = parse_record(record.value, format_name, where, self._config)
        except RecordError:
            if not self._config.skips_bad:
                raise
            return CODES["bad_record"]
        texts = whole_text(example), prompt_text(example)
        kind = index.kind(*words.of(*texts)) if index.examples else None
        return CODES[kind] if kind else 0

    def index_all(self, index: EvaluationIndex, words: WordIds) -> None:
        """Adds every row to the index: this is an evaluation set."""
        for file in self.files:
            count = 0
            for record in open_records(file):
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
        file = self.files[0]
        records = self._records(file, self._reader(file))
        return self._encode(
            (number, Batch(str(file), format_name, [record], 0, date=self._date))
            for number, (format_name, record) in enumerate(islice(records, count))
        )

    def _wanted(self, wanted: Ints) -> Iterator[tuple[int, Batch]]:
        first = 0
        for file, count in zip(self.files, self.rows_in_file, strict=True):
            inside = wanted[(wanted >= first) & (wanted < first + count)] - first
            for number, (format_name, record) in _pick(
                self._records(file, self._reader(file)), inside
            ):
                batch = Batch(str(file), format_name, [record], 0, date=self._date)
                yield first + number, batch
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
            reasons = [CODES.get(left.reason, CODES["bad_record"]) for left in encoded.left_out]
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

    def _reader(self, file: Path) -> Records:
        skip: OnBad | None = (lambda line, error: None) if self._config.skips_bad else None
        return open_records(file, skip)

    def _records(self, file: Path, reader: Records) -> Iterator[tuple[str, Record]]:
        """The records of a file with their format; ``auto`` goes by the first, as in prepare."""
        format_name = self._config.format
        for record in reader:
            if format_name == "auto":
                try:
                    where = f"{file}:{record.line}"
                    format_name = detect_format(record.value, where, self._config)
                except RecordError:
                    if not self._config.skips_bad:
                        raise
                    yield FORMATS[0], record  # which will be found at fault
                    continue
            yield format_name, record

    def _evaluation_forms(self, file: Path, record: Record) -> list[tuple[str, str]]:
        """The texts of a record, which may be in a format of a benchmark's own; also decoded."""
        where, options = f"{file}:{record.line}", self._of_evaluation
        try:
            format_name = detect_format(record.value, where, options)
            example = parse_record(record.value, format_name, where, options)
        except RecordError:
            return [any_texts(record.value)]
        forms = [(whole_text(example), prompt_text(example))]
        if self._encoder is not None:
            try:
                ids, mask = self._encoder.encode(example, where)
            except RecordError:
                return forms  # of what the chat template refuses there are no prepared rows
            forms.append(decoded_texts(np.array(ids), np.array(mask), self._encoder.tokenizer))
        return forms


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
