"""Reads a prepared folder for people: its examples, what trains in them, where they are from."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_scalebio.data.indexed import IndexedPair, check_pair
from megatron_scalebio.data.scan import read_description
from megatron_scalebio.data.source_writer import (
    LEFT_OUT_FILE,
    LOSS_MASK,
    ROWS_FILE,
    SOURCE_FILE,
    TOKENS,
)
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.errors import UserError


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
        if not (folder / SOURCE_FILE).is_file():
            raise UserError(
                f"{folder}: is not a prepared folder: {SOURCE_FILE} is missing (name a folder that "
                "prepare or sample wrote)"
            )
        self.folder = folder
        self.description = read_description(folder / SOURCE_FILE)
        self.model: str = self.description["tokenizer"]["model"]
        self._tokens, self._mask = (self._pair(folder / part) for part in (TOKENS, LOSS_MASK))
        rows = folder / ROWS_FILE
        try:
            self._rows = np.load(rows, mmap_mode="r") if rows.is_file() else None
        except (OSError, ValueError) as error:
            raise UserError(f"{rows}: is damaged ({error}) (run prepare again)") from None

    def __len__(self) -> int:
        return self._tokens.sequences

    @staticmethod
    def _pair(prefix: Path) -> IndexedPair:
        code, lengths_D = check_pair(prefix)
        return IndexedPair(str(prefix), code, len(lengths_D))

    def examples(self, first: int, count: int, tokenizer: Tokenizer) -> Iterator[Shown]:
        """Examples in the order of the folder."""
        for number in range(first, min(len(self), first + count)):
            ids, mask = self._tokens.tokens(number), self._mask.tokens(number)
            borders = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
            pieces = tuple(
                Piece(tokenizer.decode(ids[low:high].tolist()), bool(mask[low]))
                for low, high in pairwise(borders)
                if high > low
            )
            file, line = self._origin(number)
            yield Shown(number, len(ids), int(mask.sum()), file, line, pieces)

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
