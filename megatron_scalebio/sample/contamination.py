"""Finds training rows that repeat validation or test examples.

    exact   the row's words are those of an evaluation example, all and in order
    prompt  what stands before its first answer is what stands before one's first answer
    ngram   n words in a row stand in an evaluation example (n = 13: Brown et al. 2020, appendix C);
            of an example with 8 to 12 words, all of them

Words are runs of letters, marks and digits after NFKC and case folding. In scripts that write no
spaces each character is a part of a word: a half of Han, two fifths of kana, a fifth elsewhere.
N-grams of many different evaluation examples are phrases of their format and convict no row, unless
they make up a passage: then questions are asked about one text. What most of many examples share is
of the format however long it is.
"""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import regex

from megatron_scalebio.data.examples import Dialogue, Text
from megatron_scalebio.errors import UserError

EXACT, PROMPT, NGRAM = "exact", "prompt", "ngram"
KINDS = (EXACT, PROMPT, NGRAM)
UNKNOWN = 0  # the id of words that no evaluation example holds
Ids = npt.NDArray[np.uint64]
Sizes = npt.NDArray[np.int64]

# An n-gram of more evaluation examples than this (or than half of few) is a phrase of the format,
_PHRASE_EXAMPLES = 10
# unless as many examples, but no more than half, share more words in a row than this many times n.
_PASSAGE_NGRAMS = 2
FEWEST_WORDS = 8  # of an example that a part of a row can repeat: the least n of Brown et al.
_SHOWN = 3
_PROMPT_FIELDS = ("question", "problem", "prompt", "turns")  # of evaluation sets
# Scripts that write no spaces, and the size of a character in tenths of a word.
_WORD_SIZE = 10
_SIZES = {
    r"\p{Han}": 5, r"\p{Hiragana}\p{Katakana}": 4, r"\p{Thai}\p{Lao}\p{Myanmar}\p{Khmer}": 2
}  # fmt: skip
_SIZED = [(regex.compile(f"[{scripts}]"), size) for scripts, size in _SIZES.items()]
_NO_SPACES = "".join(_SIZES)
_LETTER = rf"[^\W_{_NO_SPACES}]"
_WORD = regex.compile(rf"[{_NO_SPACES}]\p{{M}}*|{_LETTER}(?:{_LETTER}|\p{{M}})*")
# Joiners within words, soft hyphens; vowel signs and lengthening that Arabic and Hebrew leave out.
_INVISIBLE = regex.compile(
    "[\\p{Cf}\u0640\u064b-\u0652\u0670\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7]+"
)
_SPACE_OF_NO_WIDTH = "\u200b"
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


class Phrase(NamedTuple):
    """Words that convict no row, and how many different evaluation examples hold them."""

    ids: tuple[int, ...]
    examples: int


class EvaluationIndex:
    """The evaluation examples as sequences of ids, of words or of tokens.

    Args:
        ngram: n, in words or tokens.
        sizes: of ids, in tenths of a word; None: each is a word.

    Attributes:
        wordless, short: examples that no row can be compared with, and such as have so few words
            that only a row which repeats all that they say is found.
    """

    def __init__(self, ngram: int, sizes: Callable[[Ids], Sizes] | None = None) -> None:
        self.ngram, self._sizes = ngram, sizes
        self.examples = self.wordless = self.short = 0
        self.ignored_ngrams = 0
        self.phrases: list[Phrase] = []
        self._whole: set[bytes] = set()
        self._prompts: set[bytes] = set()
        # The texts of each different example: one with the same prompt is the same.
        self._texts: dict[bytes, list[npt.NDArray[np.uint32]]] = {}
        self._last = b""
        self._telling: dict[int, Ids] = {}  # by n
        self._powers = np.ones((2, 1), np.uint64)  # of the hash's base, and of its inverse

    def add(self, ids: Ids, prompt: Ids) -> None:
        """Adds one evaluation example; ``prompt`` is empty where it has none."""
        self.examples += 1
        self.wordless += not len(ids)
        self._last = _digest(prompt if len(prompt) else ids)
        self._texts.setdefault(self._last, [])
        self.add_form(ids, prompt)

    def add_form(self, ids: Ids, prompt: Ids) -> None:
        """Adds another form of the example added last, which rows may repeat as well."""
        if len(prompt):
            self._prompts.add(_digest(prompt))
        whole = _digest(ids)
        if whole not in self._whole:
            self._whole.add(whole)
            self._texts[self._last].append(ids.astype(np.uint32))

    def close(self) -> None:
        """Ends the adding; to be called once, before :meth:`kind`.

        N-grams that overlap a phrase of the format are left out with it: they hold less than n
        words of the example's own.

        Raises:
            UserError: phrases make up most examples, so that their repetitions would not be found.
        """
        groups = [[text.astype(np.uint64) for text in group] for group in self._texts.values()]
        self._texts = {}
        of_length: dict[int, list[list[Ids]]] = {}
        for group in groups:
            lengths = [self._ngram_of(text) for text in group]
            self.short += max(map(len, group)) > 0 and not any(lengths)
            for n in {n for n in lengths if n}:
                same = [text for text, its in zip(group, lengths, strict=True) if its == n]
                of_length.setdefault(n, []).append(same)
        long = silent = 0
        for n, same_length in of_length.items():
            own, grams = self._own_ngrams(n, same_length, len(groups))
            long += len(own)
            silent += sum(not len(windows) for windows in own)
            self._telling[n] = np.unique(np.concatenate(own))
            self.ignored_ngrams += grams - len(self._telling[n])
        self.phrases = sorted(set(self.phrases), key=lambda phrase: -phrase.examples)[:_SHOWN]
        if silent > long / 2:
            raise UserError(
                f"--exclude: {silent} of {long} examples say little but what others say too, and "
                "rows that repeat them would not be found (give --ngram a smaller number, or take "
                "from them the text that they share)"
            )

    def _ngram_of(self, text: Ids) -> int:
        """How many words in a row convict a row that has them, 0 where too few are there."""
        words = self._measured(text).tenths(0, len(text)) // _WORD_SIZE
        return min(words, self.ngram) if words >= min(FEWEST_WORDS, self.ngram) else 0

    def _own_ngrams(
        self, n: int, groups: Sequence[Sequence[Ids]], examples: int
    ) -> tuple[list[Ids], int]:
        """Each text's n-grams that are no phrases of the format; how many n-grams there were.

        Args:
            groups: the texts of n-grams of n words, of each example.
            examples: all that there are.
        """
        measured = [[self._measured(text) for text in group] for group in groups]
        windows = [[text.windows(n) for text in group] for group in measured]
        of_group = [np.unique(np.concatenate([w.hashes for w in group])) for group in windows]
        grams, holding = np.unique(np.concatenate(of_group), return_counts=True)
        limit = min(_PHRASE_EXAMPLES, max(1, examples // 2))
        most = max(_PHRASE_EXAMPLES, examples / 2)
        own = []
        for text, measure, each in zip(
            chain(*groups), chain(*measured), chain(*windows), strict=True
        ):
            shared_W = holding[np.searchsorted(grams, each.hashes)]
            is_phrase_W = shared_W > limit
            for first, last in _runs(shared_W):
                if not is_phrase_W[first]:
                    continue
                start, end = first, int(each.ends[last - 1])
                is_passage = measure.tenths(start, end) > _PASSAGE_NGRAMS * n * _WORD_SIZE
                if is_passage and shared_W[first] <= most:
                    is_phrase_W[first:last] = False
                else:
                    ids = tuple(text[start:end].tolist())
                    self.phrases.append(Phrase(ids, int(shared_W[first])))
            own.append(each.hashes[~each.overlapping(is_phrase_W)])
        return own, len(grams)

    def kind(self, ids: Ids, prompt: Ids) -> str | None:
        """How a training row repeats an evaluation example, or None."""
        if not len(ids):
            return None
        if _digest(ids) in self._whole:
            return EXACT
        if len(prompt) and _digest(prompt) in self._prompts:
            return PROMPT
        measured = self._measured(ids)
        for n, telling in self._telling.items():
            hashes = measured.windows(n).hashes
            if len(hashes) and len(telling):
                at = np.minimum(np.searchsorted(telling, hashes), len(telling) - 1)
                if (telling[at] == hashes).any():
                    return NGRAM
        return None

    def _measured(self, ids: Ids) -> Measured:
        power, inverse = self._powers_of(len(ids))
        sums = np.zeros(len(ids) + 1, np.uint64)
        np.cumsum(ids * inverse, out=sums[1:])
        unknown = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(ids == UNKNOWN, out=unknown[1:])
        sizes = self._sizes(ids) if self._sizes else None
        if sizes is None or (sizes == _WORD_SIZE).all():
            return Measured(sums, power, unknown, None)
        return Measured(sums, power, unknown, np.concatenate([[0], np.cumsum(sizes)]))

    def _powers_of(self, length: int) -> npt.NDArray[np.uint64]:
        """Those of the hash's base and of its inverse, mod 2^64, [2, length]."""
        if self._powers.shape[1] < length:
            bases = np.array([[_BASE], [_INVERSE]], np.uint64).repeat(2 * length, axis=1)
            bases[:, 0] = 1
            self._powers = np.multiply.accumulate(bases, axis=1)
        return self._powers[:, :length]


@dataclass(frozen=True)
class Measured:
    """What n-grams of L ids are made from.

    Attributes:
        sums: of ids times powers of the inverse of the hash's base, up to each and after the last.
        power: those of the base.
        unknown: how many unknown words stand before each, and at the end.
        sizes: how many tenths of a word; None: each is a word.
    """

    sums: Ids
    power: Ids
    unknown: Sizes
    sizes: Sizes | None

    def tenths(self, start: int, end: int) -> int:
        """Of words between two places."""
        if self.sizes is None:
            return (end - start) * _WORD_SIZE
        return int(self.sizes[end] - self.sizes[start])

    def windows(self, n: int) -> Windows:
        """Every n-gram without an unknown word, with a 64-bit polynomial hash."""
        length = len(self.power)
        if self.sizes is None:
            ends = np.arange(n, length + 1)
        else:
            ends = np.searchsorted(self.sizes, self.sizes[:-1] + n * _WORD_SIZE)
            ends = ends[ends <= length]
        starts = np.flatnonzero(self.unknown[ends] == self.unknown[: len(ends)])
        ends = ends[starts]
        return Windows((self.sums[ends] - self.sums[starts]) * self.power[starts], ends)


@dataclass(frozen=True)
class Windows:
    """N-grams of a text, in order.

    Attributes:
        hashes: equal for equal n-grams.
        ends: where they end. Those of a text without unknown words begin at 0, 1, 2, ….
    """

    hashes: Ids
    ends: Sizes

    def overlapping(self, is_phrase_W: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which ones share a word with those that are phrases; of no unknown word."""
        before = np.concatenate([[0], np.cumsum(is_phrase_W)])
        window = np.arange(len(self.ends))
        low = np.searchsorted(self.ends, window, side="right")
        high = np.minimum(self.ends, len(self.ends))
        return before[high] > before[low]


def _runs(values: npt.NDArray[Any]) -> Iterator[tuple[int, int]]:
    """First and last + 1 of each run of equal values."""
    borders = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return pairwise(borders) if len(values) else iter(())


class WordIds:
    """Numbers the words of the evaluation examples, from 1; all others are ``UNKNOWN``."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._sizes = array("q", [_WORD_SIZE])  # by id

    def learn(self, whole: str, prompt: str) -> tuple[Ids, Ids]:
        """The ids of an evaluation example's text and of its prompt."""
        for word in words(whole):
            if word not in self._ids:
                self._ids[word] = len(self._sizes)
                self._sizes.append(_size(word))
        return self.of(whole, prompt)

    def of(self, whole: str, prompt: str) -> tuple[Ids, Ids]:
        """The ids of a text and of its prompt."""
        return self._look_up(whole), self._look_up(prompt)

    def sizes(self, ids: Ids) -> Sizes:
        """Tenths of a word that each is, where characters stand for parts of words."""
        return np.frombuffer(self._sizes, np.int64).take(ids.astype(np.intp))

    def spelled(self, ids: tuple[int, ...]) -> str:
        """The words of ids."""
        known = {number: word for word, number in self._ids.items()}
        return " ".join(known[number] for number in ids)

    def _look_up(self, text: str) -> Ids:
        return np.array([self._ids.get(word, UNKNOWN) for word in words(text)], np.uint64)


def words(text: str) -> list[str]:
    """The words of a text, alike however its letters are composed and written."""
    text = _INVISIBLE.sub("", text.replace(_SPACE_OF_NO_WIDTH, " "))
    text = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(unicodedata.normalize("NFKC", text))


def _size(word: str) -> int:
    """In tenths of a word."""
    return next((size for script, size in _SIZED if script.match(word)), _WORD_SIZE)


def whole_text(example: Text | Dialogue) -> str:
    if isinstance(example, Text):
        return example.text
    # A system turn is no part of a question, and often the same for all.
    return "\n".join(turn.content or "" for turn in example.turns if turn.role != "system")


def any_texts(record: dict[str, Any]) -> tuple[str, str]:
    """Whole text and prompt of an evaluation record in a benchmark's own format."""
    texts = [text for value in record.values() for text in _strings(value)]
    prompts = [text for name in _PROMPT_FIELDS for text in _strings(record.get(name))[:1]]
    return "\n".join(texts), prompts[0] if prompts else ""


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _strings(part)]


def prompt_text(example: Text | Dialogue) -> str:
    """What a user says before the first answer; empty for plain text."""
    turns: list[str] = []
    for turn in () if isinstance(example, Text) else example.turns:
        if turn.role == "assistant":
            return "\n".join(turns)
        turns += [turn.content or ""] if turn.role == "user" else []
    return ""


def _digest(ids: Ids) -> bytes:
    """Of a sequence with an unknown word it is no evaluation example's: 0 stands in none."""
    return hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
