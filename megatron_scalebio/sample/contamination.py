"""Finds training rows that repeat validation or test examples.

    exact   the row's words are those of an evaluation example, all and in order
    prompt  what stands before its first answer is what stands before one's first answer
    ngram   n words in a row stand in an evaluation example (n = 13: Brown et al. 2020, appendix C)

Words are runs of letters, marks and digits after NFKC and case folding; in scripts that write no
spaces each character is a word. N-grams of many different evaluation examples are phrases of their
format and convict no row, unless they make up a passage: then questions are asked about one text.
"""

import hashlib
import unicodedata
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

# An n-gram of more evaluation examples than this (or than half of few) is a phrase of the format,
_PHRASE_EXAMPLES = 10
# unless as many examples share more words in a row than this many times n.
_PASSAGE_NGRAMS = 2
_SHOWN = 3
_PROMPT_FIELDS = ("question", "problem", "prompt", "turns")  # of evaluation sets
_NO_SPACES = "".join(
    rf"\p{{{script}}}"
    for script in ("Thai", "Lao", "Myanmar", "Khmer", "Hiragana", "Katakana", "Han")
)
_WORD = regex.compile(rf"[{_NO_SPACES}]\p{{M}}*|[^\W{_NO_SPACES}](?:[^\W{_NO_SPACES}]|\p{{M}})*")
_INVISIBLE = regex.compile(r"\p{Cf}+")  # joiners within words, soft hyphens
_BASE = np.uint64(0x9E3779B97F4A7C15)


class Phrase(NamedTuple):
    """Words that convict no row, and how many different evaluation examples hold them."""

    ids: tuple[int, ...]
    examples: int


class EvaluationIndex:
    """The evaluation examples as sequences of ids, of words or of tokens.

    Args:
        ngram: n, in words or tokens.
    """

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.examples = 0
        self.ignored_ngrams = 0
        self.phrases: list[Phrase] = []
        self._whole: set[bytes] = set()
        self._prompts: set[bytes] = set()
        # The texts of each different example: one with the same prompt is the same.
        self._texts: dict[bytes, list[npt.NDArray[np.uint32]]] = {}
        self._last = b""
        self._telling: Ids = np.empty(0, np.uint64)

    def add(self, ids: Ids, prompt: Ids) -> None:
        """Adds one evaluation example; ``prompt`` is empty where it has none."""
        self.examples += 1
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
        empty = np.empty(0, np.uint64)
        texts = [text for group in self._texts.values() for text in group]
        hashes = [self._hashes(text.astype(np.uint64)) for text in texts]
        of_group, at = [], 0
        for group in self._texts.values():
            of_group.append(np.unique(np.concatenate([empty, *hashes[at : at + len(group)]])))
            at += len(group)
        grams, examples = np.unique(np.concatenate([empty, *of_group]), return_counts=True)
        limit = min(_PHRASE_EXAMPLES, max(1, len(self._texts) // 2))
        own, silent = [], 0
        for text, windows in zip(texts, hashes, strict=True):
            shared = examples[np.searchsorted(grams, windows)] if len(windows) else empty
            is_phrase = self._phrases_of(text, shared, limit)
            own.append(_outside(is_phrase, windows, self.ngram))
            silent += len(windows) > 0 and not len(own[-1])
        self._telling = np.unique(np.concatenate([empty, *own]))
        self.ignored_ngrams = len(grams) - len(self._telling)
        long = sum(len(windows) > 0 for windows in hashes)
        self._texts = {}
        self.phrases = sorted(set(self.phrases), key=lambda phrase: -phrase.examples)[:_SHOWN]
        if silent > long / 2:
            raise UserError(
                f"--exclude: {silent} of {long} examples say little but what others say too, and "
                "rows that repeat them would not be found (give --ngram a smaller number, or take "
                "from them the text that they share)"
            )

    def _phrases_of(
        self, text: npt.NDArray[np.uint32], shared_W: npt.NDArray[Any], limit: int
    ) -> npt.NDArray[np.bool_]:
        """Which n-grams of a text are phrases of the format, by how many examples share each."""
        is_phrase_W = shared_W > limit
        borders = np.flatnonzero(np.diff(shared_W)) + 1
        for start, end in zip([0, *borders], [*borders, len(shared_W)], strict=True):
            if not is_phrase_W[start:end].any():
                continue
            words = end - start + self.ngram - 1
            if words > _PASSAGE_NGRAMS * self.ngram:
                is_phrase_W[start:end] = False
            else:
                ids = tuple(text[start : start + words].tolist())
                self.phrases.append(Phrase(ids, int(shared_W[start])))
        return is_phrase_W

    def kind(self, ids: Ids, prompt: Ids) -> str | None:
        """How a training row repeats an evaluation example, or None."""
        if not len(ids):
            return None
        if _digest(ids) in self._whole:
            return EXACT
        if len(prompt) and _digest(prompt) in self._prompts:
            return PROMPT
        hashes = self._hashes(ids)
        if not len(hashes) or not len(self._telling):
            return None
        at = np.minimum(np.searchsorted(self._telling, hashes), len(self._telling) - 1)
        return NGRAM if (self._telling[at] == hashes).any() else None

    def _hashes(self, ids: Ids) -> Ids:
        """A 64-bit polynomial hash of every n-gram without an unknown word."""
        windows = len(ids) - self.ngram + 1
        if windows <= 0:
            return np.empty(0, np.uint64)
        unknown = np.concatenate([[0], np.cumsum(ids == UNKNOWN)])
        hashes = np.zeros(windows, np.uint64)
        for k in range(self.ngram):
            hashes = hashes * _BASE + ids[k : k + windows]
        return hashes[unknown[self.ngram :] == unknown[:windows]]


def _outside(is_phrase_W: npt.NDArray[np.bool_], hashes_W: Ids, ngram: int) -> Ids:
    """The n-grams of a text, given in order, that share no word with those that are phrases."""
    if not is_phrase_W.any():
        return hashes_W
    starts = np.concatenate([[0], np.cumsum(is_phrase_W)])
    window = np.arange(len(hashes_W))
    low = np.maximum(0, window - ngram + 1)
    high = np.minimum(len(hashes_W), window + ngram)
    return hashes_W[starts[high] == starts[low]]


class WordIds:
    """Numbers the words of the evaluation examples, from 1; all others are ``UNKNOWN``."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def learn(self, whole: str, prompt: str) -> tuple[Ids, Ids]:
        """The ids of an evaluation example's text and of its prompt."""
        for word in words(whole):
            self._ids.setdefault(word, len(self._ids) + 1)
        return self.of(whole, prompt)

    def of(self, whole: str, prompt: str) -> tuple[Ids, Ids]:
        """The ids of a text and of its prompt."""
        return self._look_up(whole), self._look_up(prompt)

    def spelled(self, ids: tuple[int, ...]) -> str:
        """The words of ids."""
        known = {number: word for word, number in self._ids.items()}
        return " ".join(known[number] for number in ids)

    def _look_up(self, text: str) -> Ids:
        return np.array([self._ids.get(word, UNKNOWN) for word in words(text)], np.uint64)


def words(text: str) -> list[str]:
    """The words of a text, alike however its letters are composed and written."""
    text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    return _WORD.findall(unicodedata.normalize("NFKC", text))


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
