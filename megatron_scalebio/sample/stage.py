"""Draws a training sample in the learned proportions from the sources of a mixture.

    locate ─▶ scan every row (count, contamination) ─▶ plan ─▶ encode the drawn ─▶ write
                                                        ▲             │
                                                        └─ rows that give no example ─┘

The plan is a pure function of weights, usable rows and seed (`sample.plan`). A row that turns out
to give no example is marked and the plan made again, until every drawn row is good.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import numpy as np

from megatron_scalebio.data.prepare import DROPPED, Progress
from megatron_scalebio.data.source_writer import Staging, staging_error
from megatron_scalebio.errors import UserError
from megatron_scalebio.sample.config import SampleConfig
from megatron_scalebio.sample.manifest import Drawn, manifest
from megatron_scalebio.sample.plan import Floats, Ints, allocate, draw_rows
from megatron_scalebio.sample.rows import CODES, RawRows
from megatron_scalebio.sample.setup import OpenSource, Setup, open_setup
from megatron_scalebio.sample.spool import Spool
from megatron_scalebio.sample.writer import write_manifest, write_sample

_PROBE_ROWS = 256
OnProgress = Callable[[str, Progress], None]  # called with what is done, and how far it is


def sample(
    config: SampleConfig, on_progress: OnProgress = lambda what, progress: None
) -> list[dict[str, Any]]:
    """Draws and writes; returns the manifest of every folder written.

    All folders appear at the end, or none does.

    Raises:
        UserError: an input or option is at fault, nothing usable is left, or the disk is full.
    """
    parent, names = config.folders
    try:
        with Staging(parent, names, overwrite=config.overwrite) as staging, ExitStack() as stack:
            setup = open_setup(config, stack)
            for source in setup.sources:
                source.statuses = source.rows.scan(
                    setup.index, setup.words, lambda progress: on_progress("reading", progress)
                )
                _leave_unselected(source)
            spool = stack.enter_context(closing(Spool(staging.directory / "spool")))
            drawn_S = _draw(config, setup.sources, spool, on_progress)
            groups = [[drawn] for drawn in drawn_S] if config.per_source else [drawn_S]
            manifests = []
            for name, group in zip(names, groups, strict=True):
                facts = _facts(name, setup, group)
                taken = [(setup.sources.index(d.source), d.rows) for d in group if len(d.rows)]
                directory, final = staging.path(name), parent / name
                written = write_sample(
                    directory, final, facts, setup.dtype, taken, spool, config.seed
                )
                manifests.append(manifest(config, setup, group, written))
                write_manifest(directory, manifests[-1])
            staging.commit()
            return manifests
    except OSError as error:
        raise staging_error(error, config.out) from error


def _leave_unselected(source: OpenSource) -> None:
    """Marks the rows that the method which found the weights did not choose."""
    if source.entry.selected is None:
        return
    chosen = np.zeros(len(source.statuses), bool)
    try:
        chosen[np.asarray(source.entry.selected, np.int64)] = True
    except IndexError:
        raise UserError(
            f"{source.entry.path}: {source.entry.name!r} has {len(chosen)} examples, and one "
            "chosen is beyond them (select again: the source has changed since)"
        ) from None
    source.statuses[~chosen & (source.statuses == 0)] = CODES["not_selected"]


def _draw(
    config: SampleConfig, sources: list[OpenSource], spool: Spool, on_progress: OnProgress
) -> list[Drawn]:
    """The rows of every source, all of them in the spool."""
    per_row_S = np.ones(len(sources))
    if config.num_samples is not None:
        per_row_S = np.array(
            [_examples_per_row(config, sources, k, spool, on_progress) for k in range(len(sources))]
        )
    while True:
        usable_S = np.array([source.usable for source in sources], np.int64)
        asked_S, counts_S = _counts(config, usable_S, per_row_S)
        rows_S = [
            draw_rows(source.entry.name, source.statuses == 0, int(count), config.seed)
            for source, count in zip(sources, counts_S, strict=True)
        ]
        good = [_encode(sources, k, np.unique(rows), spool, on_progress)
                for k, rows in enumerate(rows_S)]  # fmt: skip
        if all(good):
            break
    return [
        Drawn(
            source,
            int(asked),
            float(per_row),
            rows,
            _examples(spool, k, rows),
            source.usable - spool.rows[k] if isinstance(source.rows, RawRows) else 0,
        )
        for k, (source, asked, per_row, rows) in enumerate(
            zip(sources, asked_S, per_row_S, rows_S, strict=True)
        )
    ]


def _counts(config: SampleConfig, usable_S: Ints, per_row_S: Floats) -> tuple[Ints, Ints]:
    """Rows asked of each source, and rows it will give."""
    if config.per_source is not None:
        asked_S = np.full(len(usable_S), config.per_source)
        return asked_S, np.minimum(asked_S, usable_S)
    assert config.num_samples is not None
    total = config.num_samples
    shares_S = np.array([source.weight for source in config.sources]) / per_row_S
    asked_S = allocate(shares_S, np.full(len(usable_S), total), total)
    return asked_S, allocate(shares_S, config.max_epochs * usable_S, total)


def _examples_per_row(
    config: SampleConfig, sources: list[OpenSource], k: int, spool: Spool, on_progress: OnProgress
) -> float:
    """Known for token ids; for raw records measured on the first rows of the drawing order."""
    known = sources[k].rows.examples_per_row()
    if known is not None or not config.sources[k].weight:
        return known or 1.0
    count = min(_PROBE_ROWS, sources[k].usable)
    rows = draw_rows(sources[k].entry.name, sources[k].statuses == 0, count, config.seed)
    _encode(sources, k, rows, spool, on_progress)
    good = rows[sources[k].statuses[rows] == 0]
    return _examples(spool, k, good) / len(good) if len(good) else 1.0


def _encode(
    sources: list[OpenSource], k: int, rows: Ints, spool: Spool, on_progress: OnProgress
) -> bool:
    """Puts rows of a source into the spool; false if one gives no example, and is now marked."""
    source, good = sources[k], True
    new = np.array([row for row in rows.tolist() if (k, row) not in spool], np.int64)
    name = source.entry.name
    for done, row in enumerate(source.rows.fetch(new)):
        on_progress("drawing", Progress(name, done, len(new), done))
        if row.status:
            source.statuses[row.number], good = row.status, False
            continue
        spool.add(k, name, row)
        source.truncated += row.truncated
    on_progress("drawing", Progress(name, len(new), len(new), len(new), finished=True))
    return good


def _examples(spool: Spool, k: int, rows: Ints) -> int:
    return sum(spool.pieces(k, row) for row in rows.tolist())


def _facts(name: str, setup: Setup, group: list[Drawn]) -> dict[str, Any]:
    """What ``source.json`` says besides the counts; UserError if nothing was drawn."""
    if not any(len(drawn.rows) for drawn in group):
        names = ", ".join(drawn.source.entry.name for drawn in group)
        raise UserError(
            f"source {names}: no usable row is left (are the excluded sets the sources themselves, "
            "or all answers empty?)"
        )
    formats: dict[str, None] = {}
    for drawn in group:
        formats |= drawn.source.rows.formats if isinstance(drawn.source.rows, RawRows) else {}
    return {
        "name": name,
        "seq_length": setup.seq_length,
        "format": ",".join(formats),
        "dropped": dict.fromkeys(DROPPED, 0),
        "date": setup.date,
        "truncated": sum(drawn.source.truncated for drawn in group),
        "inputs": [],  # sample.jsonl, once it is there
        "tokenizer": setup.described,
    }
