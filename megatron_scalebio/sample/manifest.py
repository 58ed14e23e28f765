"""``manifest.json``: which rows a sample took of which files, and what became of the others.

The same inputs and seed give the same manifest: it holds no time and no place but the inputs'.
"""

from typing import Any, NamedTuple

import numpy as np

from megatron_scalebio.sample.config import SampleConfig
from megatron_scalebio.sample.contamination import KINDS
from megatron_scalebio.sample.plan import Ints
from megatron_scalebio.sample.rows import NO_EXAMPLE, STATUSES, RawRows
from megatron_scalebio.sample.setup import OpenSource, Setup
from megatron_scalebio.sample.writer import Written

FORMAT_VERSION = 1


class Drawn(NamedTuple):
    """What was drawn of a source.

    asked: rows its weight asks for; examples_per_row: by which the weight was divided to get there;
    rows: those taken, ascending, repeated where taken again; examples: what they became;
    unencoded: usable rows of which it isn't known whether they become an example.
    """

    source: OpenSource
    asked: int
    examples_per_row: float
    rows: Ints
    examples: int
    unencoded: int


def manifest(
    config: SampleConfig, setup: Setup, group: list[Drawn], written: Written
) -> dict[str, Any]:
    """The content of the manifest of one written folder."""
    sources = [_source_entry(drawn) for drawn in group]
    return {
        "format_version": FORMAT_VERSION,
        "rows_are": "documents of token ids" if setup.from_tokens else "raw records",
        "asked": config.num_samples or config.per_source,
        "given": sum(entry["given"] for entry in sources),
        "examples": written.examples,
        "redistributed": sum(entry["surplus"] for entry in sources) if config.num_samples else 0,
        "seed": config.seed,
        "max_epochs": config.max_epochs if config.num_samples else 1,
        "contamination": {
            "ngram": config.ngram,
            "ngram_of": "words" if setup.tokenizer else "tokens",
            "short_examples": setup.index.short,
            "ignored_ngrams": setup.index.ignored_ngrams,
            "ignored_phrases": [
                {"words": setup.words.spelled(phrase.ids), "examples": phrase.examples}
                for phrase in setup.index.phrases
                if setup.tokenizer
            ],
            "against": setup.evaluation,
        },
        "tokenizer": setup.described,
        "seq_length": setup.seq_length,
        "fingerprint": written.fingerprint,
        "sample_sha256": written.sample_sha256,
        "sources": sources,
    }


def _source_entry(drawn: Drawn) -> dict[str, Any]:
    source, given = drawn.source, len(drawn.rows)
    found = np.bincount(source.statuses, minlength=len(STATUSES)).tolist()
    counts = dict(zip(STATUSES, found, strict=True))
    entry = {
        "name": source.entry.name,
        "weight": source.entry.weight,
        "examples_per_row": round(drawn.examples_per_row, 6),
        "rows": len(source.statuses),
        "usable": counts["usable"],
        "unencoded": drawn.unencoded,
        "asked": drawn.asked,
        "given": given,
        "surplus": max(0, drawn.asked - given),
        "received": max(0, given - drawn.asked),
        "epochs": round(given / max(1, counts["usable"]), 6),
        "examples": drawn.examples,
        "contaminated": {kind: counts[kind] for kind in KINDS},
        "no_example": {kind: counts[kind] for kind in NO_EXAMPLE},
        "not_selected": counts["not_selected"],
        "inputs": _inputs(source, drawn.rows),
    }
    if not isinstance(source.rows, RawRows):
        entry["taken"] = drawn.rows.tolist()
    return entry


def _inputs(source: OpenSource, rows: Ints) -> list[dict[str, Any]]:
    """The source's files; raw ones with the rows taken of each, numbered from 0 in the file."""
    if not isinstance(source.rows, RawRows):
        return source.inputs
    entries, first = [], 0
    for entry, count in zip(source.inputs, source.rows.rows_in_file, strict=True):
        taken = rows[(rows >= first) & (rows < first + count)] - first
        entries.append({**entry, "rows": count, "taken": taken.tolist()})
        first += count
    return entries
