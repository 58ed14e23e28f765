"""Files of records to prepared sources: read, tokenize in parallel, cut, write.

The parent reads records and writes examples; workers tokenize. Batches come back in the order in
which they were read, and cutting looks at one record alone, so the bytes written do not depend
on the number of workers. Only a few batches are in memory at any time.
"""

import datetime
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron_scalebio.config.checks import require_at_least
from megatron_scalebio.data.encode_config import EncodeConfig
from megatron_scalebio.data.encode_pool import (
    Batch,
    EncodedBatch,
    EncodePool,
    EncodeSettings,
    LeftOut,
)
from megatron_scalebio.data.examples import RecordError
from megatron_scalebio.data.files import open_records
from megatron_scalebio.data.formats import detect_format
from megatron_scalebio.data.inputs import STANDARD_INPUT, SourceInput, local_copies
from megatron_scalebio.data.load_tokenizer import load_tokenizer
from megatron_scalebio.data.records import OnBad, Record
from megatron_scalebio.data.source_writer import (
    SOURCE_FILE,
    TOKENIZER_FILE,
    SourceWriter,
    Staging,
    staging_error,
)
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.data.train_tokenizer import train_sentencepiece
from megatron_scalebio.errors import UserError
from megatron_scalebio.launcher import cores

DROPPED = ("no_target", "empty", "too_long", "prompt_too_long")
_BATCH_BYTES = 1 << 18
_BATCH_RECORDS = 1024
_BYTES_A_WORKER = 16 << 20  # below this, starting a worker takes longer than it saves


@dataclass(frozen=True)
class PrepareConfig(EncodeConfig):
    """What to prepare, and how; see ``EncodeConfig`` for how records become examples.

    Attributes:
        out: directory that receives one directory a source.
        sources: the sources.
        tokenizer: path of a tokenizer; empty with ``train_sentencepiece``.
        train_sentencepiece: vocabulary size of a tokenizer to train on the sources, or None.
        append_eod: closes a plain text with the end-of-document token.
        max_examples: reads at most this many records of each source.
        workers: processes that tokenize, as many as there are cores at most; 0 chooses by the size
            of the input.
        overwrite: replaces prepared sources of the same name.
        allow_download: lets ``tokenizer`` name a model on the Hugging Face Hub.
    """

    out: Path
    sources: tuple[SourceInput, ...]
    tokenizer: str = ""
    train_sentencepiece: int | None = None
    seq_length: int | None = field(default=2048, kw_only=True)
    append_eod: bool = True
    max_examples: int | None = None
    workers: int = 0
    overwrite: bool = False
    allow_download: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("--max-examples", self.max_examples, 1)
        require_at_least("--train-sentencepiece", self.train_sentencepiece, 1)
        require_at_least("--workers", self.workers, 0)
        if not self.sources:
            raise UserError("--input: no source is given (--input name=file.jsonl)")
        if bool(self.tokenizer) == (self.train_sentencepiece is not None):
            raise UserError(
                "--tokenizer: give exactly one of --tokenizer and --train-sentencepiece"
            )
        repeated = [n for n, k in Counter(s.name for s in self.sources).items() if k > 1]
        if repeated:
            raise UserError(f"--input: source {repeated[0]!r} is given twice")


class Progress(NamedTuple):
    """How far a source is: bytes of its files read and tokenized, examples written."""

    source: str
    bytes_done: int
    bytes_total: int
    examples: int
    finished: bool = False


def prepare(
    config: PrepareConfig, on_progress: Callable[[Progress], None] = lambda progress: None
) -> list[dict[str, Any]]:
    """Prepares every source and returns the contents of their ``source.json``.

    All sources appear under ``config.out`` at the end, or none does.

    Raises:
        UserError: an input, the tokenizer or the configuration is at fault, or the disk is full.
    """
    names = [source.name for source in config.sources]
    trains = config.train_sentencepiece is not None
    staged = [*names, TOKENIZER_FILE] if trains else names
    try:
        with Staging(config.out, staged, overwrite=config.overwrite) as staging:
            copies = local_copies(config.sources, staging.directory)
            sizes = {file: _file_size(copies[file], file) for source in config.sources
                     for file in source.files}  # fmt: skip
            date = _date(config)
            tokenizer, described = _tokenizer(config, staging, copies, date)
            settings = EncodeSettings(
                config, tokenizer.model, date, config.seq_length, config.append_eod
            )
            workers = _workers(config, sum(sizes.values()))
            with EncodePool(settings, tokenizer, workers) as pool:
                if not config.skips_bad:
                    for source in config.sources:
                        _Source(source, replace(config, max_examples=1), copies, sizes).look(pool)
                reports = [
                    _Source(source, config, copies, sizes).prepare(
                        described, pool, staging, on_progress
                    )
                    for source in config.sources
                ]
            staging.commit()
            return reports
    except OSError as error:
        raise staging_error(error, config.out) from error


@dataclass
class _Source:
    """One source while it is being prepared."""

    source: SourceInput
    config: PrepareConfig
    copies: dict[Path, Path]
    sizes: dict[Path, int]
    left_out: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)

    def prepare(
        self,
        tokenizer: dict[str, Any],
        pool: EncodePool,
        staging: Staging,
        on_progress: Callable[[Progress], None],
    ) -> dict[str, Any]:
        name, config = self.source.name, self.config
        writer = SourceWriter(staging.path(name), tokenizer["vocab_size"])
        replaced = truncated = longest = 0
        formats: dict[str, None] = {}
        total = sum(self.sizes[file] for file in self.source.files)
        on_progress(Progress(name, 0, total, 0))
        try:
            for batch, encoded in pool.map(self._batches()):
                formats[batch.format] = None
                self._add(writer, batch, encoded)
                replaced += encoded.replaced
                truncated += encoded.truncated
                longest = max(longest, encoded.longest)
                on_progress(Progress(name, batch.bytes_done, total, writer.examples))
            if not writer.examples:
                raise self._nothing_left()
            report = writer.finish(
                {
                    "name": name,
                    "dropped": {reason: self.left_out.get(reason, 0) for reason in DROPPED},
                    "skipped": {k: n for k, n in self.left_out.items() if k not in DROPPED},
                    "ignored_fields": dict(self.ignored),
                    "replaced_letters": replaced,
                    "truncated": truncated,
                    "longest": longest,
                    "seq_length": config.seq_length,
                    "date": self._date_written(pool),
                    "format": ",".join(formats),
                    "options": config.repeated(),
                    "inputs": [self._describe(file) for file in self.source.files],
                    "tokenizer": tokenizer,
                }
            )
        finally:
            writer.abandon()
        on_progress(Progress(name, total, total, writer.examples, finished=True))
        return report

    def look(self, pool: EncodePool) -> None:
        """Raises what the first record would: the sources before this one may take hours."""
        for batch in islice(self._batches(), 1):
            pool.encode(batch)

    def _add(self, writer: SourceWriter, batch: Batch, encoded: EncodedBatch) -> None:
        number = self.source.files.index(Path(batch.path))
        rows = [(number, line) for line in encoded.lines]
        writer.add(encoded.tokens, encoded.mask, encoded.lengths, rows)
        self.ignored.update(encoded.ignored)
        for left in sorted([*encoded.left_out, *batch.bad]):
            self.left_out[left.reason] += 1
            writer.leave_out(batch.path, left)

    def _batches(self) -> Iterator[Batch]:
        """The source's records in batches; a batch never spans two files."""
        config, left = self.config, self.config.max_examples
        bad: list[LeftOut] = []

        def note(line: int, error: RecordError) -> None:
            bad.append(LeftOut(line, error.reason, str(error)))

        on_bad = note if config.skips_bad else None
        bytes_before = 0
        for file in self.source.files:
            reader = open_records(self.copies[file], on_bad, file)
            format_name = config.format
            found = False
            bad.clear()
            records: list[Record] = []
            size = 0
            for record in islice(reader, left):
                found = True
                if format_name == "auto":
                    try:
                        where = f"{file}:{record.line}"
                        format_name = detect_format(record.value, where, config)
                    except RecordError as error:
                        if on_bad is None:
                            raise
                        on_bad(record.line, error)
                        continue
                records.append(record)
                size += sum(len(v) if isinstance(v, str) else 200 for v in record.value.values())
                if size >= _BATCH_BYTES or len(records) == _BATCH_RECORDS:
                    done = bytes_before + reader.bytes_read
                    yield Batch(str(file), format_name, records, done, tuple(bad))
                    left = None if left is None else left - len(records)
                    records, size = [], 0
                    bad.clear()
            if not found and left != 0 and not bad:
                raise UserError(f"{file}: holds no record (leave the file out)")
            bytes_before += self.sizes[file]
            if records or bad:
                yield Batch(str(file), format_name, records, bytes_before, tuple(bad))
                left = None if left is None else left - len(records)

    def _describe(self, file: Path) -> dict[str, Any]:
        path = str(file) if file == STANDARD_INPUT else os.path.abspath(file)
        return {**describe_file(self.copies[file]), "path": path}

    def _date_written(self, pool: EncodePool) -> str | None:
        """The date in the examples, where the chat template writes one."""
        template = (pool.tokenizer.chat_template or "") + (pool.tokenizer.tool_template or "")
        return pool.settings.date if "strftime_now" in template else None

    def _nothing_left(self) -> UserError:
        left_out = self.left_out
        reasons = ", ".join(f"{reason} {count}" for reason, count in left_out.items() if count)
        fix = "records need an assistant turn with text, or --train-on-prompt"
        if set(+left_out) == {"empty"}:
            fix = "its records hold no text: check the field, which --map or --text-key names"
        if left_out["prompt_too_long"] or left_out["too_long"]:
            fix = "raise --seq-length, or --too-long split"
        if set(left_out) - set(DROPPED):
            fix = "without --bad-records skip the first of them is shown"
        return UserError(
            f"source {self.source.name}: {self.source.files[0]}: no example with a target token is "
            f"left, dropped: {reasons} ({fix})"
        )


def _date(config: PrepareConfig) -> str:
    """What chat templates are to call today: the day of the sources already in the folder.

    Sources prepared on different days, or one prepared again, would else differ by their dates.
    """
    for path in sorted(config.out.glob(f"*/{SOURCE_FILE}")):
        try:
            date = json.loads(path.read_text(encoding="utf-8")).get("date")
            return datetime.date.fromisoformat(date).isoformat()
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # it has none; that it may be damaged is no concern of this run
    return datetime.date.today().isoformat()


def _tokenizer(
    config: PrepareConfig, staging: Staging, copies: dict[Path, Path], date: str
) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and how ``source.json`` describes it."""
    if config.train_sentencepiece is None:
        tokenizer = load_tokenizer(
            config.tokenizer,
            chat_template=config.chat_template,
            date=date,
            allow_download=config.allow_download,
        )
        return tokenizer, {**tokenizer.describe(), "model": os.path.abspath(tokenizer.model)}
    path = staging.path(TOKENIZER_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [copies[file] for source in config.sources for file in source.files]
    skip: OnBad | None = (lambda line, error: None) if config.skips_bad else None
    train_sentencepiece(files, path, config.train_sentencepiece, options=config, on_bad=skip)
    tokenizer = load_tokenizer(path, chat_template=config.chat_template)
    final = os.path.abspath(config.out / TOKENIZER_FILE)
    return tokenizer, {**tokenizer.describe(), "model": final}


def _workers(config: PrepareConfig, input_bytes: int) -> int:
    if config.workers:
        return min(config.workers, cores())
    return max(1, min(cores(), input_bytes // _BYTES_A_WORKER))


def _file_size(path: Path, shown: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror} (check --input)") from error
    if size == 0 and shown == STANDARD_INPUT:
        raise UserError("--input -: standard input is empty (did the command before it fail?)")
    if size == 0:
        raise UserError(f"{shown}: the file is empty (leave it out)")
    return size


def describe_file(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": os.path.abspath(path), "bytes": path.stat().st_size, "sha256": digest}
