"""What `--input` names: files, folders, globs, lists of files, pipes and standard input."""

import glob
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_scalebio.config.checks import NAME, require_name
from megatron_scalebio.config.source_lists import named
from megatron_scalebio.data.tables import (
    COMPRESSED,
    JSON_SUFFIXES,
    TABLE_SUFFIXES,
    bare_suffix,
)
from megatron_scalebio.errors import UserError

STANDARD_INPUT = Path("-")
_SAVED = "state.json"  # of a folder by `datasets.save_to_disk`
_SAVED_SPLITS = "dataset_dict.json"


@dataclass(frozen=True)
class SourceInput:
    """A source's name and its files, in the order in which they are read.

    Attributes:
        unread: files of the folders given that are of no kind which is read.
    """

    name: str
    files: tuple[Path, ...]
    unread: tuple[Path, ...] = field(default=(), compare=False)


def parse_input(value: str) -> SourceInput:
    """``[name=]path[,path...]`` to a source.

    A path is a file, a folder (all files of known kinds in it and below), a glob, ``@FILE`` (a list
    of paths, one a line) or ``-`` for standard input.

    Raises:
        UserError: a path does not exist or stands twice, a folder holds no such file, or the name
            is no name.
    """
    name, separator, paths = value.partition("=")
    if not separator or exists(Path(value)):
        name, paths = "", value
    whole = [paths] if paths and exists(Path(paths)) else []
    entries = whole or [path for path in paths.split(",") if path]
    if not entries:
        raise UserError(f"--input: no path in {value!r} (--input name=file.jsonl)")
    if not name and not NAME.fullmatch(name := stem(entries[0])):
        raise UserError(
            f"--input: {value!r} gives no name to the source, and {name!r} can't be one (letters, "
            f"digits, '.', '_' and '-'; give it one: --input {shlex.quote(f'NAME={value}')})"
        )
    require_name("--input", name)
    unread: list[Path] = []
    files = [file for entry in entries for file in _files(entry, unread)]
    _refuse_twice(files)
    return SourceInput(name, tuple(files), tuple(unread))


def parse_inputs(value: str) -> list[SourceInput]:
    """The sources of one ``--input``: with a name of fields such as {stem}, one for each file.

    Raises:
        UserError: as of `parse_input`, or the name is none.
    """
    template, _, paths = value.partition("=")
    if "{" not in template or exists(Path(value)):
        return [parse_input(value)]
    whole = parse_input(f"files={paths}")
    sources = []
    for number, file in enumerate(whole.files):
        parts = (*Path(os.path.abspath(file)).parent.parts, stem(str(file)))
        name = named(template, parts, "--input")
        require_name("--input", name)
        sources.append(SourceInput(name, (file,), whole.unread if number == 0 else ()))
    return sources


def exists(path: Path) -> bool:
    """``path.exists()``, also where the text is no path at all, such as a long list of paths."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def stem(path: str) -> str:
    """What a source is called by its path: text.en for text.en.jsonl.gz."""
    place = Path(path.removeprefix("@"))
    while place.suffix.lower() in (*COMPRESSED, *JSON_SUFFIXES, *TABLE_SUFFIXES):
        place = place.with_suffix("")
    return "stdin" if path == "-" else place.stem if path.startswith("@") else place.name


def _files(entry: str, unread: list[Path]) -> Sequence[Path]:
    path = Path(entry)
    if path == STANDARD_INPUT:
        return [path]
    if entry.startswith("@") and not exists(path):
        return _listed(Path(entry[1:]), unread)
    if not exists(path):
        found = sorted(glob.glob(entry, recursive=True)) if glob.has_magic(entry) else []
        if not found:
            what = "no file matches" if glob.has_magic(entry) else "no such file or directory"
            raise UserError(f"{path}: {what} (check --input)")
        return [file for one in found for file in _files(one, unread)]
    if not path.is_dir():
        return [path]
    own = len(unread)
    files = list(_in_folder(path, unread))
    if not files:
        seen = f": {', '.join(file.name for file in unread[own:][:3])}" if unread[own:] else ""
        kinds = ", ".join((*JSON_SUFFIXES, *TABLE_SUFFIXES))
        raise UserError(f"{path}: the directory holds no {kinds} (also compressed){seen}")
    return files


def _listed(path: Path, unread: list[Path]) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", None) or "is not text"
        raise UserError(f"{path}: cannot read the list: {problem} (check --input)") from None
    entries = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not entries:
        raise UserError(f"{path}: the list names no file")
    # A relative path is relative to the list, wherever the command is run.
    return [file for entry in entries for file in _files(str(path.parent / entry), unread)]


def _in_folder(folder: Path, unread: list[Path]) -> Iterator[Path]:
    """The files of a folder and of those in it, sorted; hidden ones are no data."""
    if (folder / _SAVED).is_file():
        yield from _saved(folder)
        return
    if (folder / _SAVED_SPLITS).is_file():
        splits = [entry.name for entry in sorted(folder.iterdir()) if entry.is_dir()]
        if len(splits) > 1:
            raise UserError(
                f"{folder}: holds the splits {', '.join(splits)} (name one of them, as in "
                f"{folder / splits[0]})"
            )
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _in_folder(entry, unread)
        elif bare_suffix(entry) in (*JSON_SUFFIXES, *TABLE_SUFFIXES):
            if entry.name != _SAVED_SPLITS:
                yield entry
        else:
            unread.append(entry)


def _saved(folder: Path) -> list[Path]:
    """The files of a folder by ``save_to_disk``, in its order."""
    path = folder / _SAVED
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not the state of a saved data set ({error!r})") from None
    if state.get("_indices_files"):
        raise UserError(
            f"{folder}: was saved with a selection of rows (call .flatten_indices() before "
            ".save_to_disk())"
        )
    return files


def _refuse_twice(files: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            raise UserError(f"--input: {file} stands twice in a source (name it once)")
        seen[real] = file


def local_copies(sources: Sequence[SourceInput], folder: Path) -> dict[Path, Path]:
    """Where each file is read: itself, or for a pipe and standard input a copy in ``folder``."""
    copies: dict[Path, Path] = {}
    for file in (file for source in sources for file in source.files):
        opened = Path("/dev/stdin") if file == STANDARD_INPUT else file
        if file in copies:
            continue
        if opened.is_file() and file != STANDARD_INPUT:
            copies[file] = file
            continue
        copies[file] = folder / f"input-{len(copies)}{''.join(file.suffixes)}"
        try:
            with open(opened, "rb") as stream, open(copies[file], "wb") as copy:
                shutil.copyfileobj(stream, copy, 1 << 20)
        except FileNotFoundError as error:
            raise UserError(f"{file}: {error.strerror} (check --input)") from error
    return copies
