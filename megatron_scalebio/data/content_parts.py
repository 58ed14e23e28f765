"""Content that is given in parts: what it becomes depends on the chat template.

    {"role": "user", "content": [{"type": "text", "text": "Hi,"}, {"type": "text", "text": " you"}]}

A template that reads text alone gets the parts' texts joined. One that reads parts may trim each of
them or put something between: it must render them as it renders the joined text, or is refused.
"""

from collections.abc import Sequence
from typing import Any

from megatron_scalebio.data.examples import Dialogue, RecordError, Turn
from megatron_scalebio.data.targets import ChatTemplateError
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.data.tool_calls import as_template_wants

_PROBE = "scalebioprobe"


def check_parts(dialogue: Dialogue, tokenizer: Tokenizer, where: str) -> None:
    """Refuses parts that the chat template does not simply join.

    Raises:
        RecordError: it renders them otherwise than the joined text.
    """
    template = tokenizer.template_for("tools" in dialogue.context)
    if template is None or not any(turn.parts for turn in dialogue.turns):
        return

    def render(messages: Sequence[dict[str, Any]]) -> str:
        return tokenizer.render_chat(messages, False, **dialogue.context)

    try:
        turns = as_template_wants(
            dialogue.turns, lambda turns: render([turn.message() for turn in turns])
        )
        joined = render([turn.message() for turn in turns])
        probed = render([_in_parts(turn, _PROBE) for turn in turns])
        by_parts = render([_in_parts(turn) for turn in turns])
    except ChatTemplateError:
        return  # it reads text alone, or refuses the dialogue anyway
    reads_text_alone = _PROBE not in probed or repr(_part(_PROBE)) in probed
    if by_parts != joined and not reads_text_alone:
        raise RecordError(
            "the chat template does not join the parts of a content as they are",
            reason="content in parts",
            where=where,
            fix="write each content as one text, or leave the record out by --bad-records skip",
        )


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _in_parts(turn: Turn, text: str | None = None) -> dict[str, Any]:
    if not turn.parts:
        return turn.message()
    parts = [_part(part if text is None else text) for part in turn.parts]
    return {**turn.message(), "content": parts}
