"""What a run knows of its sources before it reads from them, in one file of its cache.

    arrays of each Megatron prefix: order of documents | starts of samples | order of samples
    what was seen of the sources, with the times of their files, in columns        (JSON)
    where that begins, magic                                                      (16 bytes)

Ten thousand sources are looked at once. As long as no file of theirs changes, a resumed run opens
this file alone, and so do all ranks but the first.
"""

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_scalebio.data.scan import Facts, Packing, look_at, stamp
from megatron_scalebio.whole_files import replaced

CATALOG_FILE = "sources.catalog"
_TRAILER = struct.Struct("<Q8s")
_MAGIC = b"sources1"
_THREADS = 8  # a shared disk answers each in milliseconds, whatever it is asked
_AHEAD = 64  # sources looked at before the first of them is written
_ALIGNED = 8  # bytes

_COUNTS = ("code", "mask_code", "sequences", "examples", "tokens", "longest", "largest_id")

OnOpened = Callable[[int, int], None]  # sources looked at, of how many


class Catalog:
    """Sources by number, in columns: objects of their own would take a kilobyte each.

    Args:
        content: of the file, without its arrays.
        order: where in its columns each source is.
        arrays: all bytes of the file; None where there is no prefix.
    """

    def __init__(
        self, content: dict[str, Any], order: Sequence[int], arrays: npt.NDArray[np.uint8] | None
    ) -> None:
        self._order, self._arrays = np.array(order), arrays
        self._at, self._packed = np.array(content["at"]), np.array(content["packed"])
        self._counts = np.array([content[name] for name in _COUNTS])
        self._fingerprints = content["fingerprint"]
        self._tokenizers = content["tokenizers"]
        self._tokenizer = np.array(content["tokenizer"])

    def facts(self, number: int) -> Facts:
        row = int(self._order[number])
        counts = dict(zip(_COUNTS, self._counts[:, row].tolist(), strict=True))
        return Facts(
            stamp="", packed=bool(self._packed[row]), **counts,
            fingerprint=self._fingerprints[row],
            tokenizer=self._tokenizers[self._tokenizer[row]],
        )  # fmt: skip

    def packing(self, number: int) -> Packing:
        """How a prefix is packed: views of the file, of which no more is read than is used."""
        facts, at = self.facts(number), int(self._at[self._order[number]])
        assert self._arrays is not None
        parts: list[npt.NDArray[Any]] = []
        for shape, dtype in Packing.layout(facts.sequences, facts.examples):
            end = at + int(np.prod(shape)) * np.dtype(dtype).itemsize
            parts.append(self._arrays[at:end].view(dtype).reshape(shape))
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
    """The catalog of these paths, by their order; made where there is none, or a file has changed.

    Args:
        check: whether files have changed; needless where another rank has just done so.

    Raises:
        UserError: naming the path that is missing, damaged, empty or too short.
    """
    path = cache / CATALOG_FILE
    wanted = sorted(set(paths))
    made_for = {"seq_length": seq_length, "seed": seed, "paths": wanted}
    content = _read(path, made_for, check)
    if content is None:
        _write(path, made_for, on_opened)
        content = _read(path, made_for, check=False)
        assert content is not None
    # Not as np.memmap, whose slices would each drag its own bookkeeping along.
    arrays = np.asarray(np.memmap(path, np.uint8, "r")) if any(content["packed"]) else None
    places = {name: place for place, name in enumerate(wanted)}
    return Catalog(content, [places[name] for name in paths], arrays)


def _read(path: Path, made_for: dict[str, Any], check: bool) -> dict[str, Any] | None:
    """The columns of a catalog; None if there is none of just these sources as they are now."""
    try:
        with path.open("rb") as file:
            file.seek(-_TRAILER.size, 2)
            begin, magic = _TRAILER.unpack(file.read())
            if magic != _MAGIC:
                return None
            file.seek(begin)
            content = json.loads(file.read()[: -_TRAILER.size])
        if content.pop("made_for") != made_for:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    if check:
        with ThreadPoolExecutor(_THREADS) as pool:
            if list(pool.map(stamp, made_for["paths"])) != content["stamp"]:
                return None
    return content


def _write(path: Path, made_for: dict[str, Any], on_opened: OnOpened) -> None:
    """Looks at every source and writes the catalog, whole or not at all."""
    wanted = made_for["paths"]
    columns: dict[str, list[Any]] = {name: [] for name in (*Facts.__slots__, "at")}
    tokenizers: list[dict[str, Any] | None] = []
    with replaced(path) as temporary, temporary.open("wb") as file:
        for done, (facts, packing) in enumerate(_looked_at(made_for), 1):
            if facts.tokenizer not in tokenizers:
                tokenizers.append(facts.tokenizer)
            for name in Facts.__slots__[:-1]:
                columns[name].append(getattr(facts, name))
            columns["tokenizer"].append(tokenizers.index(facts.tokenizer))
            columns["at"].append(file.tell())
            for part in packing or ():
                file.write(np.ascontiguousarray(part).data)
                file.write(bytes(-file.tell() % _ALIGNED))
            on_opened(done, len(wanted))
        begin = file.tell()
        content = {"made_for": made_for, "tokenizers": tokenizers, **columns}
        file.write(json.dumps(content).encode() + _TRAILER.pack(begin, _MAGIC))


def _looked_at(made_for: dict[str, Any]) -> Iterator[tuple[Facts, Packing | None]]:
    wanted, length, seed = made_for["paths"], made_for["seq_length"], made_for["seed"]
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(wanted), _AHEAD):
            yield from pool.map(
                lambda name: look_at(name, len(wanted), length, seed),
                wanted[start : start + _AHEAD],
            )
