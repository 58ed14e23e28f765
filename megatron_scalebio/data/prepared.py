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
        self._rows = self._read_rows(folder / ROWS_FILE)

    def _read_rows(self, path: Path) -> np.ndarray | None:
        if not path.is_file():
            return None
        try:
            rows = np.load(path, mmap_mode="r")
            if rows.ndim != 2 or rows.shape[1] != 2 or rows.dtype.kind not in "iu":
                raise ValueError("it holds no pairs of file and line")
        except (EOFError, OSError, ValueError, AttributeError) as error:
            raise _damaged(path, error) from None
        return rows

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
            try:
                for line in file:
                    entry = json.loads(line)
                    if not {"why", "file", "line"} <= entry.keys():
                        raise ValueError("a line lacks 'why', 'file' or 'line'")
                    counts[str(entry["why"])] += 1
                    if len(listed) < count:
                        listed.append(entry)
            except (AttributeError, RecursionError, ValueError) as error:
                raise _damaged(path, error) from None
        return listed, counts

    def _origin(self, number: int) -> tuple[str | None, int | None]:
        if self._rows is None or number >= len(self._rows):
            return None, None
        file, line = self._rows[number].tolist()
        inputs = self.description.get("inputs", [])
        try:
            return str(inputs[file]["path"]) if 0 <= file < len(inputs) else None, line
        except (KeyError, TypeError):
            raise _damaged(self.folder / SOURCE_FILE, "'inputs' is not a list of files") from None


def _damaged(path: Path, problem: Exception | str) -> UserError:
    said = " ".join(str(problem).split())
    return UserError(f"{path}: is damaged ({said}) (run prepare again)")
