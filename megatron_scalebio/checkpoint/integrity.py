"""Checksums of a checkpoint's files: Megatron-Core's integrity.json, SHA-256 by file name.

    saved    each rank hashes what it has written, in the background where it writes there, and
             leaves a part; `seal` joins the parts
    loaded   the ranks share the files

Megatron reads the same file (`verify_integrity=True`). It would write it on rank 0 alone, which
reads the whole checkpoint for that while all others wait.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME as MANIFEST

_PART = "integrity-{}.part"  # of a rank, until the checkpoint is whole


def hash_written(folder: Path, rank: int) -> None:
    """Leaves the checksums of the files that this rank has written into a checkpoint folder."""
    sums = _sums(folder.glob(f"__{rank}_*.distcp"))
    (folder / _PART.format(rank)).write_text(json.dumps(sums))


def seal(folder: Path) -> None:
    """Joins the ranks' parts to the manifest, and adds the files that no rank has told of."""
    sums: dict[str, str] = {}
    parts = list(folder.glob(_PART.format("*")))
    for part in parts:
        sums |= json.loads(part.read_text())
    told = {MANIFEST, *sums, *(part.name for part in parts)}
    sums |= _sums(path for path in folder.iterdir() if path.is_file() and path.name not in told)
    content = {"algorithm": "sha256", "files": dict(sorted(sums.items()))}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2))
    for part in parts:
        part.unlink()


def changed_file(folder: Path, rank: int = 0, ranks: int = 1) -> str:
    """The first file of this rank's share that is not what was saved, and how; "" if there is none.

    A checkpoint without a manifest, such as one of Megatron-LM, has nothing to compare with.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return ""
    try:
        content = json.loads(manifest.read_text())
        algorithm, sums = content["algorithm"], dict(content["files"])
    except (ValueError, KeyError, TypeError):
        return f"{manifest}: unreadable"
    if algorithm != "sha256":
        return ""
    for name in sorted(sums)[rank::ranks]:
        path = folder / name
        try:
            same = _sums([path])[name] == sums[name]
        except OSError as error:
            return f"{path}: {error.strerror}"
        if not same:
            return f"{path}: its bytes have changed since it was saved (SHA-256 differs)"
    return ""


def _sums(paths: Iterable[Path]) -> dict[str, str]:
    sums = {}
    for path in paths:
        with path.open("rb") as stream:
            sums[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums
