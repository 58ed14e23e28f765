"""Tells files apart by their sizes and by samples of their bytes, in milliseconds at any size.

Other data, another tokenizer's or a model trained further differ nearly everywhere: a few samples
tell. A change of a few bytes that lie between two samples goes unseen.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

_BLOCK_BYTES = 4096


def of_files(paths: Iterable[Path], samples: int) -> str:
    """SHA-256 of each file's size and of so many blocks, evenly spaced; all of a small file."""
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{size}\n".encode())
        with path.open("rb") as stream:
            for place in range(0, size, max(_BLOCK_BYTES, size // samples)):
                stream.seek(place)
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()
