"""Where the answers stand in a dialogue that a chat template has rendered, by difference.

The text of an answer is never searched for: it may stand elsewhere too. A turn is rendered anew
with a sentinel, a text that occurs nowhere, in place of its content; what stands before and behind
the sentinel is the template's, and is found again at the two ends of the true rendering.

    start   where the generation prompt ends, which is what the model is given at inference
    end     behind the content and the mark that the template puts there, which the model must write

    <|user|>Hello!<|end|><|assistant|>How are you?<|end|>
                                      ⟦start        end⟧
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_scalebio.data.examples import Turn

_SENTINEL = "scalebiosentinel"


class ChatTemplateError(Exception):
    """What a chat template does not do; the message completes "the chat template ..."."""


class Span(NamedTuple):
    """Characters [start, end) of an answer; ``marked``: a mark of the template's ends it."""

    start: int
    end: int
    marked: bool


# A dialogue's text; the flag appends the header of an assistant turn, as at inference.
Render = Callable[[Sequence[Turn], bool], str]
Split = Callable[[str], list[str]]


def answer_spans(turns: Sequence[Turn], full: str, render: Render, split: Split) -> list[Span]:
    """The spans of all answers, in order.

    Args:
        full: ``render(turns, False)``.
        split: cuts a text into its special tokens and what stands between them.

    Raises:
        ChatTemplateError: a span cannot be told exactly.
    """
    sentinel = _SENTINEL
    while any(sentinel in text for text in (full, *(turn.content or "" for turn in turns))):
        sentinel += "x"
    finder = _Finder(turns, full, render, split, sentinel)
    spans: list[Span] = []
    for k, turn in enumerate(turns):
        if not turn.is_answer:
            continue
        span = finder.span(k)
        if span.start >= span.end or (spans and span.start < spans[-1].end):
            raise ChatTemplateError(
                f"does not render assistant turn {k} behind its generation prompt, so its targets "
                "would not be exact"
            )
        spans.append(span)
    return spans


class _Around(NamedTuple):
    """What stands before and behind the sentinel."""

    before: str
    behind: str


class _Finder:
    def __init__(
        self, turns: Sequence[Turn], full: str, render: Render, split: Split, sentinel: str
    ) -> None:
        self.turns, self.full, self.sentinel = list(turns), full, sentinel
        self.render, self.split = render, split

    def span(self, k: int) -> Span:
        probe = self.turns[k]._replace(content=self.sentinel)
        cut = self._around([*self.turns[:k], probe])
        if cut is None and probe.fields:
            return self._span_of_fields(k)
        if cut is None:
            raise ChatTemplateError(f"leaves out or changes assistant turn {k}")
        rest = self.turns[k + 1 :]
        whole = self._around([*self.turns[:k], probe, *rest]) if rest else cut
        if whole is None or not self.full.endswith(whole.behind):
            raise ChatTemplateError(
                f"renders what follows assistant turn {k} by what the turn says, so its targets "
                "would not be exact"
            )
        mark = cut.behind.rstrip()
        if rest and not (mark and whole.behind.startswith(mark)):
            mark = self._mark_inside(k, probe, whole.behind)
        end = len(self.full) - len(whole.behind) + len(mark)
        return Span(self._start(k, whole.before), end, bool(mark))

    def _span_of_fields(self, k: int) -> Span:
        """Of a turn whose content is not rendered beside its tool calls."""
        until = self.render(self.turns[: k + 1], False).rstrip()
        if not self.full.startswith(until):
            raise ChatTemplateError(
                f"renders assistant turn {k} otherwise once the dialogue goes on, so its targets "
                "would not be exact"
            )
        return Span(self._start(k, None), len(until), True)

    def _start(self, k: int, before: str | None) -> int:
        """``before``: what stands before the content, where that is rendered."""
        prompt = self.render(self.turns[:k], True) if k else before or ""
        if self.full.startswith(prompt):
            return len(prompt)
        # Some generation prompts open a thinking block that a finished turn does not have.
        if before is None:
            plain = Turn("assistant", self.sentinel)
            around = self._around([*self.turns[:k], plain, *self.turns[k + 1 :]])
            before = around.before if around else ""
        if self.full.startswith(before) and (
            prompt.startswith(before)
            or self.full.startswith(self.render(self.turns[:k], False).rstrip())
        ):
            return len(before)
        raise ChatTemplateError(
            "renders the beginning of a dialogue otherwise once it goes on, so response-only "
            "targets would not be exact"
        )

    def _mark_inside(self, k: int, probe: Turn, behind: str) -> str:
        """The mark behind an answer that is not the last turn, where the last has another.

        It is what follows the answer whoever speaks next, but for the tokens that open a turn.
        """
        before = [*self.turns[:k], probe]
        other = Turn("user" if self.turns[k + 1].role == "assistant" else "assistant", "?")
        try:
            follow = self._around([*before, other])
        except ChatTemplateError:  # it wants speakers in turn
            follow = self._around(before, True)
        pieces = self.split(behind)
        common = 0
        for one, another in zip(pieces, self.split(follow.behind if follow else ""), strict=False):
            if one != another:
                break
            common += 1
        head = self._around([self.turns[0]._replace(content=self.sentinel), *self.turns[1:]])
        # The token that opens a document, and the one that opens its first turn.
        first = self.split(head.before if head else self.full)[:2]
        while common and (not pieces[common - 1].strip() or pieces[common - 1] in first):
            common -= 1
        return "".join(pieces[:common])

    def _around(self, turns: Sequence[Turn], generate: bool = False) -> _Around | None:
        parts = self.render(turns, generate).split(self.sentinel)
        return _Around(*parts) if len(parts) == 2 else None
