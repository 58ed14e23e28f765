"""What a run knows of its sources before it reads from them, in one file of its cache.

    arrays of each Megatron prefix: order of documents | starts of samples | order of samples
    entries: what was seen of each source, with sizes and times of its files       (JSON)
    where the entries begin, magic                                                (16 bytes)

Ten thousand sources are looked at once. As long as no file of theirs changes, a resumed run opens
this file alone, and so do all ranks but the first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_scalebio.data.scan import Facts, Packing, look_at, stamp
from megatron_scalebio.errors import disk_errors_named

CATALOG_FILE = "sources.catalog"
_TRAILER = struct.Struct("<Q8s")
_MAGIC = b"sources1"
_THREADS = 8  # a shared disk answers each in milliseconds, whatever it is asked
_AHEAD = 64  # sources looked at before the first of them is written
_ALIGNED = 8  # bytes

OnOpened = Callable[[int, int], None]  # sources looked at, of how many


class Entry(NamedTuple):
    """A source in the catalog; ``at``: where its arrays begin, in bytes."""

    facts: Facts
    at: int


class Catalog:
    """The sources of a run, by their paths.

    Args:
        arrays: all bytes of the file; None where there is no prefix.
    """

    def __init__(self, entries: dict[str, Entry], arrays: npt.NDArray[np.uint8] | None) -> None:
        self._entries, self._arrays = entries, arrays

    def facts(self, path: str) -> Facts:
        return self._entries[path].facts

    def packing(self, path: str) -> Callable[[], Packing]:
        """Gives how a prefix is packed: views of the file, of which no more is read than used."""
        assert self._arrays is not None
        return partial(_packing, self._arrays, *self._entries[path])


def _packing(arrays: npt.NDArray[np.uint8], facts: Facts, at: int) -> Packing:
    parts: list[npt.NDArray[Any]] = []
    for shape, dtype in Packing.layout(facts.sequences, facts.examples):
        end = at + int(np.prod(shape)) * np.dtype(dtype).itemsize
        parts.append(arrays[at:end].view(dtype).reshape(shape))
        at = -(-end // _ALIGNED) * _ALIGNED
    return Packing(*parts)


def open_catalog(
    cache: Path,
    paths: Sequence[str],
    seq_length: int,
    seed: int,
    on_opened: OnOpened,
    check: bool = True,
) -> Catalog:
    """The catalog of these paths; made where there is none, or a file of theirs has changed.

    Args:
        check: whether files have changed; needless where another rank has just done so.

    Raises:
        UserError: naming the path that is missing, damaged, empty or too short.
    """
    path = cache / CATALOG_FILE
    wanted = list(dict.fromkeys(paths))
    made_for = {"seq_length": seq_length, "seed": seed}
    entries = _read(path, wanted, made_for, check)
    if entries is None:
        with disk_errors_named(path):
            cache.mkdir(parents=True, exist_ok=True)
            entries = _write(path, wanted, made_for, on_opened)
    packed = any(entry.facts.packed for entry in entries.values())
    # Not as np.memmap, whose slices would each drag its own bookkeeping along.
    arrays = np.asarray(np.memmap(path, np.uint8, "r")) if packed else None
    return Catalog(entries, arrays)


def _read(
    path: Path, wanted: Sequence[str], made_for: dict[str, int], check: bool
) -> dict[str, Entry] | None:
    """The entries of a catalog; None if there is none of just these sources as they are now."""
    try:
        with path.open("rb") as file:
            file.seek(-_TRAILER.size, 2)
            begin, magic = _TRAILER.unpack(file.read())
            if magic != _MAGIC:
                return None
            file.seek(begin)
            content = json.loads(file.read()[: -_TRAILER.size])
        if content["made_for"] != made_for or set(content["sources"]) != set(wanted):
            return None
        tokenizers = content["tokenizers"]
        entries = {
            name: Entry(Facts.from_list(values, tokenizers), at)
            for name, (at, values) in content["sources"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
    if check:
        with ThreadPoolExecutor(_THREADS) as pool:
            now = list(pool.map(stamp, wanted))
        if now != [entries[name].facts.stamp for name in wanted]:
            return None
    return entries


def _write(
    path: Path, wanted: Sequence[str], made_for: dict[str, int], on_opened: OnOpened
) -> dict[str, Entry]:
    """Looks at every source and writes the catalog, whole or not at all."""
    entries: dict[str, Entry] = {}
    tokenizers: list[dict[str, Any]] = []
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        for name, (facts, packing) in zip(wanted, _looked_at(wanted, made_for), strict=True):
            if facts.tokenizer is not None and facts.tokenizer not in tokenizers:
                tokenizers.append(facts.tokenizer)
            entries[name] = Entry(facts, file.tell())
            for part in packing or ():
                file.write(np.ascontiguousarray(part).data)
                file.write(bytes(-file.tell() % _ALIGNED))
            on_opened(len(entries), len(wanted))
        begin = file.tell()
        sources = {name: [at, facts.as_list(tokenizers)] for name, (facts, at) in entries.items()}
        content = {"made_for": made_for, "tokenizers": tokenizers, "sources": sources}
        file.write(json.dumps(content).encode() + _TRAILER.pack(begin, _MAGIC))
    temporary.replace(path)
    # Read back, all sources share one description of their tokenizer.
    return _read(path, wanted, made_for, check=False) or entries


def _looked_at(
    wanted: Sequence[str], made_for: dict[str, int]
) -> Iterator[tuple[Facts, Packing | None]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(wanted), _AHEAD):
            yield from pool.map(
                lambda name: look_at(name, len(wanted), **made_for), wanted[start : start + _AHEAD]
            )
