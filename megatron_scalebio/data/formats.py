"""The record formats: a JSON object becomes a :class:`Text` or a :class:`Dialogue`.

text      {"text": "..."}
alpaca    {"instruction": "...", "input": "...", "output": "...", "history": [["...", "..."]]}
pairs     {"prompt" | "question": "...", "completion" | "answer" | "response": "..."}
          or, as in TRL, two lists of messages
sharegpt  {"items" | "conversations": [{"from": "human" | "gpt" | ..., "value": "..."}]}
messages  {"messages": [{"role": "user" | "assistant" | ..., "content": "..."}]}
          content may be a list of parts, {"type": "text", "text": "..."}

Dialogues may bring "system", "tools", "documents" and "chat_template_kwargs", their turns
"tool_calls", "reasoning_content" and "weight", "train" or "loss". Any other field is refused, or
left out and counted.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_scalebio.data.examples import (
    AS_ITS_ROLE,
    AS_PROMPT,
    NEVER,
    REASONING_FIELDS,
    Dialogue,
    RecordError,
    Text,
    Turn,
)
from megatron_scalebio.data.files import open_records
from megatron_scalebio.data.record_fields import (
    ANSWERS,
    BESIDE,
    DIALOGUES,
    FORMATS,
    KNOWN,
    METADATA,
    PLAIN_OPTIONS,
    PROMPTS,
    ROLES,
    SYSTEM,
    TRAIN_FLAGS,
    TURN_FIELDS,
    RecordOptions,
)
from megatron_scalebio.data.records import DECODER, OnBad, Spelled
from megatron_scalebio.errors import UserError


def detect_format(value: dict[str, Any], where: str, options: RecordOptions = PLAIN_OPTIONS) -> str:
    """Names the format of a record by its fields, or raises :class:`UserError`.

    Alpaca comes before text: some Alpaca files repeat the whole prompt in a ``text`` field.
    """
    given, value = value, options.renamed(value, where)
    value = {name: item for name, item in value.items() if name not in options.ignore_fields}
    if options.text_key != "text" and options.text_key in value:
        return "text"
    if "chosen" in value and "rejected" in value:
        raise RecordError(
            "'chosen' and 'rejected' make a preference pair, which is not trained on",
            reason="preference pair",
            where=where,
            fix="train on the chosen answers alone: --map messages=chosen where they are whole "
            "dialogues, else --map answer=chosen; both with --ignore-fields",
        )
    turns = value.get(_first_told(value, DIALOGUES))
    if isinstance(turns, list):
        first = turns[0] if turns and isinstance(turns[0], dict) else {}
        if "role" in first or ("messages" in value and "from" not in first):
            return "messages"
        return "sharegpt"
    if "instruction" in value and "output" in value:
        return "alpaca"
    if any(name in value for name in PROMPTS) and any(name in value for name in ANSWERS):
        return "pairs"
    if "text" in value:
        return "text"
    absent = [column for _, column in options.columns if column not in given]
    fields = ", ".join(sorted(map(str, given if absent else value))[:8]) or "none"
    if absent:
        raise RecordError(
            f"no field {absent[0]!r}, which --map names; its fields are: {fields}",
            reason="unknown format",
            where=where,
            fix="--map FIELD=COLUMN, with a column that is there",
        )
    raise RecordError(
        f"unknown record format; its fields are: {fields}",
        reason="unknown format",
        where=where,
        fix="expecting text, or instruction and output, or prompt and completion, or question and "
        "answer, or items/conversations, or messages; --map FIELD=COLUMN names columns, as in "
        "--map text=content; --format names one of " + ", ".join(FORMATS),
    )


def read_examples(
    path: Path, options: RecordOptions = PLAIN_OPTIONS, on_bad: OnBad | None = None
) -> Iterator[Text | Dialogue]:
    """Streams a file's records as text or dialogues; ``auto`` goes by the first record.

    Args:
        on_bad: is told of each record at fault; None: the first is raised.
    """
    format_name = options.format
    for line, value in open_records(path, on_bad):
        where = f"{path}:{line}"
        try:
            if format_name == "auto":
                format_name = detect_format(value, where, options)
            example = parse_record(value, format_name, where, options)
        except RecordError as error:
            if on_bad is None:
                raise
            on_bad(line, error)
        else:
            yield example


def parse_record(
    value: dict[str, Any], format_name: str, where: str, options: RecordOptions = PLAIN_OPTIONS
) -> Text | Dialogue:
    """Turns a record into text or a dialogue.

    Args:
        value: the JSON object.
        format_name: one of ``FORMATS``.
        where: file and line, for error messages.

    Raises:
        RecordError: a field is missing, of the wrong type or not known, or a role is unknown.
    """
    if format_name not in FORMATS:
        raise UserError(f"--format: unknown format {format_name!r} (one of {', '.join(FORMATS)})")
    record = _Record(options.renamed(value, where), format_name, where, options)
    return record.parse()


class _Record:
    """One record while it is parsed."""

    def __init__(
        self, value: dict[str, Any], format_name: str, where: str, options: RecordOptions
    ) -> None:
        self.format, self.where, self.options = format_name, where, options
        self.ignored: dict[str, None] = {}
        self.replaced = False
        self.unknown: dict[str, str] = {}  # fields, and where each was first
        self.value = self._used(value, where)

    def parse(self) -> Text | Dialogue:
        example = self._parsed()
        if not self.unknown:
            return example
        names, one = list(self.unknown), len(self.unknown) == 1
        listed = ", ".join(map(repr, names))
        raise RecordError(
            f"{'field' if one else 'fields'} {listed} {'is' if one else 'are'} not known in format "
            f"{self.format}, and would be lost",
            reason=f"unknown {'field' if one else 'fields'} {', '.join(names)}",
            where=self.unknown[names[0]],
            fix=f"--ignore-fields {' '.join(names)} leaves {'it' if one else 'them'} out, --map "
            f"reads {'it' if one else 'one'} as another",
        )

    def _parsed(self) -> Text | Dialogue:
        if self.format == "text":
            text = self._string(self.value, self.options.text_key, self.where)
            self._check_known((self.options.text_key,))
            return Text(text, tuple(self.ignored), self.replaced)
        read: dict[str, Callable[[], tuple[list[Turn], tuple[str, ...]]]] = {
            "alpaca": self._alpaca,
            "pairs": self._pairs,
            "sharegpt": lambda: self._listed(("items", "conversations"), "from", "value"),
            "messages": lambda: self._listed(("messages", "conversations"), "role", "content"),
        }
        turns, own = read[self.format]()
        self._check_known((*own, *KNOWN[self.format], *BESIDE))
        turns = [*self._system(turns), *turns]
        context = self._context()
        return Dialogue(tuple(turns), context, tuple(self.ignored), self.replaced)

    def _used(self, value: dict[str, Any], where: str) -> dict[str, Any]:
        """The fields that are there and are not left out; null is no value."""
        used = {}
        for name, item in value.items():
            if name in self.options.ignore_fields:
                self.ignored[name] = None
            else:
                used[name] = item
        return used

    def _check_known(self, known: tuple[str, ...], turn: dict[str, Any] | None = None,
                     where: str = "") -> None:  # fmt: skip
        for name, item in (self.value if turn is None else turn).items():
            if name in known or _says_nothing(item):
                continue
            if name in METADATA or self.options.ignores(name):
                self.ignored[name] = None
                continue
            self.unknown.setdefault(name, where or self.where)

    def _alpaca(self) -> tuple[list[Turn], tuple[str, ...]]:
        prompt = self._string(self.value, "instruction", self.where)
        extra = self.value.get("input")
        if isinstance(extra, int | float) and not isinstance(extra, bool):
            written = json.dumps(self._whole(extra, self.where))
            if isinstance(extra, Spelled) and extra.spelling != written:
                problem = f"field 'input' is {extra.spelling}, which as a number would be {written}"
                raise self._error(f"{problem}: write it as text", "input", self.where)
            extra = written
        if extra is not None and extra != "":
            prompt = f"{prompt}\n\n{self._string({'input': extra}, 'input', self.where)}"
        answer = self._string(self.value, "output", self.where)
        text = self.value.get("text")
        repeated = ("text",) if isinstance(text, str) and answer.strip() in text else ()
        return [*self._history(), Turn("user", prompt), Turn("assistant", answer)], repeated

    def _history(self) -> list[Turn]:
        """Earlier turns of an Alpaca record, which train where prompts do."""
        turns = []
        history = self.value.get("history")
        if _says_nothing(history):
            return []
        if not isinstance(history, list):
            raise self._error("field 'history' is not a list", "history", self.where)
        for number, pair in enumerate(history):
            where = f"{self.where}: history[{number}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise self._error("is not a pair [question, answer]", "history", where)
            question, answer = (self._string({"text": text}, "text", where) for text in pair)
            turns += [Turn("user", question), Turn("assistant", answer, AS_PROMPT)]
        return turns

    def _pairs(self) -> tuple[list[Turn], tuple[str, ...]]:
        keys = tuple(
            next((name for name in names if name in self.value), names[0])
            for names in (PROMPTS, ANSWERS)
        )
        if all(isinstance(self.value.get(key), list) for key in keys):
            prompt, answer = (self._turns(key, "role", "content") for key in keys)
            prompt = [
                turn._replace(trains=AS_PROMPT) if turn.trains == AS_ITS_ROLE else turn
                for turn in prompt
            ]
            return [*prompt, *answer], keys
        question, reply = (self._string(self.value, key, self.where) for key in keys)
        return [Turn("user", question), Turn("assistant", reply)], keys

    def _listed(
        self, list_keys: tuple[str, ...], role_key: str, content_key: str
    ) -> tuple[list[Turn], tuple[str, ...]]:
        key = _first_told(self.value, list_keys)
        if key not in self.value:
            raise self._missing(" or ".join(list_keys), self.where)
        told = [name for name in DIALOGUES if not _says_nothing(self.value.get(name))]
        if len(told) > 1:
            raise RecordError(
                f"holds two dialogues, {told[0]!r} and {told[1]!r}",
                reason="two dialogues",
                where=self.where,
                fix=f"--ignore-fields {told[1]} leaves one of them out",
            )
        return self._turns(key, role_key, content_key), ()

    def _turns(self, key: str, role_key: str, content_key: str) -> list[Turn]:
        if not isinstance(self.value[key], list):
            raise self._error(f"field {key!r} is not a list", key, self.where)
        return [
            self._turn(turn, f"{self.where}: {key}[{number}]", role_key, content_key)
            for number, turn in enumerate(self.value[key])
        ]

    def _turn(self, turn: Any, at: str, role_key: str, content_key: str) -> Turn:
        if not isinstance(turn, dict):
            raise self._error("turn is not an object", "turn", at)
        turn = self._used(turn, at)
        named = self._string(turn, role_key, at)
        role = ROLES.get(named.lower())
        if role is None:
            raise RecordError(
                f"unknown role {named!r}",
                reason="unknown role",
                where=at,
                fix=f"known roles: {', '.join(ROLES)}",
            )
        self._check_known((role_key, content_key, *TURN_FIELDS, *TRAIN_FLAGS), turn, at)
        fields = self._turn_fields(turn, role, at)
        content = turn.get(content_key)
        parts: tuple[str, ...] = ()
        if isinstance(content, list):
            parts = self._parts(content, at)
            content = "".join(parts)
        if content is not None or not ("tool_calls" in fields or set(fields) & {*REASONING_FIELDS}):
            content = self._string({**turn, content_key: content} if content_key in turn else turn,
                                   content_key, at)  # fmt: skip
        return Turn(role, content, self._trains(turn, role, at), fields, parts)

    def _turn_fields(self, turn: dict[str, Any], role: str, at: str) -> dict[str, Any]:
        """What a turn says beside its content."""
        told = {name: turn[name] for name in TURN_FIELDS if not _says_nothing(turn.get(name))}
        fields: dict[str, Any] = {}
        for name in told:
            if role != "assistant" and name in ("tool_calls", *REASONING_FIELDS):
                raise self._error(f"a {role} turn has {name!r}, and only answers do", name, at)
            if name == "tool_calls":
                if calls := self._objects(told[name], name, list, at):
                    fields[name] = self._whole(calls, at)
            else:
                fields[name] = self._string(told, name, at)
        thoughts = {name: text for name, text in fields.items() if name in REASONING_FIELDS}
        if len(set(thoughts.values())) > 1:
            names = " and ".join(map(repr, thoughts))
            raise self._error(f"{names} tell two thoughts", "reasoning", at)
        return fields

    def _objects(self, value: Any, name: str, kind: type, where: str) -> Any:
        """An object or a list of objects, which may be given as its JSON text."""
        if isinstance(value, str) and value.strip():
            try:
                value = DECODER.decode(value)
            except (ValueError, RecursionError) as error:
                problem = f"field {name!r} is not JSON: {error}"
                raise self._error(problem, name, where) from None
        if _says_nothing(value) or (isinstance(value, str) and not value.strip()):
            return kind()
        items = value if isinstance(value, list) else [value]
        if not isinstance(value, kind) or not all(isinstance(item, dict) for item in items):
            what = "an object" if kind is dict else "a list of objects"
            raise self._error(f"field {name!r} is not {what}", name, where)
        return value

    def _trains(self, turn: dict[str, Any], role: str, at: str) -> str:
        told = {name: turn[name] for name in TRAIN_FLAGS if turn.get(name) is not None}
        for name, value in told.items():
            if value not in (0, 1) or isinstance(value, str):
                raise self._error(f"{name!r} is {value!r}, not 0, 1, true or false", name, at)
        if len({bool(value) for value in told.values()}) > 1:
            raise self._error(f"{' and '.join(map(repr, told))} contradict each other", "flags", at)
        if role != "assistant":
            if told.get("train") or told.get("loss"):
                raise self._error(f"a {role} turn is to train, and only answers do", "flags", at)
            return AS_ITS_ROLE
        return AS_ITS_ROLE if all(told.values()) else NEVER

    def _system(self, turns: list[Turn]) -> list[Turn]:
        told = [name for name in SYSTEM if not _says_nothing(self.value.get(name))]
        if not told:
            return []
        text = self._string(self.value, told[0], self.where)
        if len(told) > 1 or (turns and turns[0].role == "system" and turns[0].content != text):
            raise self._error("tells two system prompts", "system", self.where)
        return [] if turns and turns[0].role == "system" else [Turn("system", text)]

    def _context(self) -> dict[str, Any]:
        """What the chat template is given beside the turns."""
        context: dict[str, Any] = {}
        for name, kind in (("tools", list), ("documents", list), ("chat_template_kwargs", dict)):
            if value := self._objects(self.value.get(name), name, kind, self.where):
                context |= value if kind is dict else {name: value}
        return self._whole(context, self.where)

    def _parts(self, parts: list[Any], where: str) -> tuple[str, ...]:
        for number, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RecordError(
                    f"a part of the content is of type {kind!r}",
                    reason="content that is not text",
                    where=where,
                    fix="keep text parts alone, or leave the record out",
                )
            at = f"{where}: content[{number}]"
            self._check_known(("type", "text"), self._used(part, at), at)
        return tuple(self._whole(part["text"], where) for part in parts)

    def _string(self, value: dict[str, Any], key: str, where: str) -> str:
        if key not in value:
            raise self._missing(key, where)
        text = value[key]
        if not isinstance(text, str):
            kind = type(text).__name__
            raise RecordError(
                f"field {key!r} is {_KINDS.get(kind, f'of type {kind}')}, not a string",
                reason=f"field {key} is not text",
                where=where,
                fix="write it as text, or leave the record out by --bad-records skip",
            )
        return self._whole(text, where)

    def _whole(self, value: Any, where: str) -> Any:
        """A value as a template may write it.

        Halves of letters ("\\ud83d", a cut emoji, is legal JSON but no text) are replaced; numbers
        that JSON does not know are refused.
        """
        if isinstance(value, dict):
            return {self._whole(k, where): self._whole(item, where) for k, item in value.items()}
        if isinstance(value, list):
            return [self._whole(item, where) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(
                f"has the number {value!r}, which JSON does not know", "number", where
            )
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                self.replaced = True
                return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return value

    def _missing(self, field: str, where: str) -> RecordError:
        return RecordError(
            f"missing field {field!r} of format {self.format}",
            reason="missing field",
            where=where,
            fix="add the field, name its column by --map, or name another --format; records of "
            "another format than the file's first go into a file of their own",
        )

    def _error(self, message: str, field: str, where: str) -> RecordError:
        return RecordError(
            message,
            reason=f"bad {field}",
            where=where,
            fix="mend the record, or leave it out by --bad-records skip",
        )


_KINDS = {
    "NoneType": "null",
    "bool": "true or false",
    "int": "a number",
    "float": "a number",
    "Spelled": "a number",
    "list": "a list",
    "dict": "an object",
}


def _first_told(value: dict[str, Any], names: tuple[str, ...]) -> str:
    """The first of the fields that says something, or else the first that is there."""
    there = [name for name in names if name in value]
    told = [name for name in there if not _says_nothing(value[name])]
    return [*told, *there, names[0]][0]


def _says_nothing(value: Any) -> bool:
    return value is None or value in ("", [], {})
