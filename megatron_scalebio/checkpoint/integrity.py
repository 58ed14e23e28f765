"""Checksums of a checkpoint's files: Megatron-Core's integrity.json, SHA-256 by file name.

    saved    each rank hashes what it has written, in the background where it writes there, and
             leaves a part; `seal` joins the parts
    loaded   the ranks share the files

Megatron reads the same file (`verify_integrity=True`). It would write it on rank 0 alone, which
reads the whole checkpoint for that while all others wait.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "integrity.json"  # as in megatron.core, whose import takes seconds
_PART = "integrity-{}.part"  # of a rank, until the checkpoint is whole
_TEMPORARY = ".tmp"


def hash_written(folder: Path, rank: int) -> None:
    """Leaves the checksums of the files that this rank has written into a checkpoint folder.

    A disk that refuses is `seal`'s to tell, which does what was not done here.
    """
    with contextlib.suppress(OSError):
        sums = {path.name: _sum(path) for path in folder.glob(f"__{rank}_*.distcp")}
        _write(folder / _PART.format(rank), sums)


def seal(folder: Path) -> None:
    """Joins the ranks' parts to the manifest, and adds the files that no rank has told of.

    Raises:
        OSError: if the disk refuses.
    """
    for cut_off in folder.glob(_PART.format("*") + _TEMPORARY):
        cut_off.unlink()
    sums: dict[str, str] = {}
    for part in folder.glob(_PART.format("*")):
        sums |= json.loads(part.read_text())
        part.unlink()
    for path in folder.iterdir():
        if path.is_file() and path.name not in (MANIFEST, *sums):
            sums[path.name] = _sum(path)
    _write(folder / MANIFEST, {"algorithm": "sha256", "files": dict(sorted(sums.items()))})


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
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{manifest}: unreadable ({error})"
    if algorithm != "sha256":
        return f"{manifest}: {algorithm!r} is not a checksum that is known here"
    for name in sorted(sums)[rank::ranks]:
        path = folder / name
        try:
            same = _sum(path) == sums[name]
        except OSError as error:
            return f"{path}: {error.strerror}"
        if not same:
            return f"{path}: its bytes have changed since it was saved (SHA-256 differs)"
    return ""


def _sum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write(path: Path, content: Any) -> None:
    """Whole and on the disk, or not at all."""
    temporary = path.with_name(path.name + _TEMPORARY)
    with temporary.open("w") as stream:
        json.dump(content, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path)
