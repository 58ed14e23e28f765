"""Reads a prepared folder for people: its examples, with what trains in them, and where they are
from. Nothing of Megatron is imported: it starts at once.

    .idx   magic, version, type of token | sequences | documents | lengths, int32 | offsets | …
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_scalebio.data.source_writer import LEFT_OUT_FILE, LOSS_MASK, ROWS_FILE, SOURCE_FILE
from megatron_scalebio.data.source_writer import TOKENS as TOKENS_FILE
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.errors import UserError

_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


class Piece(NamedTuple):
    """A stretch of an example's text; ``trains``: its tokens are targets."""

    text: str
    trains: bool


@dataclass(frozen=True)
class Shown:
    """One example.

    Attributes:
        number: in the folder, from 0.
        file, line: of its record; None where the folder does not say.
    """

    number: int
    tokens: int
    targets: int
    file: str | None
    line: int | None
    pieces: tuple[Piece, ...]


class PreparedFolder:
    """A folder by ``prepare`` or ``sample``.

    Raises:
        UserError: it is none, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.description: dict[str, Any] = json.loads(
                (folder / SOURCE_FILE).read_text(encoding="utf-8")
            )
            self.model = str(self.description["tokenizer"]["model"])
            self._lengths, self._tokens = _part(folder / TOKENS_FILE)
            _, self._mask = _part(folder / LOSS_MASK)
            rows = folder / ROWS_FILE
            self._rows = np.load(rows, mmap_mode="r") if rows.is_file() else None
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: is no prepared folder: {Path(error.filename).name} is missing (name a "
                "folder that prepare or sample wrote)"
            ) from None
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise UserError(f"{folder}: is damaged ({error!r}) (run prepare again)") from None

    def __len__(self) -> int:
        return len(self._lengths)

    def examples(self, first: int, count: int, tokenizer: Tokenizer) -> Iterator[Shown]:
        """Examples in the order of the folder."""
        at = int(self._lengths[:first].sum())
        for number in range(first, min(len(self), first + count)):
            length = int(self._lengths[number])
            ids, mask = self._tokens[at : at + length], self._mask[at : at + length]
            at += length
            borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), length]
            pieces = tuple(
                Piece(tokenizer.decode(ids[low:high].tolist()), bool(mask[low]))
                for low, high in pairwise(borders)
                if high > low
            )
            file, line = self._origin(number)
            yield Shown(number, length, int(mask.sum()), file, line, pieces)

    def left_out(self, count: int) -> tuple[list[dict[str, Any]], Counter[str]]:
        """The first records that became no example, and how many there are by reason."""
        path, counts = self.folder / LEFT_OUT_FILE, Counter[str]()
        listed: list[dict[str, Any]] = []
        if not path.is_file():
            return [], counts
        with open(path, encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                counts[entry["why"]] += 1
                if len(listed) < count:
                    listed.append(entry)
        return listed, counts

    def _origin(self, number: int) -> tuple[str | None, int | None]:
        if self._rows is None or number >= len(self._rows):
            return None, None
        file, line = self._rows[number].tolist()
        inputs = self.description.get("inputs", [])
        return (inputs[file]["path"] if file < len(inputs) else None), line


def _part(prefix: Path) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of the sequences of a `.bin/.idx` pair, and its tokens."""
    index = Path(f"{prefix}.idx")
    with open(index, "rb") as file:
        _, _, code, sequences, _ = _HEADER.unpack(file.read(_HEADER.size))
    lengths = np.memmap(index, np.int32, "r", _HEADER.size, (sequences,))
    return lengths, np.memmap(f"{prefix}.bin", _DTYPES[code], "r")
