"""What the parts of gpu_check share: results that outlive them, and processes that they start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Results:
    """Results by name, written and printed as each comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}
        self._lock = threading.Lock()

    def add(self, name: str, value: Any) -> None:
        with self._lock:
            self.found[name] = value
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")
            print(f"{self.path.stem} {name}: {json.dumps(value)}", flush=True)


def run(words: list[str], environment: dict[str, str] | None = None) -> str:
    """What Python prints, run with these words; RuntimeError with what it said if it failed."""
    ended = subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(
            filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
        ), **(environment or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if ended.returncode:
        raise RuntimeError(f"exit {ended.returncode}: {ended.stderr[-1500:]}")
    return ended.stdout
