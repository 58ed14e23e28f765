"""Documents of token ids as the rows of a source; see `sample.rows`."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_scalebio.data.encode_pool import cut
from megatron_scalebio.data.indexed import check_pair
from megatron_scalebio.data.prepare import Progress
from megatron_scalebio.data.sources import ExampleSource
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.sample.contamination import EvaluationIndex, Ids, WordIds
from megatron_scalebio.sample.rows import (
    CODES,
    REPORT_ROWS,
    Ints,
    OnProgress,
    Row,
    Statuses,
    decoded_texts,
    prompt_length,
)


class TokenRows:
    """The documents of a `.bin/.idx` pair: the examples of a prepared folder, or a Megatron prefix.

    Args:
        tokenizer: compares documents by their words; None: by token ids.
        max_tokens: longest example to make of a document, in tokens; None leaves them whole.
        sequence: tokens that count as one example of a Megatron prefix.
    """

    def __init__(
        self,
        name: str,
        folder: Path | None,
        prefix: str,
        *,
        tokenizer: Tokenizer | None,
        max_tokens: int | None,
        sequence: int,
    ) -> None:
        self.name, self.prefix = name, prefix
        from megatron.core.datasets.indexed_dataset import IndexedDataset  # takes seconds

        check_pair(Path(prefix))
        self.indexed = IndexedDataset(prefix)
        self._examples = ExampleSource(name, folder, 2**31) if folder else None
        self._tokenizer = tokenizer
        self._max_tokens, self._sequence = max_tokens, sequence
        self.rows = len(self._examples or self.indexed.document_indices[1:])

    def scan(self, index: EvaluationIndex, words: WordIds, on_progress: OnProgress) -> Statuses:
        """Marks the documents that repeat an evaluation example."""
        statuses = np.zeros(self.rows, np.uint8)
        for number in range(self.rows) if index.examples else ():
            kind = index.kind(*self._ids(number, words.of))
            statuses[number] = CODES[kind] if kind else 0
            if number % REPORT_ROWS == 0:
                on_progress(Progress(self.name, number, self.rows, number))
        on_progress(Progress(self.name, self.rows, self.rows, self.rows, finished=True))
        return statuses

    def index_all(self, index: EvaluationIndex, words: WordIds) -> None:
        """Adds every document to the index: this is an evaluation set."""
        for number in range(self.rows):
            index.add(*self._ids(number, words.learn))

    def _ids(self, number: int, by_words: Callable[[str, str], tuple[Ids, Ids]]) -> tuple[Ids, Ids]:
        """A document and its prompt (what precedes its first target) as the index takes them."""
        tokens, mask = self._row(number)
        if self._tokenizer is not None:
            return by_words(*decoded_texts(tokens, mask, self._tokenizer))
        prompt = tokens[: prompt_length(mask)]
        known = np.uint64(1)  # no token is unknown
        return tokens.astype(np.uint64) + known, prompt.astype(np.uint64) + known

    def fetch(self, wanted: Ints) -> Iterator[Row]:
        """The wanted documents (ascending, each once), cut to ``max_tokens`` where that is set."""
        for number in wanted.tolist():
            tokens, mask = self._row(number)
            pieces = cut(tokens, mask, self._max_tokens, "split") if mask.any() else []
            status = 0 if pieces else CODES["no_target" if len(tokens) else "empty"]
            ids = np.concatenate([np.empty(0, np.int32), *(piece for piece, _ in pieces)])
            targets = np.concatenate([np.empty(0, np.uint8), *(piece for _, piece in pieces)])
            yield Row(number, None, ids, targets, [len(p) for p, _ in pieces], status, 0)

    def examples_per_row(self) -> float | None:
        """A Megatron prefix is learned on in sequences, so its documents count by their tokens."""
        if self._examples is not None:
            return 1.0
        return float(self.indexed.sequence_lengths.sum()) / self.rows / self._sequence

    def _row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if self._examples is not None:
            tokens, mask = self._examples.example(number)
            return tokens.astype(np.int32), mask
        first, end = self.indexed.document_indices[number : number + 2]
        parts = [self.indexed[k].astype(np.int32) for k in range(first, end)]
        tokens = np.concatenate([np.empty(0, np.int32), *parts])
        mask = np.ones(len(tokens), np.uint8)
        mask[:1] = 0
        return tokens, mask
