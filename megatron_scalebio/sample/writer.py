"""Writes a drawn sample.

sample.jsonl             the raw records, with the field `sampled_from`; not for token ids
tokens.bin|.idx          the sample, laid out as `prepare` lays out a source
loss_mask.bin|.idx, source.json        not where only Megatron prefixes were drawn from
manifest.json            which rows were taken; see `sample.manifest`
"""

import hashlib
import json
import os
import re
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_scalebio.data.source_writer import MANIFEST_FILE, TOKENS, SourceWriter
from megatron_scalebio.sample.plan import shuffled
from megatron_scalebio.sample.spool import Spool

SAMPLE_FILE = "sample.jsonl"


class PrefixWriter:
    """Writes documents to a plain Megatron prefix: no loss mask, and no tokenizer to name."""

    def __init__(self, directory: Path, dtype: type[np.number]) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder  # takes seconds

        directory.mkdir(parents=True)
        self._prefix, self._dtype = directory / TOKENS, dtype
        self._builder = IndexedDatasetBuilder(f"{self._prefix}.bin", dtype=dtype)
        self._builder.sequence_lengths = array("i")
        self._digest = hashlib.sha256()
        self.examples = 0

    def add(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        lengths: list[int],
        rows: list[tuple[int, int]],
    ) -> None:
        self._builder.add_document(tokens, lengths)
        self._digest.update(tokens.astype(self._dtype).tobytes())
        self._digest.update(np.asarray(lengths, np.int32).tobytes())
        self.examples += len(lengths)

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Writes the index; returns the fingerprint, as ``SourceWriter.finish`` does with more."""
        self._builder.finalize(f"{self._prefix}.idx")
        return {"fingerprint": self._digest.hexdigest()}

    def abandon(self) -> None:
        self._builder.data_file.close()


class Written(NamedTuple):
    """examples: training examples; sample_sha256: of sample.jsonl, or None."""

    examples: int
    fingerprint: str
    sample_sha256: str | None


def write_sample(
    directory: Path,
    final: Path,
    facts: dict[str, Any],
    dtype: type[np.number],
    drawn: list[tuple[int, npt.NDArray[np.int64]]],
    spool: Spool,
    seed: int,
) -> Written:
    """Writes everything but the manifest, in an order shuffled over the sources.

    Args:
        directory: receives it, and does not exist yet; it will be renamed to ``final``.
        facts: what ``source.json`` says besides the counts; without a tokenizer a plain Megatron
            prefix is written.
        dtype: of that prefix.
        drawn: (source, its rows) pairs; the rows are in ``spool``.
    """
    source = np.concatenate([np.full(len(rows), number) for number, rows in drawn])
    row = np.concatenate([rows for _, rows in drawn])
    writer: PrefixWriter | SourceWriter
    if facts["tokenizer"] is None:
        writer = PrefixWriter(directory, dtype)
    else:
        writer = SourceWriter(directory, facts["tokenizer"]["vocab_size"])
    lines = hashlib.sha256()
    line_bytes = 0
    try:
        with open(directory / SAMPLE_FILE, "wb") as file:
            order = shuffled(np.arange(len(row)), len(row), "order of the sample", seed)
            for line, at in enumerate(order.tolist(), start=1):
                stored = spool.get(int(source[at]), int(row[at]))
                file.write(stored.line)
                lines.update(stored.line)
                line_bytes += len(stored.line)
                writer.add(
                    stored.tokens, stored.mask, stored.lengths, [(0, line)] * len(stored.lengths)
                )
        inputs = []
        if line_bytes:
            path = os.path.abspath(final / SAMPLE_FILE)
            inputs = [{"path": path, "bytes": line_bytes, "sha256": lines.hexdigest()}]
        else:
            (directory / SAMPLE_FILE).unlink()
        report = writer.finish({**facts, "inputs": inputs})
    finally:
        writer.abandon()
    digest = lines.hexdigest() if line_bytes else None
    return Written(writer.examples, report["fingerprint"], digest)


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Writes ``manifest.json``, each list of row numbers on a line of its own."""
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    text = re.sub(
        r"\[\s+(\d+(?:,\s+\d+)*)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text
    )
    (directory / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
