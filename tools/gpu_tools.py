"""What the parts of gpu_check share: results that outlive them, and processes that they start."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
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


def run(
    words: list[str],
    environment: dict[str, str] | None = None,
    until: Callable[[], bool] | None = None,
) -> str:
    """What Python prints, run with these words; RuntimeError with what it said if it failed.

    Args:
        until: asked every second; the process is killed, and has done well, once it is true.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, *words], stdout=out, stderr=said,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )  # fmt: skip
        enough = False
        while process.poll() is None and not enough:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1 if until else None)
            enough = until is not None and until()
        if enough:
            process.kill()
            process.wait()
        for stream in (out, said):
            stream.seek(0)
        if process.returncode and not enough:
            lines = said.read().splitlines()
            ours = [line for line in lines if line.startswith("megatron-scalebio:")]
            told = "\n".join([*ours, *lines[-20:]])  # under a launcher, theirs are the last
            raise RuntimeError(f"exit {process.returncode}: {told}")
        return out.read()
