"""What the sections are made of: options with help text, and refusals by field, value and fix."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import field
from typing import Any

from megatron_scalebio.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def option(default: Any, help: str) -> Any:
    """A dataclass field with the help text that its command-line flag shows."""
    factory = {"default_factory": default} if callable(default) else {"default": default}
    return field(metadata={"help": help}, **factory)


def by_name(given: Any, *names: str) -> dict[str, Any]:
    """Options of a section, or flags, that go on under their own names."""
    return {name: getattr(given, name) for name in names}


class Quantity(float):
    """A number that may be written as 20B, 1.5T, 300k or 64M."""

    def __new__(cls, given: Any) -> Quantity:
        text = str(given).strip()
        scale = _SCALES.get(text[-1:], 1)
        return super().__new__(cls, float(text[:-1] if text[-1:] in _SCALES else text) * scale)


_SCALES = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def require_positive(section: Any, *names: str, or_zero: bool = False) -> None:
    for name in names:
        value = getattr(section, name)
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and not or_zero):
            bound = "at least 0" if or_zero else "above 0"
            if math.isinf(value):
                bound = "finite"
            raise UserError(f"{name}: {value!r} must be {bound} (set {name} {bound})")


def require_name(where: str, name: str, grouped: bool = False) -> None:
    """Refuses what can't name a source or a set: names become names of files and folders.

    Args:
        grouped: it may name its groups before it, as in topic/format/source.
    """
    if not all(NAME.fullmatch(part) for part in (name.split("/") if grouped else [name])):
        raise UserError(
            f"{name!r} cannot name a source or a set",
            where=where,
            fix="use A-Z, a-z, digits, '.', '_' and '-'"
            + (", and '/' between groups" if grouped else ""),
        )


def require_within(section: Any, interval: str, *names: str) -> None:
    """Refuses what lies outside an interval, written as in [0, 1)."""
    low, high = map(float, interval[1:-1].split(","))
    for name in names:
        value = getattr(section, name)
        at_an_end = (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
        if not (low < value < high or at_an_end):
            raise UserError(f"{name}: {value!r} is outside {interval} (choose within)")


def pattern_of_layers(name: str, given: list[int], num_layers: int, phase: int = 0) -> list[int]:
    """A 1 or 0 for each layer: as given, or every N-th for one number N, from `phase` on."""
    pattern = given
    if len(given) == 1 and num_layers > 1 and given[0] > 0:
        pattern = [int((layer - phase) % given[0] == 0) for layer in range(num_layers)]
    if len(pattern) != num_layers or not set(pattern) <= {0, 1} or not any(pattern):
        raise UserError(
            f"{name}: {given!r} must have a 1 or a 0 for each of the {num_layers} "
            "layers, and a 1 at least (write it so, or one number N for every N-th layer)"
        )
    return pattern


def require_one_of(flag: str, value: str | None, allowed: Collection[str]) -> None:
    """Refuses a command's option that is none of the allowed words (None: not given)."""
    if value is not None and value not in allowed:
        known = ", ".join(allowed)
        raise UserError(f"{value!r} is not a choice", where=flag, fix=f"choose from {known}")


def require_at_least(flag: str, value: float | None, least: float) -> None:
    """Refuses a command's number that is too small (None: not given)."""
    if value is not None and value < least:
        raise UserError(f"{value} is below {least}", where=flag, fix=f"give {least} or more")
