"""Files that are there whole or not at all: a reader never sees half of one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_scalebio.errors import disk_errors_named


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives a place to write to, which takes the file's if the block ends well.

    Raises:
        UserError: if the disk refuses; the file is as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8, as `replaced`; half a surrogate pair becomes a question mark."""
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
