"""Where the answers stand in a dialogue that a chat template has rendered, by difference.

The text of an answer is never searched for: it may stand elsewhere too. A turn is rendered anew
with a sentinel, a text that occurs nowhere, in place of its content, its reasoning and its calls'
arguments; what stands before and behind is the template's, and is found again at the two ends of
the true rendering.

    start   where the generation prompt ends, which is what the model is given at inference; where
            the template has none, behind the header of an answer
    end     behind the content and the mark that the template puts there, which the model must write

    <|user|>Hello!<|end|><|assistant|>How are you?<|end|>
                                      ⟦start        end⟧
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import NamedTuple

from megatron_scalebio.data.examples import Turn
from megatron_scalebio.data.probes import Probes, Said


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
    finder = _Finder(turns, full, render, split)
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
    """What stands before the first sentinel of a turn and behind the last, and what that is of."""

    before: str
    behind: str
    last: Said


class _Finder:
    def __init__(self, turns: Sequence[Turn], full: str, render: Render, split: Split) -> None:
        self.turns, self.full = list(turns), full
        self.render, self.split = render, split
        self.probes = Probes(full, *(turn.content or "" for turn in turns))

    def span(self, k: int) -> Span:
        probe, cut, whole = self._shown(k)
        mark = cut.behind.rstrip()
        if self.turns[k + 1 :]:
            inside = not (mark and whole.behind.startswith(mark))
        else:
            inside = self._opens_another(mark)
        if inside:
            mark = self._mark_inside(k, probe, whole.behind)
        rest = whole.behind[len(mark) :]
        end = len(self.full) - len(rest)
        # Behind the arguments of a call stands a quotation mark, or none, by what they are.
        ends = "" if whole.last.of_call else mark
        if not self.full.endswith(ends + rest):
            raise ChatTemplateError(
                f"renders what follows assistant turn {k} by what the turn says, so its targets "
                "would not be exact"
            )
        start = self._start(k, probe, whole)
        return Span(start, end, bool(mark) and (not cut.last.of_call or self._is_closed(k, mark)))

    def _shown(self, k: int) -> tuple[Turn, _Around, _Around]:
        """The turn with sentinels; what is around them where it is the last turn, and in all."""
        turn, rest = self.turns[k], self.turns[k + 1 :]
        probes = [self.probes.turn(turn, k)]
        if turn.fields:
            probes += [self.probes.turn(turn, k, names=True), self.probes.turn(turn, k, blank=True)]
        for probe in probes:
            cut = self._around(k, [*self.turns[:k], probe])
            whole = self._around(k, [*self.turns[:k], probe, *rest]) if rest else cut
            if cut and whole and cut.last.part == whole.last.part:
                return probe, cut, whole
        raise ChatTemplateError(f"leaves out or changes assistant turn {k}")

    def _start(self, k: int, probe: Turn, whole: _Around) -> int:
        full, before = self.full, whole.before
        plain = self._plain(k) if probe.fields else whole
        header = plain.before if plain and full.startswith(plain.before) else ""
        if not k:
            return len(header)
        prompt = self.render(self.turns[:k], True)
        if full.startswith(prompt):
            return max(len(prompt), self._header_untold(k, prompt, header))
        # Some generation prompts open a thinking block that a finished turn does not have.
        if full.startswith(before) and prompt.startswith(before):
            return len(before)
        begun = self.render(self.turns[:k], False).rstrip()
        if header and (prompt.startswith(header) or full.startswith(begun)):
            return len(header)
        return self._start_behind_turn(k, probe, before)

    def _header_untold(self, k: int, prompt: str, header: str) -> int:
        """The end of the header of a template that tells none as its generation prompt."""
        if not header[len(prompt) :].strip() or self.render(self.turns[:k], False) != prompt:
            return 0
        return len(header)

    def _start_behind_turn(self, k: int, probe: Turn, before: str) -> int:
        """By what stands between the turn before and the answer, where what precedes differs.

        Some templates put the system turn or the tools into the last user turn of a dialogue.
        """
        last = self.probes.turn(self.turns[k - 1], k - 1)
        prompt = self._around(k - 1, [*self.turns[: k - 1], last], True)
        text = self.render([*self.turns[: k - 1], last, probe, *self.turns[k + 1 :]], False)
        said = self.probes.said(text)
        at = next((n for n, one in enumerate(said) if one.turn == k), 0)
        if prompt and at and said[at - 1].turn == k - 1 and self.full.startswith(before):
            between = text[said[at - 1].end : said[at].start]
            header = self._common_header(between, prompt.behind)
            if header is not None:
                return len(before) - len(between) + header
        raise ChatTemplateError(
            "renders the beginning of a dialogue otherwise once it goes on, so response-only "
            "targets would not be exact"
        )

    def _common_header(self, between: str, prompt: str) -> int | None:
        """How much of what stands before an answer is its header, as the prompt has it."""
        if between.startswith(prompt):
            return len(prompt)
        if prompt.startswith(between) or "".join(between.split()) == "".join(prompt.split()):
            return len(between)
        pieces, others = self.split(between), self.split(prompt)
        common = [
            one for one, _ in takewhile(lambda p: p[0] == p[1], zip(pieces, others, strict=False))
        ]
        next_pieces = pieces[len(common) :][:1] + others[len(common) :][:1]
        if len(next_pieces) == 2 and all(map(self._is_special, next_pieces)):
            return len("".join(common))
        return None

    def _is_special(self, piece: str) -> bool:
        return len(self.split(f"a{piece}a")) == 3

    def _plain(self, k: int) -> _Around | None:
        """What is around an answer in place of a turn, were it text alone."""
        try:
            return self._around(k, [*self.turns[:k], self._text_turn(k), *self.turns[k + 1 :]])
        except ChatTemplateError:
            return None

    def _is_closed(self, k: int, mark: str) -> bool:
        """Whether a mark ends the turn, beside what ends its last call.

        So it is unless the template ends no answer, or writes the same between two calls.
        """
        turn = self.turns[k]
        calls = turn.fields["tool_calls"]
        twice = turn._replace(fields={**turn.fields, "tool_calls": [*calls, calls[-1]]})
        try:
            plain = self._around(k, [*self.turns[:k], self._text_turn(k)])
            end = plain.behind.rstrip() if plain else ""
            text = self.render([*self.turns[:k], self.probes.turn(twice, k)], False)
        except ChatTemplateError:
            return True
        between = self.probes.between(text, f"call{len(calls) - 1}", f"call{len(calls)}")
        return bool(end) and (mark.endswith(end) or not between.startswith(mark))

    def _text_turn(self, k: int) -> Turn:
        return Turn("assistant", self.probes.word(k, "content"))

    def _opens_another(self, mark: str) -> bool:
        """Whether a finished dialogue may have a generation prompt behind it, asked for or not."""
        return len(self.split(mark)) > 1 and self.render(self.turns, True) == self.full

    def _mark_inside(self, k: int, probe: Turn, behind: str) -> str:
        """The mark behind an answer, where what stands behind the last turn is another.

        It is what follows the answer whoever speaks next, but for the tokens that open a turn.
        """
        before = [*self.turns[:k], probe]
        follows = self.turns[k + 1].role if self.turns[k + 1 :] else "assistant"
        other = Turn("user" if follows == "assistant" else "assistant", "?")
        try:
            follow = self._around(k, [*before, other])
        except ChatTemplateError:  # it wants speakers in turn
            follow = self._around(k, before, True)
        pieces = self.split(behind)
        common = 0
        for one, another in zip(pieces, self.split(follow.behind if follow else ""), strict=False):
            if one != another:
                break
            common += 1
        opening = self.probes.turn(self.turns[0], 0, blank=True)
        head = self._around(0, [opening, *self.turns[1:]])
        # The token that opens a document, and the one that opens its first turn.
        first = self.split(head.before if head else self.full)[:2]
        while common and (not pieces[common - 1].strip() or pieces[common - 1] in first):
            common -= 1
        return "".join(pieces[:common])

    def _around(self, k: int, turns: Sequence[Turn], generate: bool = False) -> _Around | None:
        """None where nothing of turn k stands there, or a part of it twice."""
        text = self.render(turns, generate)
        said = self.probes.said(text, k)
        if not said or len({one.part for one in said}) < len(said):
            return None
        return _Around(text[: said[0].start], text[said[-1].end :], said[-1])
