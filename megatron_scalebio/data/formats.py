"""The record formats: a JSON object becomes a :class:`Text` or a :class:`Dialogue`.

text      {"text": "..."}
alpaca    {"instruction": "...", "input": "...", "output": "..."}
pairs     {"prompt": "...", "completion": "..."} | {"question": "...", "answer": "..."}
sharegpt  {"items" | "conversations": [{"from": "human" | "gpt" | ..., "value": "..."}]}
messages  {"messages": [{"role": "user" | "assistant" | ..., "content": "..."}]}
          content may be a list of parts, {"type": "text", "text": "..."}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_scalebio.data.records import RecordReader
from megatron_scalebio.errors import UserError

FORMATS = ("text", "alpaca", "pairs", "sharegpt", "messages")
PAIRS = (("prompt", "completion"), ("question", "answer"))
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Text:
    """Plain text, every token of which is to be predicted."""

    text: str


@dataclass(frozen=True)
class Dialogue:
    """Turns in order, each (role, content); role is system, user, assistant or tool."""

    messages: tuple[tuple[str, str], ...]


def detect_format(value: dict[str, Any], where: str, text_key: str = "text") -> str:
    """Names the format of a record by its fields, or raises :class:`UserError`.

    Alpaca comes before text: some Alpaca files repeat the whole prompt in a ``text`` field.
    """
    if text_key != "text" and text_key in value:
        return "text"
    turns = value.get("messages", value.get("conversations", value.get("items")))
    if isinstance(turns, list):
        first = turns[0] if turns and isinstance(turns[0], dict) else {}
        if "role" in first or ("messages" in value and "from" not in first):
            return "messages"
        return "sharegpt"
    if "instruction" in value and "output" in value:
        return "alpaca"
    if any(prompt in value and answer in value for prompt, answer in PAIRS):
        return "pairs"
    if "text" in value:
        return "text"
    fields = ", ".join(sorted(map(str, value))[:8]) or "none"
    raise UserError(
        f"{where}: unknown record format; its fields are: {fields} (expecting text, or instruction "
        "and output, or prompt and completion, or question and answer, or items/conversations, or "
        f"messages; --format names one of {', '.join(FORMATS)})"
    )


def read_examples(
    path: Path, format_name: str = "auto", text_key: str = "text"
) -> Iterator[Text | Dialogue]:
    """Streams a file's records as text or dialogues; ``auto`` goes by the first record."""
    for line, value in RecordReader(path):
        where = f"{path}:{line}"
        if format_name == "auto":
            format_name = detect_format(value, where, text_key)
        yield parse_record(value, format_name, where, text_key)


def parse_record(
    value: dict[str, Any], format_name: str, where: str, text_key: str = "text"
) -> Text | Dialogue:
    """Turns a record into text or a dialogue.

    Args:
        value: the JSON object.
        format_name: one of ``FORMATS``.
        where: file and line, for error messages.
        text_key: the field that holds the text, for the format ``text``.

    Raises:
        UserError: a field is missing or of the wrong type, or a role is unknown.
    """
    if format_name == "text":
        return Text(_string(value, text_key, where, format_name))
    if format_name == "alpaca":
        prompt = _string(value, "instruction", where, format_name)
        if value.get("input"):
            prompt = f"{prompt}\n\n{_string(value, 'input', where, format_name)}"
        answer = _string(value, "output", where, format_name)
        return Dialogue((("user", prompt), ("assistant", answer)))
    if format_name == "pairs":
        keys = next((pair for pair in PAIRS if pair[0] in value), PAIRS[0])
        prompt, answer = (_string(value, key, where, format_name) for key in keys)
        return Dialogue((("user", prompt), ("assistant", answer)))
    if format_name == "sharegpt":
        return _dialogue(value, ("items", "conversations"), "from", "value", where, format_name)
    if format_name == "messages":
        return _dialogue(
            value, ("messages", "conversations"), "role", "content", where, format_name
        )
    raise UserError(f"--format: unknown format {format_name!r} (one of {', '.join(FORMATS)})")


def _dialogue(
    value: dict[str, Any],
    list_keys: tuple[str, ...],
    role_key: str,
    content_key: str,
    where: str,
    format_name: str,
) -> Dialogue:
    key = next((k for k in list_keys if k in value), None)
    if key is None:
        raise _missing(" or ".join(list_keys), where, format_name)
    if not isinstance(value[key], list):
        raise UserError(f"{where}: field {key!r} is not a list")
    messages = []
    for number, turn in enumerate(value[key]):
        at = f"{where}: {key}[{number}]"
        if not isinstance(turn, dict):
            raise UserError(f"{at}: turn is not an object")
        role = _string(turn, role_key, at, format_name)
        if role.lower() not in ROLES:
            known = ", ".join(ROLES)
            raise UserError(f"{at}: unknown role {role!r} (known roles: {known})")
        content = turn.get(content_key)
        if isinstance(content, list):
            turn = {content_key: _joined(content, at)}
        messages.append((ROLES[role.lower()], _string(turn, content_key, at, format_name)))
    return Dialogue(tuple(messages))


def _joined(parts: list[Any], where: str) -> str:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{where}: a part of the content is of type {kind!r} (keep text parts alone, or "
                "leave the record out)"
            )
    return "".join(part["text"] for part in parts)


def _string(value: dict[str, Any], key: str, where: str, format_name: str) -> str:
    if key not in value:
        raise _missing(key, where, format_name)
    text = value[key]
    if not isinstance(text, str):
        kind = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}
        raise UserError(
            f"{where}: field {key!r} is {kind.get(type(text), 'a number')}, not a string (write it "
            "as text, or leave the record out)"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # A lone surrogate escape (e.g. a cut emoji, "\ud83d") is legal JSON but not text.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _missing(field: str, where: str, format_name: str) -> UserError:
    return UserError(
        f"{where}: missing field {field!r} of format {format_name} (add the field, or name another "
        "--format)"
    )
