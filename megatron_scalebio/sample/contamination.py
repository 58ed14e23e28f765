"""Finds training rows that repeat validation or test examples.

    exact   the row's words are those of an evaluation example, all and in order
    prompt  what stands before its first answer is what stands before one's first answer
    ngram   n words in a row stand in an evaluation example (n = 13: Brown et al. 2020, appendix C)

Words are lower-cased runs of letters and digits; in scripts that write no spaces each character
is a word. N-grams of many evaluation examples are phrases of their format and convict no row.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_scalebio.data.examples import Dialogue, Text

EXACT, PROMPT, NGRAM = "exact", "prompt", "ngram"
KINDS = (EXACT, PROMPT, NGRAM)
UNKNOWN = 0  # the id of words that no evaluation example holds
Ids = npt.NDArray[np.uint64]

# An n-gram of more evaluation examples than this (or than half of few) is a phrase of the format.
_PHRASE_EXAMPLES = 10
_PROMPT_FIELDS = ("question", "problem", "prompt", "turns")  # of evaluation sets
_NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


class EvaluationIndex:
    """The evaluation examples as sequences of ids, of words or of tokens.

    Args:
        ngram: n, in words or tokens.
    """

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.examples = 0
        self.ignored_ngrams = 0
        self._whole: set[bytes] = set()
        self._prompts: set[bytes] = set()
        self._ids: list[npt.NDArray[np.uint32]] = []
        self._telling: Ids = np.empty(0, np.uint64)

    def add(self, ids: Ids, prompt: Ids) -> None:
        """Adds one evaluation example; ``prompt`` is empty where it has none."""
        self.examples += 1
        self._ids.append(np.empty(0, np.uint32))
        self.add_form(ids, prompt)

    def add_form(self, ids: Ids, prompt: Ids) -> None:
        """Adds another form of the example added last, which rows may repeat as well."""
        self._whole.add(_digest(ids))
        if len(prompt):
            self._prompts.add(_digest(prompt))
        between = np.array([UNKNOWN], np.uint32)  # no n-gram reaches over it
        self._ids[-1] = np.concatenate([self._ids[-1], between, ids.astype(np.uint32)])

    def close(self) -> None:
        """Ends the adding; to be called once, before :meth:`kind`.

        N-grams that overlap a phrase of the format are left out with it: they hold less than n
        words of the example's own.
        """
        empty = np.empty(0, np.uint64)
        hashes = [self._hashes(ids.astype(np.uint64)) for ids in self._ids]
        every = np.concatenate([empty, *(np.unique(grams) for grams in hashes)])
        grams, examples = np.unique(every, return_counts=True)
        phrases = grams[examples > min(_PHRASE_EXAMPLES, max(1, self.examples // 2))]
        own = [_outside(np.isin(grams, phrases), grams, self.ngram) for grams in hashes]
        self._telling = np.unique(np.concatenate([empty, *own]))
        self.ignored_ngrams = len(grams) - len(self._telling)
        self._ids = []

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

    def _look_up(self, text: str) -> Ids:
        return np.array([self._ids.get(word, UNKNOWN) for word in words(text)], np.uint64)


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def whole_text(example: Text | Dialogue) -> str:
    if isinstance(example, Text):
        return example.text
    return "\n".join(turn.content or "" for turn in example.turns)


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
