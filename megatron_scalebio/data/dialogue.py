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
from typing import Any

from megatron_scalebio.data.examples import (
    AS_ITS_ROLE,
    NEVER,
    REASONING_FIELDS,
    Dialogue,
    RecordError,
    Text,
    Turn,
)
from megatron_scalebio.data.places import RESERVED, Places, check_calls, owners
from megatron_scalebio.data.record_fields import TURN_FIELDS
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
            if self.tokenizer.template_for("tools" in example.context) is None:
                _refuse_lost(_lost_without_template(example), "the built-in template", where)
                ids, mask = self._segments(plain_segments(example.turns, self.train_on_prompt))
            else:
                try:
                    ids, mask = self._chat(example, where)
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

    def _chat(self, dialogue: Dialogue, where: str) -> tuple[list[int], list[int]]:
        """Ids and mask of the rendered dialogue, closed by EOD if its last target has no end."""

        def render(
            turns: Sequence[Turn], generate: bool, context: dict[str, Any] = dialogue.context
        ) -> str:
            messages = [turn.message() for turn in turns]
            return self.tokenizer.render_chat(messages, generate, **context)

        turns = dialogue.turns
        if not self.train_on_prompt and not any(_trains(turn) for turn in turns):
            return [], []
        _check_reserved(dialogue, where)
        check_calls(turns)
        tools = "tools" in dialogue.context
        try:
            turns = tuple(as_template_wants(turns, lambda turns: render(turns, False)))
            dialogue = replace(dialogue, turns=turns)
            full = render(turns, False)
        except ChatTemplateError:
            template = self.tokenizer.template_for(tools) or ""
            _refuse_lost(_unnamed_fields(dialogue, template), "the chat template", where)
            raise
        places = Places(
            dialogue,
            full,
            lambda turns, context: render(turns, False, context),
            self.tokenizer.template_reads(tools),
        )
        _refuse_lost(places.lost_fields(), "the chat template", where)
        places.check_turns()
        if self.train_on_prompt:
            spans = self._spans_with_prompts(turns, full, render)
        else:
            spans = self._answers(dialogue, full, render, places)
        if not spans:
            return [], []
        last = spans[-1]
        text = full if last.marked else full[: last.end]
        cut = self.train_on_prompt or not self.tokenizer.marks_targets(tools)
        ids, mask = self.tokenizer.encode_spans(text, [(s.start, s.end) for s in spans], cut)
        if not last.marked:
            ids, mask = [*ids, self.tokenizer.eod_id], [*mask, 1]
        return ids, mask

    def _answers(self, dialogue: Dialogue, full: str, render: Render, places: Places) -> list[Span]:
        """The spans that train, as the template marks them, or by difference."""
        turns, tokenizer = dialogue.turns, self.tokenizer

        def marked(turns: Sequence[Turn]) -> list[tuple[int, int]] | None:
            messages = [turn.message() for turn in turns]
            return tokenizer.marked_spans(messages, **dialogue.context)

        answers = [k for k, turn in enumerate(turns) if turn.is_answer]
        found = marked(turns)
        if found is None:
            spans = answer_spans(turns, full, render, tokenizer.split_special)
            told = list(zip(spans, answers, strict=True))
            return [span for span, k in told if _trains(turns[k])]
        try:
            spans = answer_spans(turns, full, render, tokenizer.split_special)
            by_difference = dict(zip(answers, spans, strict=True))
        except ChatTemplateError:
            by_difference = {}
        told = _told(found, marked(places.probed), places, by_difference)
        return [span for span, k in told if turns[k].trains == AS_ITS_ROLE]

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


def _told(
    found: Sequence[tuple[int, int]],
    probed: Sequence[tuple[int, int]] | None,
    places: Places,
    by_difference: dict[int, Span],
) -> list[tuple[Span, int]]:
    """The spans that a template marks, with their turns; of others' turns nothing.

    Args:
        found: as marked in the dialogue. probed: in the one of `places`, with sentinels.
        by_difference: the spans of the answers so far as they can be told.
    """
    turns = places.turns
    if probed is None or len(probed) != len(found):
        raise ChatTemplateError(
            "marks other tokens once a turn says something else, so its targets would not be exact"
        )
    # Whether a mark ends an answer shows by difference; a template that tells nothing has one.
    told: list[tuple[Span, int]] = []
    for (start, end), of in zip(found, owners(places.said, probed), strict=True):
        if len(of) == 1 and all(turns[k].role == "assistant" for k in of):
            (k,) = of
            told.append((Span(start, end, k not in by_difference or by_difference[k].marked), k))
            continue
        inside = [
            (Span(max(start, one.start), min(end, one.end), one.marked), k)
            for k, one in by_difference.items()
            if one.start < end and start < one.end
        ]
        if not inside or any(k not in by_difference for k in of if turns[k].is_answer):
            raise ChatTemplateError("marks more than one turn as one answer")
        told += inside
    return told


def _check_reserved(dialogue: Dialogue, where: str) -> None:
    """Refuses what the caller of a template decides, and no record."""
    reserved = [name for name in dialogue.context if name in RESERVED]
    if reserved:
        listed = ", ".join(map(repr, reserved))
        raise RecordError(
            f"chat_template_kwargs: {listed} is not for a record to tell",
            reason="bad chat_template_kwargs",
            where=where,
            fix="take it out, or --ignore-fields chat_template_kwargs",
        )


def _unnamed_fields(dialogue: Dialogue, template: str) -> list[str]:
    """The fields that a template does not even name, which may be why it refuses a dialogue."""
    lost = []
    for name in _lost_without_template(dialogue):
        aliases = REASONING_FIELDS if name in REASONING_FIELDS else (name,)
        if not any(alias in template for alias in aliases):
            lost.append(name)
    return lost


def _lost_without_template(dialogue: Dialogue) -> list[str]:
    names = [*dialogue.context, *(name for turn in dialogue.turns for name in turn.fields)]
    kept = ("tool_call_id", "name") if dialogue.has_tools else ("tool_call_id",)
    return [name for name in dict.fromkeys(names) if name not in kept]


def _refuse_lost(lost: Sequence[str], whose: str, where: str) -> None:
    """Refuses what the template has no place for: it would be lost without a word."""
    if not lost:
        return
    known = ("tools", "documents", *TURN_FIELDS)
    fields = dict.fromkeys(name if name in known else "chat_template_kwargs" for name in lost)
    raise RecordError(
        f"{whose} has no place for {' and '.join(map(repr, lost))}",
        reason=f"no place for {', '.join(lost)}",
        where=where,
        fix="use the tokenizer of a Hugging Face model whose template has one, or that and "
        "--chat-template with a Jinja file that has; or --ignore-fields " + " ".join(fields),
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
