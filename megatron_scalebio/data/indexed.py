"""Reads Megatron's `.bin/.idx` pairs, any number of them, through few open files.

    .idx    header | length of each sequence, int32 | its offset in .bin, int64 | documents, int64
    .bin    the tokens of all sequences

Megatron's own reader keeps three descriptors a pair; a run may have ten thousand. Its names of the
format stand here once more: importing it takes seconds, and a misspelt path must not wait for that.
"""

import os
import resource
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_scalebio.errors import UserError

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
DTYPES = {
    code: np.dtype(kind)
    for code, kind in enumerate(("u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"), 1)
}
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of token, sequences, documents
_MOST_OPEN = 512


class OpenFiles:
    """Descriptors of the files read last: at most a quarter of those that a process may have."""

    def __init__(self, limit: int | None = None) -> None:
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if allowed == resource.RLIM_INFINITY:
            allowed = 4 * _MOST_OPEN
        self.limit = limit or max(8, min(_MOST_OPEN, allowed // 4))
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, count: int, offset: int) -> bytes:
        """So many bytes of a file.

        Raises:
            UserError: if it is gone, or ends before.
        """
        try:
            content = os.pread(self._descriptor(path), count, offset)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror} (bring it back)") from None
        if len(content) < count:
            raise UserError(f"{path}: ends within a sequence (write it again)")
        return content

    def _descriptor(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        while len(self._open) >= self.limit:
            os.close(self._open.popitem(last=False)[1])
        self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._open[path]


FILES = OpenFiles()


class IndexedPair:
    """The sequences of a `.bin/.idx` pair that has been looked at before.

    Args:
        code: Megatron's, of the type of its tokens.
        sequences: how many.
    """

    __slots__ = ("_code", "prefix", "sequences")

    def __init__(self, prefix: str, code: int, sequences: int) -> None:
        self.prefix, self.sequences, self._code = prefix, sequences, code

    def length(self, index: int) -> int:
        """Tokens of a sequence."""
        return int(self._index(np.int32, HEADER.size + 4 * index))

    def tokens(self, index: int, first: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """Tokens of a sequence, or so many from one of them on."""
        dtype = DTYPES[self._code]
        count = self.length(index) - first if count is None else count
        offset = int(self._index(np.int64, HEADER.size + 4 * self.sequences + 8 * index))
        place = offset + first * dtype.itemsize
        content = FILES.read(f"{self.prefix}.bin", count * dtype.itemsize, place)
        return np.frombuffer(content, dtype)

    def _index(self, dtype: type[np.integer], offset: int) -> Any:
        content = FILES.read(f"{self.prefix}.idx", np.dtype(dtype).itemsize, offset)
        return np.frombuffer(content, dtype)[0]


def check_pair(prefix: Path) -> tuple[int, npt.NDArray[np.int32]]:
    """Checks that a .idx is whole, and that the .bin holds all that it lists.

    Returns:
        Megatron's code of the type of its tokens; the length of each sequence, as a map of the
        file, which stays open as long as that is held.

    Raises:
        UserError: if not.
    """
    for suffix in (".idx", ".bin"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise UserError(f"{prefix}{suffix}: no such file (run prepare again)")
    path = Path(f"{prefix}.idx")
    with path.open("rb") as file:
        content = file.read(HEADER.size)
    broken = UserError(f"{path}: not a whole Megatron index (write it again)")
    if len(content) < HEADER.size:
        raise broken
    magic, version, code, sequences, documents = HEADER.unpack(content)
    whole = HEADER.size + 12 * sequences + 8 * documents
    known = (magic, version) == (MAGIC, VERSION) and code in DTYPES
    if not known or path.stat().st_size < whole:
        raise broken
    if sequences == 0:
        raise UserError(f"{path}: holds no sequence (drop it or refill it)")
    lengths = np.memmap(path, np.int32, "r", HEADER.size, (sequences,))
    offsets = np.memmap(path, np.int64, "r", HEADER.size + 4 * sequences, (sequences,))
    if lengths.min() < 0 or offsets.min() < 0:
        raise broken
    size = np.int64(DTYPES[code].itemsize)
    need, have = int((offsets + lengths * size).max()), Path(f"{prefix}.bin").stat().st_size
    if have < need:
        raise UserError(f"{prefix}.bin: truncated: {have} bytes of {need} (write it again)")
    return code, lengths
