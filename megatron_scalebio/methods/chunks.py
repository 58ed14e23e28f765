"""Something about every row, worked out chunk by chunk and kept on disk: a stopped run goes on.

FOLDER/made_for.json     what it belongs to; another run's is refused
FOLDER/chunk-00000.npy   rows 0 to 127, [rows, …]
FOLDER/chunk-00001.npy   …
"""

import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_scalebio import runtime
from megatron_scalebio.errors import UserError
from megatron_scalebio.logs.console import RunConsole
from megatron_scalebio.mixture.sampler import Ints
from megatron_scalebio.whole_files import replaced, write_json

Array = npt.NDArray[Any]
_SECONDS_BETWEEN_LINES = 10.0


class Chunks:
    """The chunks of one quantity.

    Args:
        made_for: plain values that decide what the chunks hold.
    """

    def __init__(self, folder: Path, rows: int, made_for: dict[str, Any], size: int = 128) -> None:
        self.folder, self.size = folder, size
        self.rows_of = np.array_split(np.arange(rows), range(size, rows, size))
        self._made_for = {**made_for, "rows": rows, "chunk": size}
        runtime.on_main(self._claim)

    def _claim(self) -> None:
        path = self.folder / "made_for.json"
        if not path.is_file():
            write_json(path, self._made_for)
            return
        try:
            found = json.loads(path.read_text())
        except ValueError:
            found = None
        # As JSON gives it back: tuples are lists there.
        if found != json.loads(json.dumps(self._made_for)):
            raise UserError(
                f"{self.folder}: was made for other data or options (choose a new train.output, or "
                "remove this folder)"
            )

    def is_whole(self) -> bool:
        return not self._missing()

    def _missing(self) -> list[int]:
        numbers = range(len(self.rows_of))
        return runtime.on_main(lambda: [n for n in numbers if not self._path(n).is_file()])

    def fill(self, what: str, work: Callable[[Ints], Array], signals: runtime.StopSignals) -> bool:
        """Works out the missing chunks. A collective.

        Args:
            what: for the terminal.
            work: rows → an array whose first axis they are; called on all ranks alike, the result
                of rank 0 counts.

        Returns:
            False if a signal stopped it.
        """
        console, missing = RunConsole([], 1), self._missing()
        rows = sum(len(chunk) for chunk in self.rows_of)
        began = said = time.perf_counter()
        fresh = 0
        for number in missing:
            row_n = self.rows_of[number]
            values = work(row_n)
            runtime.on_main(partial(self._write, number, values))
            fresh += len(row_n)
            now = time.perf_counter()
            if runtime.is_main() and (now - said > _SECONDS_BETWEEN_LINES or number == missing[-1]):
                rate = fresh / (now - began)
                console.note(f"{what}  {int(row_n[-1]) + 1:,}/{rows:,} examples  {rate:.3g}/s")
                said = now
            [stopped] = runtime.any_rank(signals.received)
            if stopped and number != missing[-1]:
                if runtime.is_main():
                    console.warn("stopped by a signal; the same command resumes")
                return False
        return True

    def _path(self, number: int) -> Path:
        return self.folder / f"chunk-{number:05d}.npy"

    def _write(self, number: int, values: Array) -> None:
        assert len(values) == len(self.rows_of[number])
        write_array(self._path(number), values)

    def __iter__(self) -> Iterator[tuple[Ints, Array]]:
        """Every chunk's rows and values."""
        for number, row_n in enumerate(self.rows_of):
            yield row_n, read_array(self._path(number), len(row_n))

    def joined(self) -> Array:
        return np.concatenate([values for _, values in self])


def write_array(path: Path, values: Array) -> None:
    """Replaces a .npy file in one step."""
    with replaced(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, values)


def read_array(path: Path, rows: int) -> Array:
    """A .npy file of so many rows. Never runs code.

    Raises:
        UserError: if it is damaged.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: unreadable: {error} (remove it)") from None
    if not isinstance(values, np.ndarray) or len(values) != rows:
        raise UserError(f"{path}: is not a file that this run wrote (remove it)")
    return values
