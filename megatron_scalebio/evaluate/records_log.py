"""A JSONL file to which finished pieces of work are appended, so that a stopped run goes on."""

import json
import os
from pathlib import Path
from typing import Any

from megatron_scalebio.errors import UserError, disk_errors_named


class RecordsLog:
    """Records in the order in which they were finished.

    A last line that was cut off by a crash is removed on opening.

    Raises:
        UserError: an earlier line is damaged, or the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        with disk_errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab+") as file:
                file.seek(0)
                content = file.read()
                whole = content[: content.rfind(b"\n") + 1]
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self.records.append(json.loads(line))
            except ValueError:
                raise UserError(f"{path}:{number}: damaged line (remove the line)") from None

    def append(self, record: dict[str, Any]) -> None:
        """Writes a record through to the disk."""
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with disk_errors_named(self.path), open(self.path, "ab") as file:
            file.write(line.encode("utf-8", "replace"))
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
