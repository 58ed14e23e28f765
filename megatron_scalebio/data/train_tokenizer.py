"""Trains a SentencePiece BPE tokenizer for users who have none.

Byte fallback and identity normalization make it lossless; it adds no leading space and knows
<unk>, <s>, </s> (the end-of-document token) and <pad>.
"""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_scalebio.data.dialogue import plain_segments
from megatron_scalebio.data.examples import Text
from megatron_scalebio.data.formats import read_examples
from megatron_scalebio.data.record_fields import PLAIN_OPTIONS, RecordOptions
from megatron_scalebio.data.records import OnBad
from megatron_scalebio.errors import UserError

# SentencePiece holds its training text in memory, several times over.
MAX_TEXT_BYTES = 16 << 20
_SENTENCE_CHARS = 2000


def train_sentencepiece(
    files: Iterable[Path],
    model_path: Path,
    vocab_size: int,
    *,
    options: RecordOptions = PLAIN_OPTIONS,
    on_bad: OnBad | None = None,
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> None:
    """Trains on the texts of JSON/JSONL files and writes a ``.model`` file.

    Of more than ``max_text_bytes`` of input every n-th record is taken, so that all files have
    their share. The same input gives the same model. ``on_bad`` is told of records at fault, of
    which the first is raised where it is None.

    Raises:
        UserError: an input is at fault, or the vocabulary is too large for the text.
    """
    import sentencepiece

    files = list(files)
    stride = -(-sum(file.stat().st_size for file in files) // max_text_bytes)
    model = io.BytesIO()
    refused: list[UserError] = []

    def sentences() -> Iterator[str]:
        try:
            yield from _sentences(files, stride, options, on_bad)
        except UserError as error:  # of which SentencePiece would leave the text alone
            refused.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            character_coverage=0.9999,
            max_sentence_length=8 * _SENTENCE_CHARS,
            num_threads=1,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            minloglevel=2,
        )
    except RuntimeError as error:
        if refused:
            raise refused[0] from None
        said = str(error).splitlines()[0]
        if most := re.search(r"too high .*<= (\d+)", said):
            raise UserError(
                f"--train-sentencepiece: the text is too small for {vocab_size} pieces (take "
                f"--train-sentencepiece {most[1]} or fewer, or give more text)"
            ) from error
        raise UserError(
            f"--train-sentencepiece: SentencePiece cannot train {vocab_size} pieces: {said} "
            "(choose another vocabulary size, or give more text)"
        ) from error
    model_path.write_bytes(model.getvalue())


def _sentences(
    files: Iterable[Path], stride: int, options: RecordOptions, on_bad: OnBad | None
) -> Iterator[str]:
    for file in files:
        for number, example in enumerate(read_examples(file, options, on_bad)):
            if number % stride:
                continue
            # Dialogues with the built-in template's headings: they come in every example.
            text = (
                example.text
                if isinstance(example, Text)
                else "".join(segment.text for segment in plain_segments(example.turns))
            )
            for start in range(0, len(text), _SENTENCE_CHARS):
                yield text[start : start + _SENTENCE_CHARS]
