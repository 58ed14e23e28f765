"""Opens a file of records, of whatever kind it is."""

from pathlib import Path

from megatron_scalebio.data.records import OnBad, RecordReader, Records
from megatron_scalebio.data.tables import TABLES, bare_suffix


def open_records(path: Path, on_bad: OnBad | None = None, shown: Path | None = None) -> Records:
    """The records of a file: a table by its name, or else JSON or JSONL.

    Args:
        on_bad: is told of each record that cannot be read, with its line; None: the first ends the
            reading with a :class:`UserError`.
        shown: what messages call the file, where it is a copy.
    """
    return TABLES.get(bare_suffix(path), RecordReader)(path, on_bad, shown)
