"""What the judge is asked: to grade one answer from 1 to 10, in the form ``[[rating]]``."""

import re

from megatron_scalebio.evaluate.questions import Question

SYSTEM = (
    "You grade the answers of an AI assistant. You are strict, you check facts and calculations "
    "yourself, and neither length nor a confident tone earns points."
)
_TASK = (
    "Grade {what} below. Consider whether it is correct, answers what was asked, is as deep as "
    "the question needs, and is clear.{against} First give your reasons in a few sentences. Then "
    "give a whole number from 1 (useless) to 10 (could not be better), on a line of its own and "
    "in exactly this form: Rating: [[number]], for example Rating: [[4]]."
)
_AGAINST = (
    " A reference answer is given: where the assistant contradicts it on a fact or result, the "
    "assistant is wrong."
)
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")

_ASKED_FORM = re.compile(r"rating[\s:*_]*" + _RATING.pattern, re.IGNORECASE)


def judge_messages(question: Question, answers: list[str], turn: int) -> list[dict[str, str]]:
    """The chat messages that ask for a grade.

    Args:
        answers: the assistant's, for every turn.
        turn: whose answer is graded, from 0; the turns before it are shown as context.
    """
    what = "the answer" if turn == 0 else "the LAST answer of the dialogue"
    references = question.references[: turn + 1]
    parts = [_TASK.format(what=what, against=_AGAINST if references else "")]
    for number, text in enumerate(references):
        parts.append(_block(f"Reference answer to question {number + 1}", text))
    for number in range(turn + 1):
        parts.append(_block(f"Question {number + 1}", question.turns[number]))
        parts.append(_block(f"Assistant's answer {number + 1}", answers[number]))
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "\n\n".join(parts)},
    ]


def _block(title: str, text: str) -> str:
    return f"--- {title} ---\n{text}\n--- end ---"


def parse_rating(verdict: str) -> float | None:
    """The rating from 1 to 10 in the judge's verdict; None if there is none, or two that differ.

    That is ``Rating: [[7]]``, the form asked for, or else ``[[7]]`` alone. A number in single
    brackets is no rating: judges cite references as [1].
    """
    found = _ASKED_FORM.findall(verdict) or _RATING.findall(verdict)
    ratings = {float(number) for number in found}
    rating = ratings.pop() if len(ratings) == 1 else 0
    return rating if 1 <= rating <= 10 else None
