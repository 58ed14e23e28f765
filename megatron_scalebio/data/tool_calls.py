"""Arguments of tool calls: an object, or its JSON text, as OpenAI's logs have it.

    {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    {"function": {"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}}

Most chat templates are written for the object, and would write the text in quotes once more. Others
write the text as it is, and some of these fail on an object.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from megatron_scalebio.data.examples import Turn
from megatron_scalebio.data.targets import ChatTemplateError

_PROBE = '{"argument": "value"}'


def as_template_wants(
    turns: Sequence[Turn], render: Callable[[Sequence[Turn]], str]
) -> Sequence[Turn]:
    """The turns; objects in place of JSON text, unless the template writes text as it is.

    Args:
        render: the dialogue by the chat template.

    Raises:
        ChatTemplateError: a text that the template has no place for is not of an object.
    """
    if not any(isinstance(arguments, str) for arguments in _arguments(turns)):
        return turns
    try:
        as_it_is = _PROBE in render(_changed(turns, lambda text: _PROBE))
    except ChatTemplateError:  # it reads the object's fields, or refuses all of the dialogue
        with contextlib.suppress(ChatTemplateError):
            render(objects := _changed(turns, _object))
            return objects
        return turns
    return turns if as_it_is else _changed(turns, _object)


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ChatTemplateError(
            f"takes an object as arguments of a tool call, and {text[:80]!r} is not one"
        )
    return value


def _calls(turn: Turn) -> list[dict[str, Any]]:
    calls = turn.fields.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def _holder(call: dict[str, Any]) -> dict[str, Any]:
    """What of a call has its arguments: itself, or its function."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def _arguments(turns: Sequence[Turn]) -> list[Any]:
    return [_holder(call).get("arguments") for turn in turns for call in _calls(turn)]


def _changed(turns: Sequence[Turn], change: Callable[[str], Any]) -> tuple[Turn, ...]:
    """The turns, with another value for each text of arguments."""

    def of_call(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        holder = _holder(call)
        text = holder.get("arguments")
        if not isinstance(text, str):
            return call
        changed = {**holder, "arguments": change(text)}
        return changed if holder is call else {**call, "function": changed}

    return tuple(
        turn._replace(
            fields={**turn.fields, "tool_calls": [of_call(c) for c in turn.fields["tool_calls"]]}
        )
        if _calls(turn)
        else turn
        for turn in turns
    )
