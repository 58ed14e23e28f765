"""Turns and fields with a sentinel, a text that occurs nowhere, in place of what they say.

Where the sentinel stands in a rendering tells what the template does with a field, and where.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from megatron_scalebio.data.examples import REASONING_FIELDS, Turn

_SENTINEL = "scalebiosentinel"


class Said(NamedTuple):
    """A sentinel in a rendering: of which turn and part, and which characters it is."""

    turn: int
    part: str
    start: int
    end: int

    @property
    def of_call(self) -> bool:
        """Whether it stands for a tool call."""
        return self.part.startswith("call")


class Probes:
    """Makes sentinels that do not occur in a text, and finds them again.

    Parts of a turn: ``content``, ``reasoning``, ``name``, and ``call0`` and on.
    """

    def __init__(self, *texts: str) -> None:
        self._word = _SENTINEL
        while any(self._word in text for text in texts):
            self._word += "x"
        self._pattern = re.compile(rf"{self._word}-(\d+)-([a-z]+\d*)-")

    def word(self, turn: int, part: str) -> str:
        return f"{self._word}-{turn}-{part}-"

    def said(self, text: str, turn: int | None = None) -> list[Said]:
        """All sentinels in a rendering, in order, or those of one turn."""
        found = (
            Said(int(match[1]), match[2], match.start(), match.end())
            for match in self._pattern.finditer(text)
        )
        return [one for one in found if turn is None or one.turn == turn]

    def between(self, text: str, first: str, second: str) -> str:
        """What stands between two parts, one behind the other; else nothing."""
        for one, another in pairwise(self.said(text)):
            if (one.part, another.part) == (first, second):
                return text[one.end : another.start]
        return ""

    def turn(self, turn: Turn, k: int, *, blank: bool = False, names: bool = False) -> Turn:
        """A turn with sentinels wherever it says something.

        Args:
            blank: also where the content is blank.
            names: also for what its tool calls call.
        """
        content, fields = turn.content, dict(turn.fields)
        if blank or (content or "").strip():
            content = self.word(k, "content")
        for name in REASONING_FIELDS:
            if isinstance(fields.get(name), str):
                fields[name] = self.word(k, "reasoning")
        if isinstance(calls := fields.get("tool_calls"), list):
            fields["tool_calls"] = [
                self._call(call, self.word(k, f"call{n}"), names) for n, call in enumerate(calls)
            ]
        return turn._replace(content=content, fields=fields)

    def turns(self, turns: Sequence[Turn]) -> list[Turn]:
        """All turns; an answer that says nothing says a sentinel, too."""
        return [
            self.turn(turn, k, blank=turn.role == "assistant" and not turn.is_answer)
            for k, turn in enumerate(turns)
        ]

    def tools(self, tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Tools of another name and description."""
        return [self._holder(tool, self._tool) for tool in tools]

    def texts(self, value: Any) -> Any:
        """A value with sentinels for all its texts."""
        if isinstance(value, dict):
            return {key: self.texts(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self.texts(item) for item in value]
        return self.word(0, "text") if isinstance(value, str) else value

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        word = self.word(0, "text")
        return {**tool, "name": word, **({"description": word} if "description" in tool else {})}

    def _call(self, call: Any, word: str, names: bool) -> Any:
        def changed(holder: dict[str, Any]) -> dict[str, Any]:
            arguments = holder.get("arguments")
            if isinstance(arguments, str):
                arguments = json.dumps({"q": word})
            elif isinstance(arguments, dict):
                arguments = {"q": word}
            new = {**holder, **({"arguments": arguments} if "arguments" in holder else {})}
            return {**new, "name": word} if names else new

        return self._holder(call, changed)

    @staticmethod
    def _holder(value: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        """A call or a tool, what it says of its function changed."""
        if not isinstance(value, dict):
            return value
        if isinstance(value.get("function"), dict):
            return {**value, "function": change(value["function"])}
        return change(value)
