"""Finds what a sample draws from: the weights of a run, and behind each source its raw records.

A source is named by raw JSON/JSONL files, by a prepared folder, whose `source.json` names its raw
files, or by a Megatron `.bin/.idx` prefix, which has token ids and no records.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_scalebio.data.encode_config import REPEATED
from megatron_scalebio.data.inputs import STANDARD_INPUT, exists, parse_input
from megatron_scalebio.data.prepare import describe_file
from megatron_scalebio.data.source_writer import SOURCE_FILE, TOKENS
from megatron_scalebio.data.sources import read_description
from megatron_scalebio.data.weights_file import check_weights
from megatron_scalebio.errors import UserError


@dataclass(frozen=True)
class Located:
    """Where a source's rows are.

    Attributes:
        files: its raw files; empty for a Megatron prefix.
        prefix: of its `.bin/.idx`; empty for raw files alone.
        folder: the prepared folder, or None.
        description: of a prepared folder: what `source.json` holds.
    """

    name: str
    files: tuple[Path, ...] = ()
    prefix: str = ""
    folder: Path | None = None
    description: dict[str, Any] | None = None

    @property
    def has_files(self) -> bool:
        """Whether all raw files are still there."""
        return bool(self.files) and all(path.is_file() for path in self.files)

    def describe_raw(self) -> list[dict[str, Any]]:
        """Path, size and sha256 of the raw files.

        Raises:
            UserError: one is gone, or is not what the source was prepared from.
        """
        told = (self.description or {}).get("inputs", [None] * len(self.files))
        found = []
        for path, earlier in zip(self.files, told, strict=True):
            if not path.is_file():
                raise UserError(
                    f"{path}: the raw file of {self.name!r} is gone (put it back, name it by "
                    f"--input {self.name}=FILE, or --from-tokens)"
                )
            found.append(describe_file(path))
            if earlier is not None and earlier.get("sha256") != found[-1]["sha256"]:
                raise UserError(
                    f"{path}: has changed since {self.name!r} was prepared from it (prepare it "
                    "again and learn the weights anew, or --from-tokens)"
                )
        return found

    def describe_tokens(self) -> list[dict[str, Any]]:
        """Path, size and sha256 of the `.bin` and `.idx`."""
        return [describe_file(Path(self.prefix + suffix)) for suffix in (".bin", ".idx")]


def locate(name: str, path: str, what: str = "source") -> Located:
    """What a path stands for: a prepared folder or its tokens, a Megatron prefix, or raw files.

    Raises:
        UserError: nothing is there, or ``source.json`` is damaged.
    """
    folder = _prepared_folder(path)
    if folder is not None:
        return _locate_folder(name, folder)
    if Path(path + ".idx").is_file():
        return Located(name, prefix=path)
    parts = path.split(",")
    if str(STANDARD_INPUT) in parts:
        raise UserError(
            f"{what} {name!r}: standard input can be read only once, and a sample reads its "
            "sources several times (write it to a file)"
        )
    if not any(exists(Path(part)) or "*" in part or part[:1] == "@" for part in parts):
        option = "--input" if what == "source" else "--exclude"
        raise UserError(
            f"{path}: {what} {name!r} is not there (run where its path is valid, or {option} "
            f"{name}=PATH)"
        )
    return Located(name, files=parse_input(f"{name}={path}").files)


def _prepared_folder(path: str) -> Path | None:
    folder = Path(path).parent if Path(path).name == TOKENS else Path(path)
    return folder if (folder / SOURCE_FILE).is_file() else None


def _locate_folder(name: str, folder: Path) -> Located:
    description = read_description(folder / SOURCE_FILE)
    inputs = description.get("inputs", [])
    if not isinstance(inputs, list) or not all(isinstance(i, dict) and "path" in i for i in inputs):
        raise UserError(
            f"{folder / SOURCE_FILE}: 'inputs' is not a list of files (prepare it again)"
        )
    files = tuple(Path(entry["path"]) for entry in inputs)
    return Located(name, files, str(folder / TOKENS), folder, description)


def prepared_options(paths: Iterable[str]) -> dict[str, Any]:
    """The options of ``EncodeConfig`` with which the sources were prepared that are there; without
    those in which they differ. Earlier versions did not write them down."""
    folders = [folder for folder in map(_prepared_folder, paths) if folder is not None]
    described = [read_description(folder / SOURCE_FILE) for folder in folders]
    told = [each["options"] for each in described if "options" in each]
    shared = {}
    for name in REPEATED:
        values = [options.get(name) for options in told]
        if values and all(value == values[0] for value in values):
            shared[name] = _tuples(values[0])
    return shared


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def parse_weights(values: Sequence[str]) -> dict[str, float]:
    """``NAME=WEIGHT ...`` to weights, which need not add up to 1."""
    found = {}
    for value in values:
        name, separator, number = value.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not separator or not name or name in found or math.isnan(weight):
            raise UserError(
                f"--weights: {value!r} gives no weight (a run's folder, its weights.json, or "
                "NAME=WEIGHT once for every source)"
            )
        found[name] = weight
    check_weights(found, "--weights")
    return found


def validation_of_run(folder: Path) -> list[tuple[str, str]]:
    """(name, path) of the validation sets of the run in a folder, from its ``blend.json``."""
    path = folder / "blend.json"
    if not path.is_file():
        return []
    try:
        words = json.loads(path.read_text(encoding="utf-8"))["valid"]
        prefixes = [Path(str(word)) for word in words[1::2]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no validation sets ({error!r})") from None
    return [(p.parent.name if p.name == TOKENS else p.name, str(p)) for p in prefixes]
