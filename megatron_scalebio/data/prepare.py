"""JSON and JSONL files to prepared sources: read, tokenize in parallel, cut, write.

The parent reads records and writes examples; workers tokenize. Batches come back in the order in
which they were read, and cutting looks at one record alone, so the bytes written do not depend
on the number of workers. Only a few batches are in memory at any time.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron_scalebio.config.checks import require_at_least, require_name, require_one_of
from megatron_scalebio.data.encode_pool import Batch, EncodePool, EncodeSettings
from megatron_scalebio.data.formats import FORMATS, detect_format
from megatron_scalebio.data.records import Record, RecordReader
from megatron_scalebio.data.source_writer import SourceWriter, Staging, staging_error
from megatron_scalebio.data.tokenizer import Tokenizer, load_tokenizer
from megatron_scalebio.data.train_tokenizer import train_sentencepiece
from megatron_scalebio.errors import UserError

_SUFFIXES = (".json", ".jsonl")
TOO_LONG = ("truncate", "drop", "split")
TOKENIZER_FILE = "tokenizer.model"
_BATCH_BYTES = 1 << 18
_BATCH_RECORDS = 1024
_BYTES_A_WORKER = 16 << 20  # below this, starting a worker takes longer than it saves


@dataclass(frozen=True)
class SourceInput:
    """A source's name and its files, in the order in which they are read."""

    name: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how.

    Attributes:
        out: directory that receives one directory a source.
        sources: the sources.
        tokenizer: path of a tokenizer; empty with ``train_sentencepiece``.
        train_sentencepiece: vocabulary size of a tokenizer to train on the sources, or None.
        format: one of ``FORMATS``, or ``auto``: each file goes by its first record.
        text_key: the field that holds the text, for the format ``text``.
        seq_length: tokens of an example as the model sees it, so that it holds at most one
            token more; None for no limit.
        too_long: ``truncate`` (keep the head), ``drop``, ``split`` (pieces of ``seq_length``
            that overlap by one token, so that each token is predicted once); None splits text
            and truncates dialogues.
        train_on_prompt: every token of a dialogue is a target, not only assistant turns.
        append_eod: closes a plain text with the end-of-document token.
        chat_template: None for the tokenizer's own, ``plain`` for the built-in one, or a file.
        max_examples: reads at most this many records of each source.
        workers: processes that tokenize; 0 chooses by the size of the input.
        overwrite: replaces prepared sources of the same name.
        allow_download: lets ``tokenizer`` name a model on the Hugging Face Hub.
    """

    out: Path
    sources: tuple[SourceInput, ...]
    tokenizer: str = ""
    train_sentencepiece: int | None = None
    format: str = "auto"
    text_key: str = "text"
    seq_length: int | None = 2048
    too_long: str | None = None
    train_on_prompt: bool = False
    append_eod: bool = True
    chat_template: str | None = None
    max_examples: int | None = None
    workers: int = 0
    overwrite: bool = False
    allow_download: bool = False

    def __post_init__(self) -> None:
        require_one_of("--format", self.format, ("auto", *FORMATS))
        require_one_of("--too-long", self.too_long, TOO_LONG)
        require_at_least("--seq-length", self.seq_length, 1)
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
    sizes = {file: _file_size(file) for source in config.sources for file in source.files}
    names = [source.name for source in config.sources]
    trains = config.train_sentencepiece is not None
    staged = [*names, TOKENIZER_FILE] if trains else names
    try:
        with Staging(config.out, staged, overwrite=config.overwrite) as staging:
            tokenizer, described = _tokenizer(config, staging)
            settings = EncodeSettings(
                tokenizer=tokenizer.model,
                chat_template=config.chat_template,
                train_on_prompt=config.train_on_prompt,
                append_eod=config.append_eod,
                max_tokens=None if config.seq_length is None else config.seq_length + 1,
                too_long=config.too_long,
                text_key=config.text_key,
            )
            workers = _workers(config, sum(sizes.values()))
            with EncodePool(settings, tokenizer, workers) as pool:
                reports = [
                    _prepare_source(source, config, sizes, described, pool, staging, on_progress)
                    for source in config.sources
                ]
            staging.commit()
            return reports
    except OSError as error:
        raise staging_error(error, config.out) from error


def _prepare_source(
    source: SourceInput,
    config: PrepareConfig,
    sizes: dict[Path, int],
    tokenizer: dict[str, Any],
    pool: EncodePool,
    staging: Staging,
    on_progress: Callable[[Progress], None],
) -> dict[str, Any]:
    writer = SourceWriter(staging.path(source.name), tokenizer["vocab_size"])
    dropped = {"no_target": 0, "empty": 0, "too_long": 0}
    truncated = 0
    formats: dict[str, None] = {}
    total = sum(sizes[file] for file in source.files)
    on_progress(Progress(source.name, 0, total, 0))
    try:
        for batch, encoded in pool.map(_batches(source, config)):
            formats[batch.format] = None
            writer.add(encoded.tokens, encoded.mask, encoded.lengths)
            truncated += encoded.truncated
            for reason, count in encoded.dropped.items():
                dropped[reason] += count
            on_progress(Progress(source.name, batch.bytes_done, total, writer.examples))
        if not writer.examples:
            raise _nothing_left(source, dropped)
        report = writer.finish(
            {
                "name": source.name,
                "dropped": dropped,
                "truncated": truncated,
                "seq_length": config.seq_length,
                "format": ",".join(formats),
                "inputs": [describe_file(file) for file in source.files],
                "tokenizer": tokenizer,
            }
        )
    finally:
        writer.abandon()
    on_progress(Progress(source.name, total, total, writer.examples, finished=True))
    return report


def _batches(source: SourceInput, config: PrepareConfig) -> Iterator[Batch]:
    """The source's records in batches; a batch never spans two files."""
    left = config.max_examples
    bytes_before = 0
    for file in source.files:
        reader = RecordReader(file)
        format_name = config.format
        found = False
        records: list[Record] = []
        size = 0
        for record in islice(reader, left):
            if format_name == "auto":
                where = f"{file}:{record.line}"
                format_name = detect_format(record.value, where, config.text_key)
            found = True
            records.append(record)
            size += sum(len(v) if isinstance(v, str) else 200 for v in record.value.values())
            if size >= _BATCH_BYTES or len(records) == _BATCH_RECORDS:
                yield Batch(str(file), format_name, records, bytes_before + reader.bytes_read)
                left = None if left is None else left - len(records)
                records, size = [], 0
        if records:
            yield Batch(str(file), format_name, records, bytes_before + reader.bytes_read)
            left = None if left is None else left - len(records)
        if not found and left != 0:
            raise UserError(f"{file}: holds no record (leave the file out)")
        bytes_before += reader.bytes_read


def _tokenizer(config: PrepareConfig, staging: Staging) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and how ``source.json`` describes it."""
    if config.train_sentencepiece is None:
        tokenizer = load_tokenizer(
            config.tokenizer,
            chat_template=config.chat_template,
            allow_download=config.allow_download,
        )
        return tokenizer, {**tokenizer.describe(), "model": os.path.abspath(tokenizer.model)}
    path = staging.path(TOKENIZER_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [file for source in config.sources for file in source.files]
    train_sentencepiece(
        files, path, config.train_sentencepiece, format_name=config.format, text_key=config.text_key
    )
    tokenizer = load_tokenizer(path, chat_template=config.chat_template)
    final = os.path.abspath(config.out / TOKENIZER_FILE)
    return tokenizer, {**tokenizer.describe(), "model": final}


def _workers(config: PrepareConfig, input_bytes: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return config.workers or max(1, min(cores or 1, input_bytes // _BYTES_A_WORKER))


def _nothing_left(source: SourceInput, dropped: dict[str, int]) -> UserError:
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items() if count)
    fix = "records need an assistant turn with text, or --train-on-prompt"
    if dropped["too_long"] and not dropped["no_target"]:
        fix = "raise --seq-length, or --too-long split"
    return UserError(
        f"source {source.name}: {source.files[0]}: no example with a target token is left "
        f"(dropped: {reasons}) ({fix})"
    )


def _file_size(path: Path) -> int:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror} (check --input)") from error
    if size == 0:
        raise UserError(f"{path}: the file is empty (leave it out)")
    return size


def describe_file(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {
        "path": os.path.abspath(path),
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
    }


def parse_input(value: str) -> SourceInput:
    """``[name=]path[,path...]`` to a source; a directory stands for its JSON/JSONL files.

    Raises:
        UserError: a path does not exist, a directory holds no such file, or the name is no name.
    """
    name, separator, paths = value.partition("=")
    if not separator or Path(value).exists():
        name, paths = "", value
    whole = [paths] if paths and Path(paths).exists() else []
    entries = whole or [path for path in paths.split(",") if path]
    if not entries:
        raise UserError(f"--input: no path in {value!r} (--input name=file.jsonl)")
    name = name or Path(entries[0]).stem
    require_name("--input", name)
    files = [file for entry in entries for file in _files(Path(entry))]
    return SourceInput(name, tuple(files))


def _files(path: Path) -> Sequence[Path]:
    if not path.exists():
        raise UserError(f"{path}: no such file or directory (check --input)")
    if not path.is_dir():
        return [path]
    files = sorted(
        file
        for file in path.iterdir()
        if file.suffix in _SUFFIXES and not file.name.startswith(".")
    )
    if not files:
        raise UserError(f"{path}: the directory holds no *.json or *.jsonl")
    return files
