"""MT-Bench's question file, in FastChat's format: JSONL with question_id, category and turns."""

from pathlib import Path
from typing import Any, NamedTuple

from megatron_scalebio.data.records import RecordReader
from megatron_scalebio.errors import UserError


class Question(NamedTuple):
    """One question. ``references`` answer each turn, or are empty."""

    id: int | str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """The questions of a file, in its order.

    Raises:
        UserError: a field is missing or of the wrong type, or an id stands twice.
    """
    questions: dict[int | str, Question] = {}
    for line, record in RecordReader(path):
        where = f"{path}:{line}"
        question = _parse(record, where)
        if question.id in questions:
            raise UserError(f"{where}: question_id {question.id!r} stands twice")
        questions[question.id] = question
        if len(questions) == limit:
            break
    if not questions:
        raise UserError(f"{path}: holds no question")
    return list(questions.values())


def _parse(record: dict[str, Any], where: str) -> Question:
    number, category = record.get("question_id"), record.get("category")
    if not isinstance(number, int | str) or isinstance(number, bool):
        raise UserError(f"{where}: question_id is neither a number nor text")
    if not isinstance(category, str):
        raise UserError(f"{where}: category is not text")
    turns = _texts(record, "turns", where)
    if not turns:
        raise UserError(f"{where}: turns is empty")
    references = _texts(record, "reference", where) if record.get("reference") else ()
    return Question(number, category, turns, references)


def _texts(record: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = record.get(name)
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise UserError(
            f"{where}: {name} is not a list of texts (FastChat's format: question_id, category, "
            "turns, perhaps reference)"
        )
    return tuple(value)
