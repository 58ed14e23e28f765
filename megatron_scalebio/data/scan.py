"""A first look at a source: what it is, how much it holds, and what would break a run later on.

FOLDER with source.json       one example per sequence, with a loss mask   (from `prepare`)
PREFIX of a .bin/.idx pair    documents packed to seq_length as Megatron's GPTDataset does
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_scalebio.data.indexed import DTYPES, check_pair
from megatron_scalebio.data.source_writer import SOURCE_FILE
from megatron_scalebio.errors import UserError
from megatron_scalebio.fingerprint import of_files

IDS_LOOKED_AT = 65536  # of a .bin, for its largest id
_IDS_OF_ALL = 2**26  # of all sources together
_SAMPLES = 8  # of a .bin, for its fingerprint; few: thousands of prefixes may be on a slow disk


class Packing(NamedTuple):
    """How documents become samples of seq_length, as `packing_order` gives it."""

    order_D: npt.NDArray[np.integer]
    starts: npt.NDArray[np.integer]
    shuffled: npt.NDArray[np.integer]

    @staticmethod
    def layout(documents: int, samples: int) -> list[tuple[tuple[int, ...], type]]:
        """Shape and type of each array, which follow from how many there are."""
        wide = samples >= np.iinfo(np.uint32).max - 1
        return [
            ((documents,), np.int32),
            ((samples + 1, 2), np.int32),
            ((samples,), np.int64 if wide else np.uint32),
        ]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a first look at a source tells.

    Attributes:
        stamp: sizes and times of its files.
        packed: it is a prefix.
        code, mask_code: Megatron's, of the types of its tokens and of its loss mask.
        sequences: in its .bin; examples: that a run takes from it.
        tokens: in all. longest: of an example, in input tokens.
        largest_id: among the first tokens.
        tokenizer: of prepared sets: type, model, vocab_size, fingerprint.
    """

    stamp: str
    packed: bool
    code: int
    mask_code: int
    sequences: int
    examples: int
    tokens: int
    longest: int
    largest_id: int
    fingerprint: str
    tokenizer: dict[str, Any] | None  # last: what is written of it is its number


def look_at(path: str, sources: int, seq_length: int, seed: int) -> tuple[Facts, Packing | None]:
    """Looks at a prepared folder or a prefix.

    Args:
        sources: how many are looked at: with many, less of each.

    Raises:
        UserError: naming what is missing, damaged, empty or too short.
    """
    now = stamp_of(path)
    ids = max(1, min(IDS_LOOKED_AT, _IDS_OF_ALL // sources))
    if is_prepared(path):
        return look_at_examples(Path(path), ids, now), None
    return _look_at_prefix(path, seq_length, seed, ids, now)


def is_prepared(path: str) -> bool:
    return os.path.isfile(os.path.join(path, SOURCE_FILE))


def prepared_length(path: str) -> int | None:
    """The seq_length that a folder was prepared with; None for others."""
    told = read_description(Path(path) / SOURCE_FILE) if is_prepared(path) else {}
    length = told.get("seq_length")
    return length if isinstance(length, int) and length > 0 else None


def stamp(path: str) -> str:
    """Changes with the size or the times of any file of a source; "" if it is none."""
    parts = [f"{path}.idx", f"{path}.bin"]
    if is_prepared(path):
        names = (SOURCE_FILE, "tokens.idx", "tokens.bin", "loss_mask.idx", "loss_mask.bin")
        parts = [os.path.join(path, name) for name in names]
    elif not all(map(os.path.isfile, parts)):
        return ""
    told = [os.stat(part) for part in parts if os.path.isfile(part)]
    said = [(each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in told]
    return hashlib.blake2b(repr(said).encode(), digest_size=8).hexdigest()


def stamp_of(path: str) -> str:
    """The stamp of what has to be a source.

    Raises:
        UserError: if it is none.
    """
    if now := stamp(path):
        return now
    raise UserError(
        f"{path}: is neither a prepared folder nor a .bin/.idx prefix (run "
        "`megatron-scalebio prepare`, or correct the path)"
    )


def look_at_examples(folder: Path, ids: int = IDS_LOOKED_AT, now: str = "") -> Facts:
    description = read_description(folder / SOURCE_FILE)
    code, lengths_D = check_pair(folder / "tokens")
    mask_code, of_mask_D = check_pair(folder / "loss_mask")
    if not np.array_equal(lengths_D, of_mask_D):
        raise UserError(
            f"{folder}: tokens and loss_mask differ in their sequences (run prepare again)"
        )
    count = len(lengths_D)
    return Facts(
        now, False, code, mask_code, count, count, description["tokens"],
        int(lengths_D.max()) - 1, _largest_id(f"{folder / 'tokens'}", code, ids),
        description["fingerprint"], description["tokenizer"],
    )  # fmt: skip


def _look_at_prefix(
    prefix: str, seq_length: int, seed: int, ids: int, now: str
) -> tuple[Facts, Packing]:
    from megatron_scalebio.compat.megatron import packing_order  # takes seconds

    code, lengths_D = check_pair(Path(prefix))
    tokens = int(lengths_D.sum(dtype=np.int64))
    if tokens <= seq_length:
        raise UserError(
            f"{prefix}: holds {tokens} tokens, not one sequence of {seq_length} (lower "
            "data.seq_length or drop the source)"
        )
    packing = Packing(*packing_order(np.array(lengths_D), seq_length, seed))
    samples = len(packing.shuffled)
    largest, fingerprint = _largest_id(prefix, code, ids), packed_fingerprint(prefix, lengths_D)
    facts = Facts(
        now, True, code, 0, len(lengths_D), samples, tokens, seq_length, largest, fingerprint, None
    )
    return facts, packing


def packed_fingerprint(prefix: str, lengths_D: npt.NDArray[np.int32]) -> str:
    """Sizes, then a hash of all documents' lengths and of samples of their tokens."""
    path = Path(f"{prefix}.bin")
    content = hashlib.sha256(np.ascontiguousarray(lengths_D))
    content.update(of_files([path], _SAMPLES).encode())
    tokens = lengths_D.sum(dtype=np.int64)
    return f"{tokens}-{len(lengths_D)}-{path.stat().st_size}-{content.hexdigest()}"


def same_data(saved: str, now: str) -> bool:
    """Whether two fingerprints are of the same data, by all that the saved one tells.

    Those of packed prefixes were sizes alone in earlier versions.
    """
    return f"{now}-".startswith(f"{saved}-")


def _largest_id(prefix: str, code: int, ids: int) -> int:
    """Largest token id at the head of a .bin: tells a wrong vocabulary, not every wrong token."""
    return int(np.fromfile(f"{prefix}.bin", DTYPES[code], ids).max(initial=0))


def read_description(path: Path) -> dict[str, Any]:
    def refuse(problem: str) -> UserError:
        return UserError(f"{path}: {problem} (run prepare again)")

    try:
        description = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(f"unreadable: {error}") from None
    if not isinstance(description, dict):
        raise refuse("is not a JSON object")
    _check_fields(description, {"fingerprint": str, "tokens": int, "tokenizer": dict}, refuse)
    kinds = {"fingerprint": str, "vocab_size": int, "model": str}
    _check_fields(description["tokenizer"], kinds, refuse)
    return description


def _check_fields(
    values: dict[str, Any], kinds: dict[str, type], refuse: Callable[[str], UserError]
) -> None:
    for name, kind in kinds.items():
        if name not in values:
            raise refuse(f"lacks {name!r}")
        if not isinstance(values[name], kind):
            raise refuse(f"{name!r} is {values[name]!r}, not of type {kind.__name__}")
