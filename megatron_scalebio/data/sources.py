"""Opens the data that a configuration names: prepared example sets and packed Megatron prefixes.

    FOLDER with source.json       one example per sequence, with a loss mask   (from `prepare`)
    PREFIX of a .bin/.idx pair    documents packed to seq_length by Megatron's GPTDataset

Both give `len()`, `length(index)` in input tokens, and `example(index)` → (tokens, targets), two
arrays of one more than the input length: token ids, and 1 where a token is a target.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_scalebio.config import Config, SourceConfig, ValidationConfig
from megatron_scalebio.data.catalog import Catalog, OnOpened, open_catalog
from megatron_scalebio.data.indexed import IndexedPair
from megatron_scalebio.data.scan import Facts, is_prepared, look_at_examples, read_description
from megatron_scalebio.data.source_writer import SOURCE_FILE
from megatron_scalebio.errors import UserError

Example = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]
UNBOUNDED = 2**31  # until all sources are open, and tell the vocabulary


class Source(Protocol):
    """A data source or validation set."""

    name: str
    prefix: str  # path prefix of its .bin/.idx, as Megatron-LM's --data-path takes it
    vocab_size: int  # a token at or above it is damage

    @property
    def tokens(self) -> int: ...
    @property
    def mean_length(self) -> float:
        """Tokens of an example."""

    @property
    def largest_id(self) -> int:
        """Among the first tokens."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data does; to be compared by `same_data`."""

    @property
    def tokenizer(self) -> dict[str, Any] | None:
        """Of prepared sets: type, model, vocab_size, fingerprint."""

    def __len__(self) -> int: ...
    def length(self, index: int) -> int: ...
    def example(self, index: int) -> Example: ...


class Looked:
    """In a catalog's place: has the facts of one source, which was just looked at."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def facts(self, number: int) -> Facts:
        return self._facts


class _Described:
    """A source by what a first look at it has told; few bytes: a run may have ten thousand."""

    __slots__ = ("_described_by", "_number", "name", "prefix", "vocab_size")

    def __init__(self, name: str, prefix: str, described_by: Catalog | Looked, number: int) -> None:
        self.name, self.prefix, self.vocab_size = name, prefix, UNBOUNDED
        self._described_by, self._number = described_by, number

    @property
    def facts(self) -> Facts:
        return self._described_by.facts(self._number)

    @property
    def tokens(self) -> int:
        return self.facts.tokens

    @property
    def largest_id(self) -> int:
        return self.facts.largest_id

    @property
    def fingerprint(self) -> str:
        return self.facts.fingerprint

    @property
    def tokenizer(self) -> dict[str, Any] | None:
        return self.facts.tokenizer

    def __len__(self) -> int:
        return self.facts.examples


class ExampleSource(_Described):
    """A prepared folder: one example per sequence."""

    __slots__ = ()

    def __init__(
        self,
        name: str,
        folder: Path,
        seq_length: int,
        described_by: Catalog | None = None,
        number: int = 0,
    ) -> None:
        looked = described_by or Looked(look_at_examples(folder))
        super().__init__(name, str(folder / "tokens"), looked, number)
        longest = self.facts.longest
        if longest > seq_length:
            raise UserError(
                f"{folder}: holds an example of {longest} tokens, above seq_length {seq_length} "
                f"(prepare it with --seq-length {seq_length}, or raise data.seq_length)"
            )

    @property
    def mean_length(self) -> float:
        return self.tokens / len(self)

    def length(self, index: int) -> int:
        facts = self.facts
        return IndexedPair(self.prefix, facts.code, facts.sequences).length(index) - 1

    def example(self, index: int) -> Example:
        facts, masks = self.facts, self.prefix.removesuffix("tokens") + "loss_mask"
        pair = IndexedPair(self.prefix, facts.code, facts.sequences)
        tokens = pair.tokens(index).astype(np.int64)
        mask = IndexedPair(masks, facts.mask_code, facts.sequences).tokens(index, 0, len(tokens))
        _check_ids(self, index, tokens)
        if len(mask) and mask.max() > 1:
            raise UserError(
                f"{masks}.bin: example {index} of source {self.name!r} holds {mask.max()}, not 0 "
                "or 1 (the file is damaged: run prepare again)"
            )
        return tokens, mask.astype(np.uint8)


class PackedSource(_Described):
    """A Megatron `.bin/.idx` prefix: documents run together and cut to seq_length."""

    __slots__ = ()
    _described_by: Catalog

    @property
    def mean_length(self) -> float:
        return self.facts.longest

    def length(self, index: int) -> int:
        return self.facts.longest

    def example(self, index: int) -> Example:
        """As Megatron's GPTDataset gives it, for the same seed."""
        order_D, starts, shuffled = self._described_by.packing(self._number)
        facts = self.facts
        pair = IndexedPair(self.prefix, facts.code, facts.sequences)
        sample = int(shuffled[index])
        (first, skipped), (last, end) = starts[sample : sample + 2].tolist()
        parts = []
        for place in range(first, last + 1):
            begin = skipped if place == first else 0
            # One more than the input: the last label.
            count = end + 1 - begin if place == last else None
            parts.append(pair.tokens(int(order_D[place]), begin, count))
        tokens = np.concatenate(parts).astype(np.int64)
        _check_ids(self, index, tokens)
        targets = np.ones(len(tokens), np.uint8)
        targets[0] = 0
        return tokens, targets


def _check_ids(source: Source, index: int, tokens: npt.NDArray[np.integer]) -> None:
    """Refuses what no tokenizer wrote: an embedding has no row for it, or another rank's."""
    low, high = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if low < 0 or high >= source.vocab_size:
        raise UserError(
            f"{source.prefix}.bin: example {index} of source {source.name!r} holds token "
            f"{low if low < 0 else high}, the vocabulary ends at {source.vocab_size - 1} (the file "
            "is damaged, or was made with another tokenizer: write it again)"
        )


def open_sources(
    entries: Sequence[SourceConfig | ValidationConfig],
    config: Config,
    cache: Path,
    on_opened: OnOpened = lambda done, of: None,
    check: bool = True,
) -> list[Source]:
    """Opens every named source.

    Args:
        cache: folder for the run's one file about them.
        on_opened: is told how far it is.
        check: whether files have changed since that was written; needless on all ranks but one.

    Raises:
        UserError: naming the path that is missing, damaged, empty or too long.
    """
    length, seed = config.data.seq_length, config.train.seed
    paths = [entry.path for entry in entries]
    catalog = open_catalog(cache, paths, length, seed, on_opened, check)
    sources: list[Source] = []
    for number, entry in enumerate(entries):
        if catalog.facts(number).packed:
            sources.append(PackedSource(entry.name, entry.path, catalog, number))
        else:
            folder = Path(entry.path)
            sources.append(ExampleSource(entry.name, folder, length, catalog, number))
    return sources


def vocab_size_told(config: Config) -> int | None:
    """The vocabulary of the first prepared set, without opening its data."""
    data = config.data
    for folder in [e.path for e in data.sources] + [e.path for e in data.validation]:
        if is_prepared(folder):
            description = read_description(Path(folder) / SOURCE_FILE)
            return int(description["tokenizer"]["vocab_size"])
    return None


def has_prompts(source: Source) -> bool:
    """Whether it was prepared with tokens that do not train; each example's first never does."""
    if not source.tokenizer:
        return False
    told = read_description(Path(source.prefix).parent / SOURCE_FILE)
    return bool(told.get("target_tokens") != source.tokens - len(source))


def repeated_data(sources: Sequence[Source], validation: Sequence[Source]) -> list[str]:
    """What to warn of where two sets hold the same examples, a line each."""
    names_of: dict[str, list[str]] = {}
    for source in sources:
        names_of.setdefault(source.fingerprint, []).append(source.name)
    lines = [
        f"sources {', '.join(names[:5])} hold the same examples: of their weights only the sum is "
        "known (keep one)"
        for names in names_of.values() if len(names) > 1
    ]  # fmt: skip
    return lines + [
        f"validation set {goal.name!r} holds the examples of source "
        f"{names_of[goal.fingerprint][0]!r}: what trains on them is best at them, whatever else "
        "they are good for (hold some back)"
        for goal in validation if goal.fingerprint in names_of
    ]  # fmt: skip


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
                f"{told[0].tokenizer['model']!r}, which are not the same (prepare all sources with "
                "one tokenizer)"
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
            remedy = (
                "the file is damaged, or was made with another tokenizer: write it again"
                if source.tokenizer
                else "set model.vocab_size to the size of the tokenizer it was made with"
            )
            raise UserError(
                f"{source.prefix}: source {source.name!r} holds token {source.largest_id}, the "
                f"vocabulary ends at {size - 1} ({remedy})"
            )
    return size
