"""The fields of records that are known, and how a user renames or leaves out others."""

from dataclasses import dataclass
from typing import Any

from megatron_scalebio.data.examples import REASONING_FIELDS, RecordError
from megatron_scalebio.errors import UserError

FORMATS = ("text", "alpaca", "pairs", "sharegpt", "messages")
PROMPTS = ("prompt", "question")
ANSWERS = ("completion", "answer", "response")
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
# They say where a record is from, and nothing that a model could learn: left out and counted.
METADATA = frozenset(
    {"_id", "id", "idx", "index", "uid", "uuid", "row_id", "question_id", "prompt_id",
     "conversation_id", "chat_id", "source", "dataset", "dataset_name", "data_source",
     "sampled_from", "origin", "url", "timestamp", "date", "created", "created_at", "meta",
     "metadata", "lang", "language", "license", "category", "subset", "split", "model", "author"}
)  # fmt: skip
ALL_FIELDS = "*"
SYSTEM = ("system", "system_prompt")
DIALOGUES = ("messages", "conversations", "items")  # lists of turns, of which a record has one
TRAIN_FLAGS = ("weight", "train", "loss")
TURN_FIELDS = ("tool_calls", "tool_call_id", "name", *REASONING_FIELDS)
KNOWN = {
    "text": (),
    "alpaca": ("instruction", "input", "output", "history"),
    "pairs": (),
    "sharegpt": ("items", "conversations"),
    "messages": ("messages", "conversations"),
}
BESIDE = (*SYSTEM, "tools", "documents", "chat_template_kwargs")  # of every dialogue


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """How records are read.

    Attributes:
        format: one of ``FORMATS``, or ``auto``: each file goes by its first record.
        text_key: the field that holds the text, for the format ``text``.
        columns: (field, column): what a field is called in the files, where that is another name.
        ignore_fields: fields that are left out; ``*`` stands for all that are not known.
    """

    format: str = "auto"
    text_key: str = "text"
    columns: tuple[tuple[str, str], ...] = ()
    ignore_fields: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        return name in self.ignore_fields or ALL_FIELDS in self.ignore_fields

    def renamed(self, value: dict[str, Any], where: str) -> dict[str, Any]:
        """The record with the fields' own names."""
        if not self.columns:
            return value
        taken = {column for _, column in self.columns}
        renamed = {name: item for name, item in value.items() if name not in taken}
        for name, column in self.columns:
            if name in renamed and not self.ignores(name):
                raise RecordError(
                    f"--map {name}={column} would replace the column {name!r}",
                    reason=f"unknown field {name}",
                    where=where,
                    fix=f"--ignore-fields {name} leaves that one out",
                )
            if column in value:
                renamed[name] = value[column]
        return renamed


PLAIN_OPTIONS = RecordOptions()


def parse_columns(values: list[str]) -> tuple[tuple[str, str], ...]:
    """``FIELD=COLUMN[,FIELD=COLUMN...]`` to pairs."""
    pairs = []
    known = {name for names in KNOWN.values() for name in names}
    known |= {"text", *PROMPTS, *ANSWERS, *BESIDE}
    for value in (part for text in values for part in text.split(",")):
        name, separator, column = value.partition("=")
        if not separator or not column or name not in known:
            raise UserError(
                f"--map: {value!r} is not FIELD=COLUMN (FIELD is one of {', '.join(sorted(known))})"
            )
        pairs.append((name, column))
    return tuple(pairs)
