"""What the ranks last told of themselves, in the run's folder, for `status` to read.

FOLDER/ranks.json     {"verdict": why the run ended, "ranks": [Status and where it was, ...]}
"""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_scalebio.guard.status import Status

BOARD_FILE = "ranks.json"
_EVERY_S = 10.0


class Board:
    """The file; a disk that refuses it is no reason to end a run."""

    def __init__(self, folder: Path) -> None:
        self._path, self._written_at = folder / BOARD_FILE, -_EVERY_S
        self._ranks: list[dict[str, Any]] = []

    def tell(self, ranks: Sequence[Status]) -> None:
        """What all ranks tell; a few times a minute is enough."""
        self._ranks = [{**asdict(status), "where": status.where} for status in ranks]
        if time.monotonic() - self._written_at >= _EVERY_S:
            self._written_at = time.monotonic()
            self._write({"verdict": "", "ranks": self._ranks})

    def close(self, verdict: str) -> None:
        """Why the run ended, beside what the ranks told last, to this process or another."""
        ranks = self._ranks or read_board(self._path.parent)["ranks"]
        self._write({"verdict": verdict, "ranks": ranks})

    def _write(self, content: dict[str, Any]) -> None:
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(content) + "\n")
            temporary.replace(self._path)


def read_board(folder: Path) -> dict[str, Any]:
    """What was told last; without ranks where nothing was."""
    try:
        return json.loads((folder / BOARD_FILE).read_text())
    except (OSError, ValueError):
        return {"verdict": "", "ranks": []}
