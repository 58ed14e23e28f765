"""Opens what a sample draws from, with the tokenizer and length its sources were prepared with."""

import datetime
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_scalebio.data.dialogue import ExampleEncoder
from megatron_scalebio.data.encode_pool import EncodePool, EncodeSettings
from megatron_scalebio.data.load_tokenizer import load_tokenizer
from megatron_scalebio.data.sources import ExampleSource
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.errors import UserError
from megatron_scalebio.launcher import cores
from megatron_scalebio.sample.config import SampleConfig, WeightedSource
from megatron_scalebio.sample.contamination import EvaluationIndex, WordIds
from megatron_scalebio.sample.documents import TokenRows
from megatron_scalebio.sample.inputs import Located, locate
from megatron_scalebio.sample.rows import RawRows, Statuses

_DEFAULT_SEQ_LENGTH = 2048  # of prepare
_CHECKED_ROWS = 64


@dataclass(eq=False)
class OpenSource:
    """A source while it is being drawn from.

    Attributes:
        inputs: its files, as the manifest describes them.
        statuses: of every row, an index of ``STATUSES``; set by the scan.
        truncated: encoded rows that lost their tail.
    """

    entry: WeightedSource
    rows: RawRows | TokenRows
    inputs: list[dict[str, Any]]
    statuses: Statuses = field(default_factory=lambda: np.empty(0, np.uint8))
    truncated: int = 0

    @property
    def usable(self) -> int:
        return int((self.statuses == 0).sum())


@dataclass
class Setup:
    """The sources opened, the evaluation examples indexed, and how the sample is to be described.

    Attributes:
        from_tokens: rows are documents of token ids; else raw records.
        tokenizer: None for Megatron prefixes of which none was named.
        described: what ``source.json`` is to say of it.
        seq_length: longest example, in tokens of model input; None for no limit.
        evaluation: the excluded sets, as the manifest describes them.
        date: which the chat template writes, where it writes one.
        dtype: widest type of the sources' token ids.
    """

    from_tokens: bool
    tokenizer: Tokenizer | None
    described: dict[str, Any] | None
    seq_length: int | None
    pool: EncodePool | None
    index: EvaluationIndex
    date: str | None
    words: WordIds
    sources: list[OpenSource] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    dtype: type[np.number] = np.uint16


def open_setup(config: SampleConfig, stack: ExitStack) -> Setup:
    """Opens everything; what must be closed again is entered into the stack.

    Raises:
        UserError: paths, tokenizers or options do not fit together.
    """
    located = [locate(entry.name, entry.path) for entry in config.sources]
    excluded = [locate(name, path, "excluded set") for name, path in config.exclude]
    setup = _set_up(config, located, stack)
    for weighted, entry in zip(config.sources, located, strict=True):
        rows, inputs = _open_rows(config, setup, entry, from_tokens=setup.from_tokens)
        setup.sources.append(OpenSource(weighted, rows, inputs))
        if isinstance(rows, TokenRows):
            setup.dtype = np.promote_types(setup.dtype, rows.indexed.index.dtype).type
        else:
            _check_options(rows, entry, setup)
    for entry in excluded:
        by_tokens = (setup.from_tokens and bool(entry.prefix)) or not entry.has_files
        by_tokens = by_tokens and not _needs_raw_files(entry, setup)
        rows, inputs = _open_rows(config, setup, entry, from_tokens=by_tokens)
        if setup.tokenizer is None and not isinstance(rows, TokenRows):
            raise UserError(
                f"{entry.files[0]}: {entry.name!r} is raw text, the sources token ids of an "
                "unknown tokenizer (name it by --tokenizer)"
            )
        index = setup.index
        before, wordless = index.examples, index.wordless
        rows.index_all(index, setup.words)
        count = index.examples - before
        if count == index.wordless - wordless:
            raise UserError(
                f"--exclude: {entry.name!r} holds no words in {count:,} examples, so that nothing "
                "can be compared with it (name another file, or leave it out)"
            )
        setup.evaluation.append({"name": entry.name, "examples": count, "inputs": inputs})
    setup.index.close()
    return setup


def _set_up(config: SampleConfig, located: list[Located], stack: ExitStack) -> Setup:
    """Decides what rows are, loads the tokenizer and starts what encodes with it."""
    from_tokens = config.from_tokens or any(not entry.files for entry in located)
    descriptions = [entry.description for entry in located if entry.description is not None]
    shared = _common_tokenizer(descriptions, config, from_tokens)
    model = config.tokenizer or (shared["model"] if shared else None)
    if model is None and not from_tokens:
        raise UserError("--tokenizer: is needed for raw files (as for prepare)")
    # Templates that write today's date write the one with which each source was prepared; the
    # first of them for what was not prepared.
    dates = [date for date in map(_date_of, descriptions) if date]
    date = dates[0] if dates else datetime.date.today().isoformat()
    tokenizer = None
    if model:
        tokenizer = load_tokenizer(model, chat_template=config.chat_template, date=date)
    if from_tokens and tokenizer and shared and tokenizer.fingerprint != shared["fingerprint"]:
        raise UserError(
            f"{tokenizer.model}: is not the tokenizer that the sources were prepared with (name "
            "that one by --tokenizer)"
        )
    seq_length = _seq_length(config, descriptions)
    pool = None
    if tokenizer and not from_tokens:
        settings = EncodeSettings(config, tokenizer.model, date, seq_length)
        pool = stack.enter_context(EncodePool(settings, tokenizer, min(config.workers, cores())))
    described = None
    if tokenizer:
        described = {**tokenizer.describe(), "model": os.path.abspath(tokenizer.model)}
    words = WordIds()
    index = EvaluationIndex(config.ngram, words.sizes if tokenizer else None)
    templates = (tokenizer.chat_template, tokenizer.tool_template) if tokenizer else ()
    kept = date if any("strftime_now" in (template or "") for template in templates) else None
    return Setup(from_tokens, tokenizer, described, seq_length, pool, index, kept, words)


def _date_of(description: dict[str, Any]) -> str:
    """The date that a source was prepared with; empty where it has none."""
    try:
        return datetime.date.fromisoformat(description["date"]).isoformat()
    except (KeyError, TypeError, ValueError):
        return ""


def _open_rows(
    config: SampleConfig, setup: Setup, entry: Located, *, from_tokens: bool
) -> tuple[RawRows | TokenRows, list[dict[str, Any]]]:
    """The rows of a source or evaluation set, and its files as the manifest describes them."""
    if not from_tokens:
        encoder = None
        if setup.from_tokens and setup.tokenizer:
            encoder = ExampleEncoder(setup.tokenizer, train_on_prompt=config.train_on_prompt)
        date = _date_of(entry.description or {}) or setup.date or ""
        rows = RawRows(entry.name, entry.files, config, setup.pool, encoder, date)
        return rows, entry.describe_raw()
    if not entry.prefix:
        raise UserError(
            f"{entry.files[0]}: {entry.name!r} is raw text, and the sample is drawn from token ids "
            "(prepare it first, and name the prepared folder)"
        )
    sequence = (setup.seq_length or _DEFAULT_SEQ_LENGTH) if setup.tokenizer else 1
    documents = TokenRows(
        entry.name,
        entry.folder,
        entry.prefix,
        tokenizer=setup.tokenizer,
        max_tokens=sequence + 1 if setup.tokenizer and entry.folder is None else None,
        sequence=sequence,
    )
    return documents, entry.describe_tokens()


def _common_tokenizer(
    descriptions: list[dict[str, Any]], config: SampleConfig, from_tokens: bool
) -> dict[str, Any] | None:
    """What ``source.json`` says of the tokenizer of all prepared sources, or None."""
    if not descriptions or (config.tokenizer and not from_tokens):
        return None
    first = descriptions[0]
    for other in descriptions[1:]:
        if other["tokenizer"]["fingerprint"] != first["tokenizer"]["fingerprint"]:
            raise UserError(
                f"--tokenizer: {other.get('name')!r} was prepared with "
                f"{other['tokenizer']['model']!r}, {first.get('name')!r} with "
                f"{first['tokenizer']['model']!r} (prepare all with one, or name the one to use "
                "for raw records)"
            )
    return first["tokenizer"]


def _needs_raw_files(entry: Located, setup: Setup) -> bool:
    """Whether an excluded set's ids are of another tokenizer than the one that would decode them.

    Raises:
        UserError: they are, and its raw files are gone.
    """
    if setup.tokenizer is None or entry.description is None:
        return False
    its = entry.description["tokenizer"]
    if its["fingerprint"] == setup.tokenizer.fingerprint:
        return False
    if not entry.has_files:
        raise UserError(
            f"{entry.folder}: {entry.name!r} was prepared with {its['model']!r}, the sample is "
            f"compared by {setup.tokenizer.model!r}, and its raw files are gone (name them by "
            f"--exclude {entry.name}=FILE, or prepare it with that tokenizer)"
        )
    return True


def _seq_length(config: SampleConfig, described: list[dict[str, Any]]) -> int | None:
    lengths = {description.get("seq_length") for description in described}
    if config.seq_length is not None or not lengths:
        return config.seq_length or _DEFAULT_SEQ_LENGTH
    if len(lengths) > 1:
        listed = ", ".join(sorted(map(str, lengths)))
        raise UserError(
            f"--seq-length: the sources were prepared with different lengths: {listed} (choose one)"
        )
    return lengths.pop()


def _check_options(rows: RawRows, entry: Located, setup: Setup) -> None:
    """Refuses options under which the first record becomes another example than prepare made."""
    description = entry.description
    assert setup.tokenizer is not None
    if (
        entry.folder is None
        or description is None
        or description["tokenizer"]["fingerprint"] != setup.tokenizer.fingerprint
        or description.get("seq_length") != setup.seq_length
    ):
        return
    tokens, mask = ExampleSource(entry.name, entry.folder, 2**31).example(0)
    row = next((row for row in rows.head(_CHECKED_ROWS) if row.lengths), None)
    if row is None:
        return
    first = slice(0, row.lengths[0])
    if not np.array_equal(row.tokens[first], tokens) or not np.array_equal(row.mask[first], mask):
        raise UserError(
            f"{entry.files[0]}: the first record of {entry.name!r} does not become the example "
            "that was prepared from it (repeat prepare's options, of which its source.json tells, "
            "--chat-template, --train-on-prompt and --too-long above all, or --from-tokens)"
        )
