"""Scores answers to MATH problems; named by ``tasks/math.yaml``."""

from typing import Any

from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed


def score(problem: dict[str, Any], responses: list[str]) -> dict[str, float]:
    """1 where the last ``\\boxed{}`` of the response is that of the solution, else 0."""
    right, given = boxed(problem["solution"]), boxed(responses[0])
    return {
        "exact_match": float(right is not None and given is not None and is_equiv(given, right))
    }


def boxed(text: str) -> str | None:
    """What the last ``\\boxed`` of a text holds; None without one, or if it is not closed."""
    found = last_boxed_only_string(text)
    if found is None or not found.startswith(("\\boxed{", "\\boxed ")):
        return None
    return remove_boxed(found)
