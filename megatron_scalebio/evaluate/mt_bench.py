"""MT-Bench: answers of a model, each turn graded by a judge, and the scores by category.

    question.jsonl ─▶ answers.jsonl ─▶ judgments.jsonl ─▶ scores
                      (the model)      (the judge)

Both files are appended to, so that a stopped run continues where it was.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from megatron_scalebio.errors import UserError
from megatron_scalebio.evaluate.chat_client import ChatClient
from megatron_scalebio.evaluate.judge_prompts import judge_messages, parse_rating
from megatron_scalebio.evaluate.questions import Question
from megatron_scalebio.evaluate.records_log import RecordsLog

_ASKED_AGAIN = 2  # times, where a verdict holds no rating


def judge_all(
    questions: list[Question],
    answers: RecordsLog,
    log: RecordsLog,
    client: ChatClient,
    on_done: Callable[[dict[str, Any]], None] = lambda record: None,
) -> None:
    """Appends the grade of every turn that this judge has not graded yet.

    Raises:
        UserError: the judge cannot be reached or refuses.
    """
    turns = {a["question_id"]: a["choices"][0]["turns"] for a in answers.records}
    done = {_key(record) for record in log.records}
    for question in questions:
        for turn in range(len(question.turns)):
            record: dict[str, Any] = {
                "question_id": question.id,
                "category": question.category,
                "turn": turn + 1,
                "judge": client.model,
            }
            if _key(record) in done:
                continue
            record |= _grade(client, judge_messages(question, turns[question.id], turn))
            log.append(record)
            on_done(record)


def _key(record: dict[str, Any]) -> tuple[Any, int, str]:
    return record["question_id"], record["turn"], record["judge"]


def _grade(client: ChatClient, messages: list[dict[str, str]]) -> dict[str, Any]:
    """score (None: no verdict held a rating), the last verdict, and tokens of all tries."""
    prompt_tokens = completion_tokens = 0
    for _ in range(1 + _ASKED_AGAIN):
        reply = client.complete(messages)
        prompt_tokens += reply.prompt_tokens
        completion_tokens += reply.completion_tokens
        score = parse_rating(reply.text)
        if score is not None:
            break
    return {
        "score": score,
        "verdict": reply.text,
        "prompt": messages[-1]["content"],
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
    }


def summarize(
    questions: list[Question],
    log: RecordsLog,
    judge: str,
    price_in: float | None,
    price_out: float | None,
) -> dict[str, Any]:
    """Mean scores by category, by turn and overall, with standard errors, tokens and cost.

    Args:
        price_in, price_out: per million tokens, or None where not told.

    Raises:
        UserError: no verdict held a rating.
    """
    asked = {question.id for question in questions}
    records = [r for r in log.records if r["judge"] == judge and r["question_id"] in asked]
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        if record["score"] is not None:
            for group in (("", ""), ("category", record["category"]),
                          ("turn", str(record["turn"]))):  # fmt: skip
                groups[group].append(record["score"])
    if not groups:
        raise UserError(
            f"{log.path}: no verdict of the judge holds a rating of the form [[5]] (read its "
            "verdicts there; choose another --judge-model)"
        )
    prompt, completion = (
        sum(r[name] for r in records) for name in ("prompt_tokens", "completion_tokens")
    )
    priced = price_in is not None and price_out is not None
    cost = (prompt * (price_in or 0) + completion * (price_out or 0)) / 1e6 if priced else None
    return {
        "judge": judge,
        "score": _mean(groups["", ""]),
        "by_category": {
            k: _mean(v) for (kind, k), v in sorted(groups.items()) if kind == "category"
        },
        "by_turn": {k: _mean(v) for (kind, k), v in sorted(groups.items()) if kind == "turn"},
        "without_rating": sum(record["score"] is None for record in records),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cost": cost,
    }


def _mean(scores: list[float]) -> dict[str, float | int | None]:
    error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None
    return {"mean": statistics.fmean(scores), "stderr": error, "graded": len(scores)}
