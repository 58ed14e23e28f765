"""Safetensors files, read and written a tensor at a time.

    8 bytes: length of the header, little-endian │ header, JSON │ the tensors' bytes

Plain reads instead of a memory map: mapped pages count as resident memory until the file is closed.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_scalebio.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FIX = "fetch the file again"
# Of one write. `cp`, too, writes little at a time: on ext4 under Linux 6.18, writes of 1 to 16 MiB
# took three times as long.
_BLOCK_BYTES = 128 << 10


@dataclass(frozen=True)
class Info:
    """One tensor of a file.

    Args:
        begin: where its bytes begin, in bytes from the file's beginning; in other kinds of files,
            which of them comes first.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a file holds: `entries` in the order of their bytes, `raw` all bytes before them."""

    raw: bytes
    metadata: dict[str, str] | None
    entries: dict[str, Info]


def read_header(path: Path) -> Header:
    """Reads and checks what a file says it holds.

    Raises:
        UserError: if it is no safetensors file, or cut short (naming the first tensor affected).
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise UserError(f"{path}: cut short at {size} bytes ({_FIX})")
        text = stream.read(length)
    try:
        described = json.loads(text)
        metadata = described.pop("__metadata__", None)
        entries = {name: _entry(path, item, 8 + length) for name, item in described.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a safetensors file: {error or type(error).__name__} ({_FIX})"
        ) from None
    entries = dict(sorted(entries.items(), key=lambda item: item[1].begin))
    for name, entry in entries.items():
        if entry.begin + entry.nbytes > size:
            raise UserError(f"{path}: cut short at {size} bytes, within tensor {name} ({_FIX})")
    return Header(start + text, metadata, entries)


def _entry(file: Path, item: dict[str, Any], start: int) -> Info:
    if item["dtype"] not in DTYPES:
        raise ValueError(f"dtype {item['dtype']} is not supported")
    begin, end = item["data_offsets"]
    entry = Info(file, DTYPES[item["dtype"]], tuple(item["shape"]), start + begin)
    if begin < 0 or end - begin != entry.nbytes:
        raise ValueError(f"{end - begin} bytes for shape {list(entry.shape)}")
    return entry


def read_into(stream: FileIO, begin: int, out: Tensor) -> None:
    """Fills a contiguous tensor with bytes of an unbuffered file.

    Raises:
        UserError: if the file ends before.
    """
    view = bytes_of(out)
    stream.seek(begin)
    while view:
        count = stream.readinto(view)
        if not count:
            raise UserError(f"{stream.name}: cut short while it was read ({_FIX})")
        view = view[count:]


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's own bytes."""
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def build_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None
) -> bytes:
    """The bytes before the tensors of a file that holds these, in this order."""
    described: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        described[name] = {
            "dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


@contextmanager
def writing(path: Path, header: bytes) -> Iterator[FileIO]:
    """Opens a new file behind its header; what is written goes to the disk before it closes."""
    with path.open("xb", buffering=0) as stream:
        write_all(stream, memoryview(header))
        yield stream
        os.fsync(stream.fileno())


def write_all(stream: FileIO, view: memoryview) -> None:
    """Writes all bytes to an unbuffered file."""
    while view:
        view = view[FileIO.write(stream, view[:_BLOCK_BYTES]) :]
