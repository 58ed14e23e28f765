"""Opens the data that a configuration names: prepared example sets and packed Megatron prefixes.

    FOLDER with source.json       one example per sequence, with a loss mask   (from `prepare`)
    PREFIX of a .bin/.idx pair    documents packed to seq_length by Megatron's GPTDataset

Both give `len()`, `length(index)` in input tokens, and `example(index)` → (tokens, targets), two
arrays of one more than the input length: token ids, and 1 where a token is a target.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_scalebio.compat.megatron import index_magic
from megatron_scalebio.config import Config, SourceConfig, ValidationConfig
from megatron_scalebio.errors import UserError
from megatron_scalebio.fingerprint import of_files

Example = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]
UNBOUNDED = 2**31  # until all sources are open, and tell the vocabulary


class Source(Protocol):
    """A data source or validation set."""

    name: str
    prefix: str  # path prefix of its .bin/.idx, as Megatron-LM's --data-path takes it
    tokens: int
    largest_id: int  # among the first tokens
    fingerprint: str  # changes when the data does; to be compared by `same_data`
    vocab_size: int  # a token at or above it is damage
    tokenizer: dict[str, Any] | None  # of prepared sets: type, model, vocab_size, fingerprint

    def __len__(self) -> int: ...
    def length(self, index: int) -> int: ...
    def example(self, index: int) -> Example: ...


class ExampleSource:
    """A prepared folder: one example per sequence."""

    vocab_size = UNBOUNDED

    def __init__(self, name: str, folder: Path, seq_length: int) -> None:
        self.name, self.prefix = name, str(folder / "tokens")
        description = read_description(folder / "source.json")
        self.tokenizer = description["tokenizer"]
        self.fingerprint, self.tokens = description["fingerprint"], description["tokens"]
        self._tokens = open_indexed(folder / "tokens")
        self._mask = open_indexed(folder / "loss_mask")
        self._lengths = self._tokens.sequence_lengths
        self.largest_id = _largest_id(self.prefix, self._tokens)
        if not np.array_equal(self._lengths, self._mask.sequence_lengths):
            raise UserError(
                f"{folder}: tokens and loss_mask differ in their sequences (run prepare again)"
            )
        longest = int(self._lengths.max()) - 1
        if longest > seq_length:
            raise UserError(
                f"{folder}: holds an example of {longest} tokens, above seq_length {seq_length} "
                f"(prepare it with --seq-length {seq_length}, or raise data.seq_length)"
            )

    def __len__(self) -> int:
        return len(self._lengths)

    def length(self, index: int) -> int:
        return int(self._lengths[index]) - 1

    def example(self, index: int) -> Example:
        tokens, mask = self._tokens[index].astype(np.int64), self._mask[index]
        _check_ids(self, index, tokens)
        if len(mask) and mask.max() > 1:
            raise UserError(
                f"{self.prefix.removesuffix('tokens') + 'loss_mask.bin'}: example {index} of "
                f"source {self.name!r} holds {mask.max()}, not 0 or 1 (the file is damaged: run "
                "prepare again)"
            )
        return tokens, mask.astype(np.uint8)


class PackedSource:
    """A Megatron `.bin/.idx` prefix: documents run together and cut to seq_length."""

    tokenizer: dict[str, Any] | None = None
    vocab_size = UNBOUNDED

    def __init__(self, name: str, prefix: str, config: Config, cache: Path) -> None:
        self.name, self.prefix = name, prefix
        indexed = open_indexed(Path(prefix))
        self.tokens = int(indexed.sequence_lengths.sum())
        self.fingerprint = _packed_fingerprint(prefix, indexed)
        self.largest_id = _largest_id(prefix, indexed)
        self._length = config.data.seq_length
        if self.tokens <= self._length:
            raise UserError(
                f"{prefix}: holds {self.tokens} tokens, not one sequence of {self._length} (lower "
                "data.seq_length or drop the source)"
            )
        settings = GPTDatasetConfig(
            random_seed=config.train.seed,
            sequence_length=self._length,
            blend=([prefix], None),
            split="1,0,0",
            path_to_cache=str(cache),
            tokenizer=_Vocabulary(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
        self._dataset = GPTDataset(indexed, prefix, documents, None, Split.train, settings)

    def __len__(self) -> int:
        return len(self._dataset)

    def length(self, index: int) -> int:
        return self._length

    def example(self, index: int) -> Example:
        item = self._dataset[index]
        tokens = np.append(item["tokens"].numpy(), item["labels"][-1].numpy())
        targets = np.append(0, item["loss_mask"].numpy())
        _check_ids(self, index, tokens)
        return tokens.astype(np.int64), targets.astype(np.uint8)


_SAMPLES = 8  # few: a run may have thousands of prefixes on a slow disk


def _packed_fingerprint(prefix: str, indexed: IndexedDataset) -> str:
    """Sizes, then a hash of all documents' lengths and of samples of their tokens."""
    path, lengths = Path(f"{prefix}.bin"), indexed.sequence_lengths
    content = hashlib.sha256(lengths)
    content.update(of_files([path], _SAMPLES).encode())
    return f"{lengths.sum()}-{len(lengths)}-{path.stat().st_size}-{content.hexdigest()}"


def same_data(saved: str, now: str) -> bool:
    """Whether two fingerprints are of the same data, by all that the saved one tells.

    Those of packed prefixes were sizes alone in earlier versions.
    """
    return f"{now}-".startswith(f"{saved}-")


def _check_ids(source: Source, index: int, tokens: npt.NDArray[np.integer]) -> None:
    """Refuses what no tokenizer wrote: an embedding has no row for it, or another rank's."""
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if low < 0 or high >= source.vocab_size:
        raise UserError(
            f"{source.prefix}.bin: example {index} of source {source.name!r} holds token "
            f"{low if low < 0 else high}, the vocabulary ends at {source.vocab_size - 1} (the file "
            "is damaged, or was made with another tokenizer: write it again)"
        )


@dataclass(frozen=True)
class _Vocabulary:
    """What GPTDataset asks of a tokenizer when nothing is masked or reset at document ends."""

    eod: int = -1
    pad: int = -1
    vocab_size: None = None

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"class": "none"}


def open_sources(
    entries: Sequence[SourceConfig | ValidationConfig], config: Config, cache: Path
) -> list[Source]:
    """Opens every named source.

    Args:
        cache: folder for the sample indices that Megatron builds of packed prefixes.

    Raises:
        UserError: naming the path that is missing, damaged, empty or too long.
    """
    return [_open(entry.name, entry.path, config, cache) for entry in entries]


def _open(name: str, path: str, config: Config, cache: Path) -> Source:
    if (Path(path) / "source.json").is_file():
        return ExampleSource(name, Path(path), config.data.seq_length)
    if Path(path + ".idx").is_file() and Path(path + ".bin").is_file():
        return PackedSource(name, path, config, cache)
    raise UserError(
        f"{path}: source {name!r} is neither a prepared folder nor a .bin/.idx prefix (run "
        "`megatron-scalebio prepare`, or correct the path)"
    )


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


def open_indexed(prefix: Path) -> IndexedDataset:
    """Opens a `.bin/.idx` pair after checking that the .bin holds all that the .idx lists."""
    for suffix in (".idx", ".bin"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise UserError(f"{prefix}{suffix}: no such file (run prepare again)")
    # First: IndexedDataset maps both files unseen, and breaks in its destructor if it cannot.
    need, have = _bytes_listed(Path(f"{prefix}.idx")), Path(f"{prefix}.bin").stat().st_size
    if have < need:
        raise UserError(f"{prefix}.bin: truncated: {have} bytes of {need} (write it again)")
    return IndexedDataset(str(prefix))


_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of token, sequences, documents


def _bytes_listed(path: Path) -> int:
    """Size that the .bin of a Megatron .idx must have, in bytes.

    header | length of each sequence, int32 | its offset in .bin, int64 | documents, int64
    """
    content = path.open("rb").read(_HEADER.size)
    broken = UserError(f"{path}: not a whole Megatron index (write it again)")
    if len(content) < _HEADER.size:
        raise broken
    magic, version, code, sequences, documents = _HEADER.unpack(content)
    whole = _HEADER.size + 12 * sequences + 8 * documents
    codes = {dtype.value for dtype in DType}
    if magic != index_magic() or version != 1 or code not in codes or path.stat().st_size < whole:
        raise broken
    if sequences == 0:
        raise UserError(f"{path}: holds no sequence (drop it or refill it)")
    lengths = np.memmap(path, np.int32, "r", _HEADER.size, (sequences,))
    offsets = np.memmap(path, np.int64, "r", _HEADER.size + 4 * sequences, (sequences,))
    if lengths.min() < 0 or offsets.min() < 0:
        raise broken
    return int((offsets + lengths * np.int64(DType.size(DType.dtype_from_code(code)))).max())


IDS_LOOKED_AT = 65536


def _largest_id(prefix: str, indexed: IndexedDataset) -> int:
    """Largest token id at the head of a .bin: tells a wrong vocabulary, not every wrong token."""
    return int(np.fromfile(f"{prefix}.bin", indexed.index.dtype, IDS_LOOKED_AT).max(initial=0))


def vocab_size_told(config: Config) -> int | None:
    """The vocabulary of the first prepared set, without opening its data."""
    data = config.data
    for folder in [e.path for e in data.sources] + [e.path for e in data.validation]:
        path = Path(folder) / "source.json"
        if path.is_file():
            return int(read_description(path)["tokenizer"]["vocab_size"])
    return None


def shared_vocab_size(sources: Sequence[Source], configured: int | None) -> int:
    """Vocabulary size that all prepared sets agree on, or the configured one.

    Raises:
        UserError: if tokenizers differ, exceed the configured size, or nothing says a size.
    """
    told = [source for source in sources if source.tokenizer]
    for source in told[1:]:
        assert source.tokenizer and told[0].tokenizer
        if source.tokenizer["fingerprint"] != told[0].tokenizer["fingerprint"]:
            raise UserError(
                f"{source.prefix}: source {source.name!r} was prepared with tokenizer "
                f"{source.tokenizer['model']!r}, {told[0].name!r} with "
                f"{told[0].tokenizer['model']!r} (prepare all sources with one tokenizer)"
            )
    size = told[0].tokenizer["vocab_size"] if told and told[0].tokenizer else None
    if configured is not None and size is not None and size > configured:
        raise UserError(
            f"model.vocab_size: {configured} is below the tokenizer's {size} tokens (set it to "
            f"{size}, or prepare with the model's own tokenizer)"
        )
    size = configured or size
    if size is None:
        raise UserError(
            "model.vocab_size: is not set, and packed prefixes do not tell it (set it to the "
            "tokenizer's size)"
        )
    for source in sources:
        if source.largest_id >= size:
            raise UserError(
                f"{source.prefix}: source {source.name!r} holds token {source.largest_id}, the "
                f"vocabulary ends at {size - 1} (set model.vocab_size to the size of the tokenizer "
                "it was made with)"
            )
    return size
