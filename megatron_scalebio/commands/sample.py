"""The subcommand ``sample``: arguments, progress and the closing table."""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from megatron_scalebio import launcher
from megatron_scalebio.commands.prepare import add_record_options, encode_options
from megatron_scalebio.config.checks import by_name, require_name
from megatron_scalebio.data.encode_config import TOO_LONG, EncodeConfig
from megatron_scalebio.data.inputs import exists
from megatron_scalebio.data.prepare import Progress
from megatron_scalebio.data.source_writer import MANIFEST_FILE
from megatron_scalebio.data.weights_file import (
    SELECTED_FILE,
    WEIGHTS_FILE,
    read_selected,
    read_weights,
    stopped_at,
)
from megatron_scalebio.errors import EXIT_OK, EXIT_SIGNALLED, UserError, sigterm_interrupts
from megatron_scalebio.formatting import printable, shorten
from megatron_scalebio.launcher import cores
from megatron_scalebio.sample.config import SampleConfig, WeightedSource
from megatron_scalebio.sample.contamination import FEWEST_WORDS
from megatron_scalebio.sample.inputs import (
    locate,
    parse_weights,
    prepared_options,
    validation_of_run,
)
from megatron_scalebio.sample.scored import selected_by_score
from megatron_scalebio.sample.stage import OnProgress, sample

USUAL = (
    "--weights", "--input", "--out", "--num-samples", "--per-source", "--exclude", "--max-epochs",
    "--seed", "--from-tokens", "--overwrite",
)  # fmt: skip
_LINE_EVERY_S = 10.0
_OFF_PROPORTION = 0.02  # of the whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``sample``."""
    add = parser.add_argument
    add("--weights", nargs="+", default=[], metavar="RUN|NAME=WEIGHT", help="folder of a reweight "
        "run or its weights.json; or NAME=WEIGHT for every source (with --input)")  # fmt: skip
    add("--input", action="append", default=[], metavar="NAME=PATH[,PATH]", help="where a source's "
        "rows are: JSON/JSONL files, a prepared folder, or a Megatron .bin/.idx prefix; repeat "
        "(default: what weights.json names)")  # fmt: skip
    add("--out", required=True, metavar="DIR", help="receives the sample; with --per-source, one "
        "folder a source")  # fmt: skip
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--num-samples", type=int, metavar="N", help="rows in all, dealt by weight")
    size.add_argument(
        "--per-source", type=int, metavar="N", help="N rows of each source, none twice"
    )
    add("--min-score", type=float, metavar="X", help="draw only examples that score X or more, in "
        "a run of `reweight --level example`")  # fmt: skip
    add("--top", type=float, metavar="SHARE", help="draw only this share of each source, the "
        "examples that score highest in such a run")  # fmt: skip
    add("--exclude", action="append", default=[], metavar="[NAME=]PATH", help="validation or test "
        "set whose examples must not be drawn; repeat (the run's own validation sets always "
        "are)")  # fmt: skip
    add("--ngram", type=int, default=13, metavar="N", help="consecutive words that a row must "
        "share with an excluded example to count as a repetition [13]")  # fmt: skip
    add("--max-epochs", type=int, default=4, metavar="N", help="the most times that a row is taken;"
        " what is left goes to the other sources in proportion [4]")  # fmt: skip
    add("--seed", type=int, default=1234, metavar="N", help="seed of the draw [1234]")
    add("--from-tokens", action="store_true", help="draw prepared examples, not raw records (always"
        " so where a source has token ids alone); there is no sample.jsonl then")  # fmt: skip
    add("--tokenizer", metavar="PATH", help="default: that of the prepared sources")
    add("--seq-length", type=int, metavar="TOKENS", help="default: that of the prepared sources")
    add_record_options(parser)
    add("--too-long", metavar="HOW", help=f"{', '.join(TOO_LONG)}, as in prepare")
    add("--train-on-prompt", action="store_true", help="as in prepare")
    add("--chat-template", metavar="plain|FILE", help="as in prepare")
    add("--workers", type=int, default=1, metavar="N", help="processes that tokenize [1]")
    add("--overwrite", action="store_true", help="replace an earlier sample")


def run(args: argparse.Namespace) -> int:
    """Draws the sample that the arguments describe; returns an exit code.

    Raises:
        UserError: an input or option is at fault; nothing has been written.
    """
    sources, exclude = _sources(args)
    options = encode_options(args)
    for name, value in prepared_options(entry.path for entry in sources).items():
        if options[name] == getattr(EncodeConfig, name):  # not asked for otherwise
            options[name] = value
    config = SampleConfig(
        out=Path(args.out),
        sources=sources,
        exclude=(*exclude, *map(_named, args.exclude)),
        # What was chosen are prepared examples.
        from_tokens=args.from_tokens or any(s.selected is not None for s in sources),
        **options,
        **by_name(
            args, "num_samples", "per_source", "seed", "max_epochs", "ngram", "tokenizer",
            "workers", "overwrite",
        ),
    )  # fmt: skip
    quiet = not launcher.is_first_rank()
    console = Console(stderr=True, quiet=quiet)
    try:
        with sigterm_interrupts(), _display(console) as display:
            manifests = sample(config, display)
    except KeyboardInterrupt:
        console.print("sample: stopped; nothing was written")
        return EXIT_SIGNALLED
    output = Console(quiet=quiet)
    output.print(sample_table(manifests, config))
    for line in remarks(manifests, config):
        output.print(line, highlight=False, soft_wrap=True, markup=False)
    return EXIT_OK


def _sources(
    args: argparse.Namespace,
) -> tuple[tuple[WeightedSource, ...], list[tuple[str, str]]]:
    """The sources with weights and paths, and the validation sets of the run."""
    inputs = dict(map(_named, args.input))
    if len(inputs) < len(args.input):
        raise UserError("--input: names a source twice (join its paths by commas)")
    paths, weights, exclude = dict(inputs), dict.fromkeys(inputs, 1.0), []
    selected: Mapping[str, Any] = {}
    run: Path | None = None
    if len(args.weights) == 1 and "=" not in args.weights[0]:
        path = Path(args.weights[0])
        path = path / WEIGHTS_FILE if path.is_dir() else path
        told = read_weights(path)
        step = stopped_at(path)
        if step is not None:
            print(
                f"warning: {path}: weights so far of a run stopped at step {step}", file=sys.stderr
            )
        weights = {name: weight for name, (weight, _) in told.items()}
        paths = {name: where for name, (_, where) in told.items()} | inputs
        exclude = validation_of_run(path.parent)
        run = path.parent
        selected = read_selected(run / SELECTED_FILE)
    elif args.weights:
        weights = parse_weights(args.weights)
    elif args.per_source is None:
        raise UserError("--weights: is missing (a run's folder, or NAME=WEIGHT ...)")
    for name in [*paths, *weights]:
        if name not in weights or name not in paths:
            lacks = "--weights" if name not in weights else "--input"
            raise UserError(
                f"{lacks}: has no source {name!r} (name it in both --weights and --input)"
            )
        require_name("--input", name, grouped=args.per_source is None)  # else a folder's name
    if not weights:
        raise UserError("--input: no source is given (--input name=file.jsonl)")
    if args.min_score is not None or args.top is not None:
        if args.min_score is not None and args.top is not None:
            raise UserError("--top: does not go with --min-score (drop one of them)")
        if run is None:
            raise UserError(
                "--min-score and --top: need a run with scores of examples (--weights RUN)"
            )
        selected, unseen = selected_by_score(run, paths, args.min_score, args.top)
        if unseen:
            print(
                f"warning: {run}: {unseen:,} of its examples were never visited: they count with "
                "their source's score, and are taken if it has none",
                file=sys.stderr,
            )
    sources = (WeightedSource(n, paths[n], w, selected.get(n)) for n, w in weights.items())
    return tuple(sources), exclude


def _named(value: str) -> tuple[str, str]:
    """``[NAME=]PATH`` to (name, path); the name defaults to the path's stem."""
    name, separator, path = value.partition("=")
    if not separator or exists(Path(value)):
        name, path = Path(value.split(",")[0]).stem, value
    return name, path


def sample_table(manifests: Sequence[dict[str, Any]], config: SampleConfig) -> Table:
    """One row a source: weight, rows asked and given, epochs, what was left out and why."""
    table = Table(
        title=Text(f"sampled into {config.out}"), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("source", overflow="fold")
    headings = ("weight", "rows", "usable", "asked", "given", "epochs", "left out")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    whole = sum(source.weight for source in config.sources)
    for entry in (entry for manifest in manifests for entry in manifest["sources"]):
        weighted = config.num_samples is not None
        table.add_row(
            entry["name"],
            f"{entry['weight'] / whole:.4f}" if weighted else "-",
            f"{entry['rows']:,}",
            f"{entry['usable']:,}",
            f"{entry['asked']:,}",
            f"{entry['given']:,}",
            f"{entry['epochs']:.2f}",
            _counted(_left_out(entry)),
        )
    return table


def _left_out(entry: dict[str, Any]) -> dict[str, int]:
    unselected = {"not selected": entry["not_selected"]}
    return entry["contaminated"] | entry["no_example"] | unselected


def _counted(counts: dict[str, int]) -> str:
    return "\n".join(f"{count:,} {what}" for what, count in counts.items() if count) or "none"


def remarks(manifests: Sequence[dict[str, Any]], config: SampleConfig) -> list[str]:
    """What the table does not say: redistribution, shortfall, what was compared and what is not
    written."""
    lines = _off_proportion(manifests, config) if config.num_samples is not None else []
    if config.workers > cores():
        lines.append(f"--workers {config.workers}: {cores()} ran, as many as there are cores")
    moved = sum(manifest["redistributed"] for manifest in manifests)
    entries = [entry for manifest in manifests for entry in manifest["sources"]]
    capped = [entry["name"] for entry in entries if entry["surplus"]]
    if moved and len(capped) < len(entries):
        lines.append(
            f"{moved:,} rows beyond {config.max_epochs} epochs of {', '.join(capped)} were taken "
            "from the other sources instead"
        )
    unseen = sum(entry.get("unencoded", 0) for entry in entries)
    if unseen:
        lines.append(
            f"usable: {unseen:,} of these rows were not drawn and not tokenized; some may be too "
            "long, empty or bad"
        )
    short = [m["asked"] - m["given"] for m in manifests if m["given"] < m["asked"]]
    if short:
        cap = f", {config.max_epochs} times each" if config.num_samples is not None else ""
        lines.append(f"{sum(short):,} rows fewer than asked: the sources have no more{cap}")
    lines += _compared(manifests)
    for source in config.sources:
        folder = locate(source.name, source.path).folder
        if folder is not None and (folder / MANIFEST_FILE).is_file():
            lines.append(
                f"{source.name} is itself a sample: to draw from its full source, give --input "
                f"{source.name}=PATH"
            )
    if manifests[0]["sample_sha256"] is None:
        lines.append("drawn from token ids, so there is no sample.jsonl")
    if manifests[0]["tokenizer"] is None:
        lines.append(f"a plain Megatron prefix: {config.out}/tokens")
    return lines


_MEANING = {
    "exact": "equals an example of an excluded set",
    "prompt": "has the same prompt as an example of an excluded set",
    "ngram": "shares {ngram} consecutive {ngram_of} with an example of an excluded set",
    "prompt_too_long": "its prompt alone fills --seq-length",
    "bad_record": "could not be read as an example",
}


def _compared(manifests: Sequence[dict[str, Any]]) -> list[str]:
    """What the reasons in the table mean, what was compared, and what was ignored in it."""
    about = manifests[0]["contamination"]
    entries = [entry for manifest in manifests for entry in manifest["sources"]]
    found = {reason for entry in entries for reason, count in _left_out(entry).items() if count}
    meanings = [f"{k}: {text.format(**about)}" for k, text in _MEANING.items() if k in found]
    against = [entry["name"] for entry in about["against"]]
    if not against:
        return ["compared with no validation or test set: name them by --exclude", *meanings]
    lines = [f"compared with {', '.join(against)}", *meanings]
    if about["short_examples"]:
        fewest = min(FEWEST_WORDS, about["ngram"])
        lines.append(
            f"{about['short_examples']:,} of their examples have fewer than {fewest} "
            f"{about['ngram_of']}: rows are found only if they equal one or have its prompt"
        )
    if about["ignored_ngrams"]:
        lines.append(
            f"not compared: {about['ignored_ngrams']:,} runs of {about['ngram']} "
            f"{about['ngram_of']} that many of their examples share"
        )
    for phrase in about["ignored_phrases"]:
        text = printable(shorten(phrase["words"], 100))
        lines.append(f'  in {phrase["examples"]:,} of them: "{text}"')
    return lines


def _off_proportion(manifests: Sequence[dict[str, Any]], config: SampleConfig) -> list[str]:
    """A warning, if the rows that there are don't make up the proportions asked for.

    Weights are shares of examples, of which a long row may become several.
    """
    entries = [entry for manifest in manifests for entry in manifest["sources"]]
    whole = sum(entry["weight"] for entry in entries)
    given = sum(entry["examples"] for entry in entries)
    off = [
        f"{entry['name']} {entry['examples'] / given:.1%} for {entry['weight'] / whole:.1%}"
        for entry in entries
        if given and abs(entry["examples"] / given - entry["weight"] / whole) > _OFF_PROPORTION
    ]
    if not off:
        return []
    used = [entry for entry in entries if entry["weight"] > 0]
    rows = [entry["weight"] / entry["examples_per_row"] for entry in used]  # in proportion
    most = min(
        entry["usable"] * config.max_epochs * sum(rows) / share
        for entry, share in zip(used, rows, strict=True)
    )
    cure = f"about --num-samples {int(most):,} keeps them, or more --max-epochs"
    if empty := [entry["name"] for entry in used if not entry["usable"]]:
        cure = f"all rows of {', '.join(empty)} are left out, for the reasons above"
    return [f"warning: not in the proportions asked for: {', '.join(off)}; {cure}"]


class _Lines:
    """Progress for logs: a line at most every few seconds, and none for what is quick."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._next = time.monotonic() + _LINE_EVERY_S

    def __call__(self, what: str, progress: Progress) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + _LINE_EVERY_S
        percent = 100 * progress.bytes_done / max(1, progress.bytes_total)
        text = f"sample: {what} {progress.source} {percent:.0f} %, {progress.examples:,} rows"
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _display(console: Console) -> Iterator[OnProgress]:
    if not console.is_terminal:
        yield _Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rows]:,} rows"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, progress: Progress) -> None:
            title = f"{what} {progress.source}"
            if title not in tasks:
                tasks[title] = bar.add_task(title, rows=0)
            bar.update(
                tasks[title],
                total=max(1, progress.bytes_total),
                completed=progress.bytes_done or progress.finished,
                rows=progress.examples,
            )

        yield show
