"""The subcommand ``prepare``: arguments, progress and the closing table."""

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from megatron_scalebio import launcher
from megatron_scalebio.config.checks import by_name
from megatron_scalebio.data.encode_config import BAD_RECORDS, TOO_LONG
from megatron_scalebio.data.inputs import SourceInput, parse_inputs
from megatron_scalebio.data.prepare import PrepareConfig, Progress, prepare
from megatron_scalebio.data.record_fields import ALL_FIELDS, FORMATS, parse_columns
from megatron_scalebio.data.source_writer import LEFT_OUT_FILE
from megatron_scalebio.errors import EXIT_OK, EXIT_SIGNALLED, sigterm_interrupts
from megatron_scalebio.launcher import cores

USUAL = (
    "--input", "--out", "--tokenizer", "--train-sentencepiece", "--seq-length", "--chat-template",
    "--format", "--map", "--bad-records", "--overwrite",
)  # fmt: skip
_LINE_EVERY_S = 10.0
_FEW = 10  # sources with a bar and closing lines of their own
ROWS_SHOWN = 50  # of the table; every source.json has its own
_MANY = 0.05  # of the examples, above which truncation is warned of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``prepare``."""
    add = parser.add_argument
    add(
        "--input",
        action="append",
        required=True,
        metavar="[NAME=]PATH[,PATH...]",
        help="a source: files (JSON, JSONL, Parquet, Arrow, CSV, TSV; also .gz, .zst, .xz, .bz2), "
        "folders of them, globs, @FILE with one path per line, or - for standard input; repeat for "
        "more sources; the name defaults to the file's stem; a NAME of {stem}, {parent} or "
        "{grandparent} makes every file a source of its own",
    )
    add("--out", required=True, metavar="DIR", help="receives one directory per source")
    add("--tokenizer", default="", metavar="PATH", help="Hugging Face directory or tokenizer.json,"
        " or a SentencePiece .model file")  # fmt: skip
    add("--train-sentencepiece", type=int, metavar="VOCAB_SIZE", help="train a SentencePiece BPE "
        "tokenizer on the sources, keep it as OUT/tokenizer.model and use it")  # fmt: skip
    add("--allow-download", action="store_true", help="let --tokenizer name a model on the Hub")
    add("--chat-template", metavar="plain|FILE", help="built-in template, or a Jinja file "
        "(default: the tokenizer's own if it has one, else the built-in)")  # fmt: skip
    add_record_options(parser)
    add("--seq-length", type=int, default=2048, metavar="TOKENS", help="most tokens of an example "
        "[2048]")  # fmt: skip
    add("--too-long", metavar="HOW", help=f"{', '.join(TOO_LONG)} (default: split for text, "
        "truncate for dialogues)")  # fmt: skip
    add("--train-on-prompt", action="store_true", help="prompts train, too")
    add("--max-examples", type=int, metavar="N", help="read the first N records of each source")
    add("--workers", type=int, default=0, metavar="N", help="default: by the size of the input")
    add("--overwrite", action="store_true", help="replace prepared sources of the same name")


def add_record_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how records are read, for ``prepare`` and ``sample``."""
    add = parser.add_argument
    add("--format", default="auto", metavar="NAME", help=f"auto (by the first record), "
        f"{', '.join(FORMATS)} [auto]")  # fmt: skip
    add("--text-key", default="text", metavar="FIELD", help="field of the text, in format text "
        "[text]")  # fmt: skip
    add("--map", action="append", default=[], metavar="FIELD=COLUMN[,...]", help="what a field is "
        "called in the files, as in prompt=question,answer=output")  # fmt: skip
    add("--ignore-fields", nargs="*", metavar="FIELD", help="leave these fields out, and count "
        "them; without a name: all unknown fields (otherwise they are refused)")  # fmt: skip
    add("--bad-records", default="stop", metavar="HOW", help=f"{', '.join(BAD_RECORDS)}: end at "
        "the first faulty record, or leave such records out, count and list them "
        "[stop]")  # fmt: skip


def encode_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of ``EncodeConfig`` that the options of ``prepare`` or ``sample`` give."""
    named = args.ignore_fields
    fields = [name for value in named or () for name in value.split(",") if name]
    return {
        "columns": parse_columns(args.map),
        "ignore_fields": tuple(fields) if fields or named is None else (ALL_FIELDS,),
        **by_name(
            args, "format", "text_key", "bad_records", "seq_length", "too_long", "train_on_prompt",
            "chat_template",
        ),
    }  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Prepares the sources that the arguments name; returns an exit code.

    Raises:
        UserError: input, tokenizer or options are at fault; nothing has been written.
    """
    config = PrepareConfig(
        out=Path(args.out),
        sources=tuple(source for value in args.input for source in parse_inputs(value)),
        **encode_options(args),
        **by_name(
            args, "tokenizer", "train_sentencepiece", "max_examples", "workers", "overwrite",
            "allow_download",
        ),
    )  # fmt: skip
    return run_config(config)


def run_config(config: PrepareConfig) -> int:
    """Prepares with a progress display and a closing table; returns an exit code."""
    quiet = not launcher.is_first_rank()
    console = Console(stderr=True, quiet=quiet)
    try:
        with sigterm_interrupts(), _display(console, len(config.sources)) as display:
            reports = prepare(config, display)
    except KeyboardInterrupt:
        console.print("prepare: stopped; nothing was written")
        return EXIT_SIGNALLED
    output = Console(quiet=quiet)
    output.print(report_table(reports, config.out))
    for line in remarks(reports, config):
        output.print(line, highlight=False, soft_wrap=True, markup=False)
    return EXIT_OK


def report_table(reports: Sequence[dict[str, Any]], out: Path) -> Table:
    """One row a source: examples, tokens, targets, mean length, dropped and truncated records."""
    table = Table(title=Text(f"prepared in {out}"), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("source", overflow="fold")
    for heading in ("examples", "tokens", "targets", "mean length", "dropped", "truncated"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report in reports[:ROWS_SHOWN]:
        dropped = [f"{n:,} {why}" for why, n in report["dropped"].items() if n]
        bad = sum(report.get("skipped", {}).values())
        dropped += [f"{bad:,} bad"] if bad else []
        table.add_row(
            report["name"],
            f"{report['examples']:,}",
            f"{report['tokens']:,}",
            f"{report['target_tokens']:,}",
            f"{report['tokens'] / report['examples']:.1f}",
            "\n".join(dropped) or "none",
            f"{report['truncated']:,}",
        )
    if len(reports) > ROWS_SHOWN:
        examples, tokens = (sum(each[of] for each in reports) for of in ("examples", "tokens"))
        rest = f"all {len(reports):,}, of which {ROWS_SHOWN} are shown"
        table.add_row(rest, f"{examples:,}", f"{tokens:,}")
    return table


def remarks(reports: Sequence[dict[str, Any]], config: PrepareConfig) -> list[str]:
    """What the table does not say: what was left out or cut, and what to do about it."""
    lines, counts = [], Counter[str]()
    if config.workers > cores():
        lines.append(f"--workers {config.workers}: {cores()} ran, as many as there are cores")
    for source, report in zip(config.sources, reports, strict=True):
        for what, line in _remarks_of(source, report, config).items():
            counts[what] += 1
            if counts[what] <= _FEW:
                lines.append(line)
    return lines + [
        f"... and {count - _FEW:,} more sources: {what}"
        for what, count in counts.items()
        if count > _FEW
    ]


def _remarks_of(
    source: SourceInput, report: dict[str, Any], config: PrepareConfig
) -> dict[str, str]:
    """Of one source, by what they are about."""
    lines, name, dropped = {}, report["name"], report["dropped"]
    if source.unread:
        names = ", ".join(str(path) for path in source.unread[:3])
        more = f" and {len(source.unread) - 3:,} more" if len(source.unread) > 3 else ""
        lines["files not read"] = f"{name}: not read, being of no known kind: {names}{more}"
    if report["ignored_fields"]:
        fields = [f"{field} ({n:,})" for field, n in sorted(report["ignored_fields"].items())]
        lines["fields not used"] = f"{name}: fields not used: {', '.join(fields)}"
    if report["replaced_letters"]:
        lines["halves of letters"] = (
            f"{name}: {report['replaced_letters']:,} records held halves of letters, as of a "
            "cut emoji, replaced by \ufffd"
        )
    if report["skipped"]:
        place = config.out / name / LEFT_OUT_FILE
        skipped = counted(report["skipped"])
        lines["records left out"] = f"{name}: {skipped} left out, listed in {place}"
    if dropped["prompt_too_long"]:
        lines["prompt_too_long"] = (
            f"{name}: {dropped['prompt_too_long']:,} prompt_too_long: the prompt alone fills "
            f"--seq-length {config.seq_length}"
        )
    if report["truncated"] > _MANY * report["examples"]:
        lines["examples lost their end"] = (
            f"warning: {name}: {report['truncated']:,} of {report['examples']:,} examples lost "
            f"their end; --seq-length {report['longest'] - 1} would hold the longest"
        )
    return lines


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)


class _Lines:
    """Progress for logs: one line at most every few seconds, and one at the end of a source."""

    def __init__(self, console: Console, sources: int = 1) -> None:
        self._console, self._sources = console, sources
        self._next, self._done = 0.0, 0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        self._done += progress.finished
        last = progress.finished and (self._sources <= _FEW or self._done == self._sources)
        if now < self._next and not last:
            return
        self._next = now + _LINE_EVERY_S
        percent = 100 * progress.bytes_done / progress.bytes_total
        many = f"{self._done:,} of {self._sources:,} sources, " if self._sources > _FEW else ""
        self._console.print(
            f"prepare: {many}{progress.source} {percent:.0f} %, {progress.examples:,} examples",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )


class _Bars:
    """Progress for terminals: one bar a source, or one of all where they are many."""

    def __init__(self, bar: Bar, sources: int) -> None:
        self._bar = bar
        self._tasks: dict[str, Any] = {}
        self._many = sources > _FEW
        if self._many:
            self._tasks[""] = bar.add_task("", total=sources, examples=0)

    def __call__(self, progress: Progress) -> None:
        if self._many:
            done = 1 if progress.finished else 0
            self._bar.update(self._tasks[""], description=progress.source, advance=done)
            return
        if progress.source not in self._tasks:
            self._tasks[progress.source] = self._bar.add_task(
                progress.source, total=progress.bytes_total, examples=0
            )
        task = self._tasks[progress.source]
        self._bar.update(task, completed=progress.bytes_done, examples=progress.examples)


@contextmanager
def _display(console: Console, sources: int) -> Iterator[_Lines | _Bars]:
    if not console.is_terminal:
        yield _Lines(console, sources)
        return
    counted = (DownloadColumn(), TextColumn("{task.fields[examples]:,} examples"))
    of_many = (MofNCompleteColumn(), TextColumn("sources"))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *(of_many if sources > _FEW else counted),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        yield _Bars(bar, sources)
