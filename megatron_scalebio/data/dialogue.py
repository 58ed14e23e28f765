"""Text and dialogues to token ids and a loss mask that is exact at every turn border.

An example is first cut into segments, each wholly a target or wholly not, and each segment is
tokenized alone. No token can then reach across a border, and the prompt has exactly the tokens
it has at inference, where the answer does not exist yet. A target segment is an assistant turn
with what ends it: the chat template's end-of-turn marker, or EOD in the built-in template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_scalebio.data.formats import Dialogue, Text
from megatron_scalebio.data.tokenizer import ChatTemplateError, Tokenizer
from megatron_scalebio.errors import UserError

_PLAIN_HEADERS = {
    "system": "System",
    "user": "Instruction",
    "assistant": "Response",
    "tool": "Tool",
}
_PROBE = "scalebioprobe"


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
        append_eod: closes a plain text with EOD. Dialogues always end with their end of turn.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, train_on_prompt: bool = False, append_eod: bool = True
    ) -> None:
        self.tokenizer = tokenizer
        self.train_on_prompt = train_on_prompt
        self.append_eod = append_eod
        self._turn_end: str | None = None

    def encode(self, example: Text | Dialogue, where: str = "") -> tuple[list[int], list[int]]:
        """Token ids and mask, of equal length; 1 marks a token that is to be predicted.

        The first token is never a target, since nothing precedes it. Tokens behind the last
        target are left out: in a causal model they cannot change the loss.
        """
        templated = False
        if isinstance(example, Text):
            segments = [Segment(example.text, True, self.append_eod)]
        elif self.tokenizer.chat_template is None:
            segments = plain_segments(example.messages)
        else:
            templated = True  # and so has its own BOS
            try:
                segments = self._chat_segments(example.messages)
            except ChatTemplateError as error:
                raise UserError(
                    f"the chat template {error}",
                    where=where or self.tokenizer.model,
                    fix="fix the record, or use --chat-template with plain or a Jinja file",
                ) from error
        if not self.train_on_prompt and not any(segment.target for segment in segments):
            return [], []
        ids: list[int] = []
        if self.tokenizer.adds_bos and not templated and self.tokenizer.bos_id is not None:
            ids.append(self.tokenizer.bos_id)
        mask = [0] * len(ids)
        for number, segment in enumerate(segments):
            encode = self.tokenizer.encode_continuation if number else self.tokenizer.encode
            new = encode(segment.text) + [self.tokenizer.eod_id] * segment.closed
            ids += new
            mask += [int(segment.target or self.train_on_prompt)] * len(new)
        if mask:
            mask[0] = 0
        end = len(mask) - mask[::-1].index(1) if 1 in mask else 0
        return ids[:end], mask[:end]

    def _chat_segments(self, messages: Sequence[tuple[str, str]]) -> list[Segment]:
        full = self.tokenizer.render_chat(messages, False)
        if self.train_on_prompt:
            return [Segment(full, True, closed=not self._end_of_turn())]
        segments: list[Segment] = []
        at = 0
        for start, end in self._assistant_spans(messages, full):
            if start > at:
                segments.append(Segment(full[at:start], False))
            segments.append(Segment(full[start:end], True, closed=not self._end_of_turn()))
            at = end
        return segments

    def _assistant_spans(
        self, messages: Sequence[tuple[str, str]], full: str
    ) -> list[tuple[int, int]]:
        """Character spans [start, end) of the assistant turns in the rendered dialogue.

        A turn starts where the generation prompt ends (what the model is given at inference)
        and ends with the end-of-turn marker.
        """
        turns = [
            k
            for k, (role, content) in enumerate(messages)
            if role == "assistant" and content.strip()
        ]
        starts = [self._turn_start(messages[:k], full) for k in turns]
        limits = [*(low for _, low in starts), len(full)][1:]
        spans = []
        for k, (start, low), limit in zip(turns, starts, limits, strict=True):
            found = self._find_content(messages[k][1], full, low, limit)
            if found is None:
                raise ChatTemplateError(
                    f"changes the text of assistant turn {k}, so its targets would not be exact"
                )
            spans.append((found[0] if start is None else start, found[1]))
        return spans

    def _turn_start(self, before: Sequence[tuple[str, str]], full: str) -> tuple[int | None, int]:
        """Where the turn starts (None: at its content), and where to look for its content."""
        if not before:
            return None, 0
        prompt = self.tokenizer.render_chat(before, True)
        if full.startswith(prompt):
            return len(prompt), len(prompt)
        # Some generation prompts open a thinking block that a finished turn does not have.
        base = self.tokenizer.render_chat(before, False)
        if not full.startswith(base):
            raise ChatTemplateError(
                "renders the beginning of a dialogue otherwise once it goes on, so response-only "
                "targets would not be exact"
            )
        return None, len(base)

    def _find_content(
        self, content: str, full: str, low: int, limit: int
    ) -> tuple[int, int] | None:
        """[start, end) of the content with its end-of-turn marker, at or after ``low``."""
        marker = self._end_of_turn()
        for text in (content, content.strip(), content.lstrip(), content.rstrip()):
            at = full.find(text + marker, low, limit)
            if at >= 0:
                return at, at + len(text) + len(marker)
        return None

    def _end_of_turn(self) -> str:
        """What the chat template writes behind an assistant turn, without trailing white space."""
        if self._turn_end is None:
            probe = self.tokenizer.render_chat([("user", "question"), ("assistant", _PROBE)], False)
            if _PROBE not in probe:
                raise ChatTemplateError("leaves out or changes assistant turns")
            self._turn_end = probe[probe.index(_PROBE) + len(_PROBE) :].rstrip()
        return self._turn_end


def plain_segments(messages: Sequence[tuple[str, str]]) -> list[Segment]:
    """The built-in template: Alpaca's headings, and EOD behind each assistant turn.

    ::

        ### Instruction:
        {user}

        ### Response:
        {assistant}<EOD>
    """
    segments = []
    prompt = ""
    for number, (role, content) in enumerate(messages):
        prompt += "\n\n" * (number > 0) + f"### {_PLAIN_HEADERS[role]}:\n"
        if role == "assistant" and content.strip():
            segments += [Segment(prompt, False), Segment(content, True, closed=True)]
            prompt = ""
        else:
            prompt += content
    return [*segments, Segment(prompt, False)] if prompt else segments
