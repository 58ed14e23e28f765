"""What a record becomes before it is tokenized: a plain text, or a dialogue of turns."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from megatron_scalebio.errors import UserError

AS_ITS_ROLE, AS_PROMPT, NEVER = "as its role", "as prompt", "never"
# Fields of a turn that say something besides its content; transformers knows all three names.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


class RecordError(UserError):
    """One record is at fault, so that it can be left out.

    Args:
        reason: what is wrong, in the same words for every record of the kind.
    """

    def __init__(self, message: str, *, reason: str, where: str = "", fix: str = "") -> None:
        self.reason = reason
        super().__init__(message, where=where, fix=fix)

    def __reduce__(self) -> tuple[Any, ...]:  # a worker's comes to the parent pickled
        return partial(RecordError, reason=self.reason), (str(self),)


@dataclass(frozen=True)
class Text:
    """Plain text, every token of which is to be predicted.

    Attributes:
        ignored: fields of the record that are not used.
        replaced: it held halves of letters, now U+FFFD.
    """

    text: str
    ignored: tuple[str, ...] = field(default=(), compare=False)
    replaced: bool = field(default=False, compare=False)


class Turn(NamedTuple):
    """One turn of a dialogue.

    role: system, user, assistant or tool.
    content: its text; None where there is none beside `fields`.
    trains: AS_ITS_ROLE (an answer trains), AS_PROMPT (an answer of the history: it trains where
        prompts do) or NEVER.
    fields: what else a chat template may read, such as `tool_calls`.
    parts: the texts that were joined to `content`, where it was given in parts.
    """

    role: str
    content: str | None
    trains: str = AS_ITS_ROLE
    fields: dict[str, Any] = {}  # noqa: RUF012  never written to
    parts: tuple[str, ...] = ()

    @property
    def is_answer(self) -> bool:
        """Whether it is an assistant turn that says something."""
        said = (self.content or "").strip() or any(self.fields.get(f) for f in REASONING_FIELDS)
        return self.role == "assistant" and bool(said or self.fields.get("tool_calls"))

    def message(self) -> dict[str, Any]:
        """The turn as a chat template takes it."""
        return {"role": self.role, "content": self.content, **self.fields}


@dataclass(frozen=True)
class Dialogue:
    """Turns in order.

    Attributes:
        turns: (role, content) pairs are made into turns.
        context: what the chat template is given besides: `tools`, `documents`, and more by name.
        ignored: fields of the record and its turns that are not used.
        replaced: it held halves of letters, now U+FFFD.
    """

    turns: tuple[Turn, ...]
    context: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = field(default=(), compare=False)
    replaced: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(Turn(*turn) for turn in self.turns))

    @property
    def has_tools(self) -> bool:
        """Whether it names tools, or calls any."""
        return "tools" in self.context or any("tool_calls" in turn.fields for turn in self.turns)
