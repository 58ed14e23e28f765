"""Tokenizing batches of records, in this process or in several, in order.

Workers are spawned, not forked: a fork of a process that has threads (tokenizers, progress bar)
can deadlock. At most a few batches a worker are under way, so a slow writer holds the reader back.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_scalebio.data.content_parts import check_parts
from megatron_scalebio.data.dialogue import ExampleEncoder
from megatron_scalebio.data.encode_config import EncodeConfig
from megatron_scalebio.data.examples import Dialogue, RecordError, Text
from megatron_scalebio.data.formats import parse_record
from megatron_scalebio.data.load_tokenizer import dated, load_tokenizer
from megatron_scalebio.data.records import Record
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.errors import UserError

_BATCHES_A_WORKER = 3


@dataclass(frozen=True)
class EncodeSettings:
    """What a worker needs.

    Attributes:
        tokenizer: its path.
        date: what chat templates call today.
        seq_length: tokens of an example as the model sees it, so that it holds at most one token
            more; None for no limit.
        append_eod: closes a plain text.
    """

    config: EncodeConfig
    tokenizer: str
    date: str
    seq_length: int | None
    append_eod: bool = True


class LeftOut(NamedTuple):
    """A record that became no example: its line, why in a word, and what is wrong if it is bad."""

    line: int
    reason: str
    message: str = ""


class Batch(NamedTuple):
    """Records of one file; ``bytes_done`` of the source had been read behind the last one.

    bad: what stands among them and could not be read.
    date: what their chat template calls today; empty: as the settings say.
    """

    path: str
    format: str
    records: list[Record]
    bytes_done: int
    bad: tuple[LeftOut, ...] = ()
    date: str = ""


class EncodedBatch(NamedTuple):
    """Examples laid end to end.

    tokens: int32 [sum(lengths)]; mask: uint8 of the same shape, 1 = to be predicted;
    lines: of the record that each example is of; ignored: records by a field that is not used;
    replaced: records that held halves of letters;
    truncated: records that lost their tail; longest: tokens of the longest record before that.
    """

    tokens: np.ndarray
    mask: np.ndarray
    lengths: list[int]
    lines: list[int]
    left_out: list[LeftOut]
    ignored: dict[str, int]
    replaced: int
    truncated: int
    longest: int


class EncodePool:
    """Encodes batches with ``workers`` processes; with one, in this process."""

    def __init__(self, settings: EncodeSettings, tokenizer: Tokenizer, workers: int) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self._workers = workers
        self._encoder = _encoder(settings, tokenizer)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> EncodePool:
        if self._workers > 1:
            self._pool = ProcessPoolExecutor(
                self._workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(self.settings,),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            # A signal may come before the pool's thread has started: it ends by itself then.
            with contextlib.suppress(RuntimeError):
                self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, batch: Batch) -> EncodedBatch:
        """A batch by itself, in this process."""
        return encode_batch(batch, self._encoder, self.settings)

    def map(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, EncodedBatch]]:
        """Each batch with its encoding, in order."""
        if self._pool is None:
            for batch in batches:
                yield batch, self.encode(batch)
            return
        under_way: deque[tuple[Batch, Future[EncodedBatch]]] = deque()
        try:
            for batch in batches:
                under_way.append((batch, self._pool.submit(_encode_in_worker, batch)))
                if len(under_way) >= _BATCHES_A_WORKER * self._workers:
                    done, future = under_way.popleft()
                    yield done, future.result()
            while under_way:
                done, future = under_way.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "--workers: a worker process died, perhaps for lack of memory (use fewer)"
            ) from error


def encode_batch(batch: Batch, encoder: ExampleEncoder, settings: EncodeSettings) -> EncodedBatch:
    """Parses, tokenizes and cuts the records of a batch.

    Raises:
        RecordError: a record is at fault, and such are not to be left out.
    """
    config, seq_length = settings.config, settings.seq_length
    max_tokens = None if seq_length is None else seq_length + 1
    dated(encoder.tokenizer, batch.date)
    tokens: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    lines: list[int] = []
    left_out: list[LeftOut] = []
    ignored: Counter[str] = Counter()
    replaced = truncated = longest = 0
    for line, value in batch.records:
        where = f"{batch.path}:{line}"
        try:
            example = parse_record(value, batch.format, where, config)
            if isinstance(example, Dialogue):
                check_parts(example, encoder.tokenizer, where)
            ids, mask = ([], []) if _is_empty(example) else encoder.encode(example, where)
        except RecordError as error:
            if not config.skips_bad:
                raise
            left_out.append(LeftOut(line, error.reason, str(error)))
            continue
        ignored.update(example.ignored)
        replaced += example.replaced
        if not ids:
            left_out.append(LeftOut(line, "empty" if _is_empty(example) else "no_target"))
            continue
        how = config.too_long or ("split" if isinstance(example, Text) else "truncate")
        pieces = cut(np.asarray(ids, np.int32), np.asarray(mask, np.uint8), max_tokens, how)
        longest = max(longest, len(ids))
        if not pieces:
            left_out.append(LeftOut(line, "too_long" if how == "drop" else "prompt_too_long"))
            continue
        truncated += how == "truncate" and len(pieces[0][0]) < len(ids)
        tokens += [piece for piece, _ in pieces]
        masks += [piece for _, piece in pieces]
        lines += [line] * len(pieces)
    return EncodedBatch(
        np.concatenate([np.empty(0, np.int32), *tokens]),
        np.concatenate([np.empty(0, np.uint8), *masks]),
        [len(piece) for piece in tokens],
        lines,
        left_out,
        dict(ignored),
        replaced,
        truncated,
        longest,
    )


def cut(
    ids: np.ndarray, mask: np.ndarray, max_tokens: int | None, how: str
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cuts an example to pieces of at most ``max_tokens``, each with a target as its last token.

    Args:
        ids: int32 [tokens]. mask: uint8 [tokens]; its first entry is 0.
        how: ``truncate`` keeps the head, ``drop`` nothing, ``split`` all. Pieces of a split
            overlap by one token: it is a target at the end of one, context at the head of the next.
    """
    if max_tokens is None or len(ids) <= max_tokens:
        return [(ids, mask)]
    if how == "drop":
        return []
    stop = 1 if how == "truncate" else len(ids) - 1
    pieces = []
    for start in range(0, stop, max_tokens - 1):
        piece = mask[start : start + max_tokens].copy()
        piece[0] = 0
        targets = np.flatnonzero(piece)
        if len(targets):
            end = targets[-1] + 1
            pieces.append((ids[start : start + end], piece[:end]))
    return pieces


def _is_empty(example: Text | Dialogue) -> bool:
    if isinstance(example, Text):
        return not example.text.strip()
    return not any((turn.content or "").strip() or turn.is_answer for turn in example.turns)


def _encoder(settings: EncodeSettings, tokenizer: Tokenizer) -> ExampleEncoder:
    return ExampleEncoder(
        tokenizer,
        train_on_prompt=settings.config.train_on_prompt,
        append_eod=settings.append_eod,
    )


_worker: tuple[ExampleEncoder, EncodeSettings] | None = None


def _start_worker(settings: EncodeSettings) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_exit_with, args=(parent,), daemon=True).start()
    tokenizer = load_tokenizer(
        settings.tokenizer, chat_template=settings.config.chat_template, date=settings.date
    )
    _worker = (_encoder(settings, tokenizer), settings)


def _exit_with(parent: multiprocessing.process.BaseProcess) -> None:
    """Ends this worker when its parent is killed; it would wait for work for ever."""
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: Batch) -> EncodedBatch:
    assert _worker is not None
    return encode_batch(batch, *_worker)
