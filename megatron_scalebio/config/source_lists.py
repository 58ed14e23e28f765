"""Sources named by the thousand: globs, lists of files, and the lists that Megatron-LM takes.

    sources: {glob: "corpus/*/*.idx", name: "{parent}/{stem}"}
    sources: [{list: corpus/parts.txt}, {name: math, path: data/math}]
    data_args_path: runs/first/blend.txt

become the entries {name, path, …} that the same sources would have one by one.
"""

import glob
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_scalebio.errors import UserError

_PREPARED = "source.json"
_PARTS = ("tokens", "loss_mask")  # of a prepared folder


def with_sources_listed(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The section `data` with every source an entry of its own.

    Raises:
        UserError: if a list names nothing, or what is no source, or no names follow from it.
    """
    data, sources = dict(data), data.get("sources")
    given = data.pop("data_args_path", None)
    if given is not None:
        if sources:
            raise UserError(
                f"{where}.data_args_path: {given!r} and sources both name sources (drop one of "
                "them)"
            )
        data["sources"] = _of_megatron(str(given), f"{where}.data_args_path")
        return data
    if isinstance(sources, dict):
        sources = [sources]
    if isinstance(sources, list):
        entries: list[Any] = []
        for number, entry in enumerate(sources):
            entries += _expanded(entry, f"{where}.sources[{number}]")
        data["sources"] = entries
    for kind in ("sources", "validation", "test"):
        _refuse_other_forms(data.get(kind) or [], f"{where}.{kind}")
    return data


def _refuse_other_forms(entries: Any, where: str) -> None:
    """Refuses `data/math`, [data/math] and {math: data/math} by what is to be written instead."""
    listed = entries if isinstance(entries, list) else [entries]
    for entry in listed:
        is_entry = isinstance(entry, dict) and (not entry or entry.keys() & {"name", "path"})
        if is_entry and isinstance(entries, list):
            continue
        meant = ("math", "data/math")
        if isinstance(entry, dict) and not is_entry:
            meant = next((i for i in entry.items() if isinstance(i[1], str)), meant)
        raise UserError(
            f"{where}: {entry!r} is not a list of names and paths (write "
            f"[{{name: {meant[0]}, path: {meant[1]}}}])"
        )


def _expanded(entry: Any, where: str) -> list[Any]:
    kinds = [kind for kind in ("glob", "list") if isinstance(entry, dict) and kind in entry]
    if not kinds:
        return [entry]
    if len(kinds) > 1 or "path" in entry:
        both = " and ".join([*kinds, "path"][:2])
        raise UserError(f"{where}: {both} both name sources (drop one of them)")
    others = {key: value for key, value in entry.items() if key not in ("glob", "list", "name")}
    given, where = entry[kinds[0]], f"{where}.{kinds[0]}"
    if not isinstance(given, str):
        raise UserError(f"{where}: {given!r} is not a text (make each an entry of its own)")
    found = _matches(given, where) if kinds[0] == "glob" else _lines(given, where)
    paths = list(dict.fromkeys(map(_source_of, found)))
    names = _names(paths, entry.get("name"), where)
    twice = {name: number for number, name in enumerate(names)}
    for number, (name, path) in enumerate(zip(names, paths, strict=True)):
        if twice[name] != number:
            raise UserError(
                f"{where.rpartition('.')[0]}.name: {entry['name']!r} calls both {path} and "
                f"{paths[twice[name]]} {name!r} (add {{parent}}, or leave name out)"
            )
    return [{"name": name, "path": path, **others} for name, path in zip(names, paths, strict=True)]


def _matches(pattern: str, where: str) -> list[str]:
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UserError(f"{where}: {pattern!r} matches nothing (check the pattern)")
    for path in found:
        is_source = path.endswith((".idx", ".bin", f"/{_PREPARED}"))
        if not is_source and not os.path.isfile(os.path.join(path, _PREPARED)):
            raise UserError(
                f"{where}: {pattern!r} matches {path}, which is not a source (match .idx files, or "
                f"the {_PREPARED} of prepared folders)"
            )
    return found


def _lines(file: str, where: str) -> list[str]:
    """Paths, one a line; relative ones are relative to the list."""
    text = _read(file, where)
    lines = [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]
    if not lines:
        raise UserError(f"{where}: {file}: names no source (one path a line)")
    return [str(Path(file).parent / line) for line in lines]


def _of_megatron(file: str, where: str) -> list[dict[str, Any]]:
    """`weight path weight path …` or `path path …`, as Megatron-LM's --data-args-path has it."""
    try:
        words = shlex.split(_read(file, where))
    except ValueError as error:
        raise UserError(f"{where}: {file}: is not a list of paths: {error}") from None
    weights: Sequence[float | None] = [None] * len(words)
    numbers = [_number(word) for word in words]
    if len(words) % 2 == 0 and None not in numbers[::2]:
        weights, words = numbers[::2], words[1::2]
    lone = next((word for word in words if _number(word) is not None), None)
    if lone is not None:
        raise UserError(
            f"{where}: {file}: {lone!r} stands where a path should (write a weight before every "
            "path, or before none)"
        )
    for weight, path in zip(weights, words, strict=True):
        if weight is not None and not weight > 0:
            raise UserError(
                f"{where}: {file}: the weight of {path} is {weight:g} (give one above 0, or drop "
                "the path)"
            )
    if not words:
        raise UserError(f"{where}: {file}: names no source (weight path weight path …)")
    paths = [_source_of(word) for word in words]
    _refuse_twice(paths, f"{where}: {file}")
    names = _names(paths, None, where)
    return [
        {"name": name, "path": path} | ({} if weight is None else {"initial_weight": weight})
        for name, path, weight in zip(names, paths, weights, strict=True)
    ]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _read(file: str, where: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "is not text"
        raise UserError(f"{where}: {file}: {problem} (name a list of paths)") from None


def _source_of(path: str) -> str:
    """The source that a file belongs to: a prefix, or the prepared folder it lies in."""
    path = os.path.normpath(path)
    folder, name = os.path.split(path)
    stem, suffix = os.path.splitext(name)
    bare = stem if suffix in (".idx", ".bin") else name
    in_folder = bare in _PARTS and os.path.isfile(os.path.join(folder, _PREPARED))
    return folder if in_folder or name == _PREPARED else os.path.join(folder, bare)


def _names(paths: Sequence[str], template: Any, where: str) -> list[str]:
    """Names by a template, or the last part of each path and the folders that tell them apart."""
    parts = [path.split("/") for path in paths]
    if template is not None:
        return [named(str(template), one, f"{where.rpartition('.')[0]}.name") for one in parts]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(filter(None, one[-count:])) for one in parts]
        if len(set(names)) == len(names):
            return names
    return names


def named(template: str, parts: Sequence[str], where: str) -> str:
    """A name made of the last parts of a path: {stem}, {parent}, {grandparent}."""
    folders = ["", "", *parts]
    fields = {"stem": folders[-1], "parent": folders[-2], "grandparent": folders[-3]}
    try:
        return template.format(**fields)
    except (KeyError, IndexError, ValueError, AttributeError):
        known = ", ".join(f"{{{field}}}" for field in fields)
        raise UserError(f"{where}: {template!r} is not a name (it may hold {known})") from None


def _refuse_twice(paths: Sequence[str], where: str) -> None:
    path, count = Counter(paths).most_common(1)[0]
    if count > 1:
        raise UserError(f"{where}: names {path} {count} times (name it once)")
