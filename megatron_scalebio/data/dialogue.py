"""Text and dialogues to token ids and a loss mask that is exact at every turn border.

A dialogue with a chat template has the tokens of ``apply_chat_template``: it is rendered and
tokenized whole, and `data.targets` says which characters are an answer's. Where a token would reach
over the border of an answer, the text is cut there, so that a prompt has the tokens it has at
inference, where the answer does not exist yet. (A template that marks its targets itself is taken
as transformers takes it: such a token is the answer's.)

With the built-in template, and for plain text, an example is cut into segments, each wholly a
target or wholly not, and each segment is tokenized alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_scalebio.data.examples import (
    AS_ITS_ROLE,
    NEVER,
    REASONING_FIELDS,
    Dialogue,
    RecordError,
    Text,
    Turn,
)
from megatron_scalebio.data.targets import ChatTemplateError, Render, Span, answer_spans
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.data.tool_calls import as_template_wants
from megatron_scalebio.errors import UserError

_PLAIN_HEADERS = {
    "system": "System",
    "user": "Instruction",
    "assistant": "Response",
    "tool": "Tool",
}
_TEMPLATE_FIX = (
    "fix the record, leave it out by --bad-records skip, or use --chat-template with plain or a "
    "Jinja file"
)


@dataclass(frozen=True)
class Segment:
    """A stretch of text; ``closed`` puts the EOD token behind it."""

    text: str
    target: bool
    closed: bool = False


class ExampleEncoder:
    """Turns a :class:`Text` or :class:`Dialogue` into (ids, mask).

    Args:
        tokenizer: its chat template, if it has one, renders dialogues.
        train_on_prompt: makes every token of a dialogue a target, not only assistant turns.
        append_eod: closes a plain text with EOD. A dialogue always ends with its end of turn.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, train_on_prompt: bool = False, append_eod: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.train_on_prompt = train_on_prompt
        self.append_eod = append_eod

    def encode(self, example: Text | Dialogue, where: str = "") -> tuple[list[int], list[int]]:
        """Token ids and mask, of equal length; 1 marks a token that is to be predicted.

        The first token is never a target, since nothing precedes it. Tokens behind the last
        target are left out: in a causal model they cannot change the loss.

        Raises:
            RecordError: the chat template does not render the dialogue, or not so that its targets
                could be told.
        """
        where = where or self.tokenizer.model
        if isinstance(example, Text):
            ids, mask = self._segments([Segment(example.text, True, self.append_eod)])
        else:
            if self.tokenizer.template_problem:
                raise UserError(self.tokenizer.template_problem)
            template = self.tokenizer.template_for("tools" in example.context)
            _check_fields(example, template, where)
            if template is None:
                ids, mask = self._segments(plain_segments(example.turns, self.train_on_prompt))
            else:
                try:
                    ids, mask = self._chat(example)
                except ChatTemplateError as error:
                    raise RecordError(
                        f"the chat template {error}",
                        reason="chat template",
                        where=where,
                        fix=_TEMPLATE_FIX,
                    ) from error
        if mask:
            mask[0] = 0
        end = len(mask) - mask[::-1].index(1) if 1 in mask else 0
        return ids[:end], mask[:end]

    def _segments(self, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
        if not any(segment.target for segment in segments):
            return [], []
        ids: list[int] = []
        if self.tokenizer.adds_bos and self.tokenizer.bos_id is not None:
            ids.append(self.tokenizer.bos_id)
        mask = [0] * len(ids)
        for number, segment in enumerate(segments):
            encode = self.tokenizer.encode_continuation if number else self.tokenizer.encode_long
            new = encode(segment.text) + [self.tokenizer.eod_id] * segment.closed
            ids += new
            mask += [int(segment.target)] * len(new)
        return ids, mask

    def _chat(self, dialogue: Dialogue) -> tuple[list[int], list[int]]:
        """Ids and mask of the rendered dialogue, closed by EOD if its last target has no end."""

        def render(turns: Sequence[Turn], generate: bool) -> str:
            messages = [turn.message() for turn in turns]
            return self.tokenizer.render_chat(messages, generate, **dialogue.context)

        turns = dialogue.turns
        if not self.train_on_prompt and not any(_trains(turn) for turn in turns):
            return [], []
        turns = tuple(as_template_wants(turns, lambda turns: render(turns, False)))
        dialogue = replace(dialogue, turns=turns)
        full = render(turns, False)
        if self.train_on_prompt:
            spans = self._spans_with_prompts(turns, full, render)
        else:
            found = self._answers(dialogue, full, render)
            spans = [span for span, turn in found if turn is None or _trains(turn)]
        if not spans:
            return [], []
        last = spans[-1]
        text = full if last.marked else full[: last.end]
        by_mark = self.tokenizer.marks_targets("tools" in dialogue.context)
        cut = self.train_on_prompt or not by_mark
        ids, mask = self.tokenizer.encode_spans(text, [(s.start, s.end) for s in spans], cut)
        if not last.marked:
            ids, mask = [*ids, self.tokenizer.eod_id], [*mask, 1]
        return ids, mask

    def _answers(
        self, dialogue: Dialogue, full: str, render: Render
    ) -> list[tuple[Span, Turn | None]]:
        """The spans of all answers with their turns: as the template marks them, or by difference.

        The turn is None where none has to be told from the others.
        """
        turns, tokenizer = dialogue.turns, self.tokenizer

        def marked(turns: Sequence[Turn]) -> list[tuple[int, int]] | None:
            messages = [turn.message() for turn in turns]
            return tokenizer.marked_spans(messages, **dialogue.context)

        found = marked(turns)
        if found is None:
            spans = answer_spans(turns, full, render, tokenizer.split_special)
            return list(zip(spans, (turn for turn in turns if turn.is_answer), strict=True))
        try:
            by_difference = answer_spans(turns, full, render, tokenizer.split_special)
            has_mark = not by_difference or by_difference[-1].marked
        except ChatTemplateError:
            has_mark = True  # it says by itself what the model is to write
        spans = [Span(start, end, has_mark) for start, end in found]
        if all(turn.trains == AS_ITS_ROLE for turn in turns):
            return [(span, None) for span in spans]
        told: list[tuple[Span, Turn | None]] = []
        for k, turn in enumerate(turns):
            until = len(marked(turns[: k + 1]) or ())
            told += [(span, turn) for span in spans[len(told) : until]]
        return told

    def _spans_with_prompts(self, turns: Sequence[Turn], full: str, render: Render) -> list[Span]:
        """All of the dialogue but the answers that are never to be trained."""
        whole = Span(0, len(full), self._is_closed(full))
        if all(turn.trains != NEVER for turn in turns):
            return [whole]
        spans, at = [], 0
        answers = answer_spans(turns, full, render, self.tokenizer.split_special)
        for span, turn in zip(answers, (t for t in turns if t.is_answer), strict=True):
            if turn.trains == NEVER:
                spans.append(Span(at, span.start, True))
                at = span.end
        return [*spans, whole._replace(start=at)] if full[at:].strip() else spans

    def _is_closed(self, text: str) -> bool:
        """Whether a text ends with a special token, trailing white space aside."""
        piece = self.tokenizer.split_special(text.rstrip())[-1:]
        return (
            bool(piece)
            and piece[0] != text.rstrip()
            and len(self.tokenizer.split_special(f"a{piece[0]}a")) == 3
        )


def _trains(turn: Turn) -> bool:
    return turn.is_answer and turn.trains == AS_ITS_ROLE


def _check_fields(dialogue: Dialogue, template: str | None, where: str) -> None:
    """Refuses what the template has no place for: it would be lost without a word."""
    names = [*dialogue.context, *(name for turn in dialogue.turns for name in turn.fields)]
    lost = []
    for name in dict.fromkeys(names):
        aliases = REASONING_FIELDS if name in REASONING_FIELDS else (name,)
        telling = name in ("tools", "documents", "tool_calls", *REASONING_FIELDS)
        if telling and not any(alias in (template or "") for alias in aliases):
            lost.append(name)
    if lost:
        whose = "the chat template" if template else "the built-in template"
        raise RecordError(
            f"{whose} has no place for {' and '.join(map(repr, lost))}",
            reason=f"no place for {', '.join(lost)}",
            where=where,
            fix="use the tokenizer of a Hugging Face model whose template has one, or that and "
            "--chat-template with a Jinja file that has; or --ignore-fields " + " ".join(lost),
        )


def plain_segments(turns: Sequence[Turn], train_on_prompt: bool = False) -> list[Segment]:
    """The built-in template: Alpaca's headings, and EOD behind each assistant turn.

    ::

        ### Instruction:
        {user}

        ### Response:
        {assistant}<EOD>
    """
    segments = []
    prompt = ""
    for number, turn in enumerate(turns):
        prompt += "\n\n" * (number > 0) + f"### {_PLAIN_HEADERS[turn.role]}:\n"
        if turn.is_answer:
            trains = turn.trains != NEVER if train_on_prompt else turn.trains == AS_ITS_ROLE
            answer = Segment(turn.content or "", trains, closed=True)
            segments += [Segment(prompt, train_on_prompt), answer]
            prompt = ""
        else:
            prompt += turn.content or ""
    return [*segments, Segment(prompt, train_on_prompt)] if prompt else segments
