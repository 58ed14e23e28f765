"""Writes prepared sources, so that only complete ones are ever seen under their names.

<out>/<name>/tokens.bin|.idx     Megatron IndexedDataset: sequence = document = example
<out>/<name>/loss_mask.bin|.idx  the same shape in uint8; 1 = this token is to be predicted
<out>/<name>/rows.npy            int64 [examples, 2]: the input file of each and the line in it
<out>/<name>/left_out.jsonl      the records that became no example, and why; where there are any
<out>/<name>/source.json         what is in them and where it came from; written last
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_scalebio.errors import UserError, disk_error, not_a_folder

FORMAT_VERSION = 1
SOURCE_FILE = "source.json"
_STAGED = ".prepare-"
MANIFEST_FILE = "manifest.json"  # of `sample`, which writes no source.json to a Megatron prefix
TOKENS = "tokens"
LOSS_MASK = "loss_mask"
ROWS_FILE = "rows.npy"
TOKENIZER_FILE = "tokenizer.model"  # beside the sources, where `prepare` has trained it
LEFT_OUT_FILE = "left_out.jsonl"
_MANIFEST_KEYS = {"format_version", "rows_are", "contamination", "fingerprint", "sources"}


class SourceWriter:
    """Appends examples to one source directory. Memory: 24 bytes an example for its index."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        with warnings.catch_warnings():
            # Megatron warns at import that Transformer Engine and Apex are absent; neither
            # matters for writing an index.
            warnings.simplefilter("ignore")
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        directory.mkdir(parents=True)
        self._directory = directory
        self._builders: dict[str, Any] = {}
        self._digests = {}
        for part, dtype in ((TOKENS, DType.optimal_dtype(vocab_size)), (LOSS_MASK, np.uint8)):
            builder = IndexedDatasetBuilder(str(directory / f"{part}.bin"), dtype=dtype)
            builder.sequence_lengths = array("i")  # a list would take 36 bytes an example
            self._builders[part] = builder
            self._digests[part] = hashlib.sha256()
        self._digests["lengths"] = hashlib.sha256()
        self.examples = 0
        self.tokens = 0
        self.target_tokens = 0
        self._rows = array("q")
        self._left_out: Any = None

    def add(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        lengths: Sequence[int],
        rows: Sequence[tuple[int, int]],
    ) -> None:
        """Appends examples laid end to end: tokens [sum(lengths)], mask of the same shape.

        Args:
            rows: of each example the number of its input file, and its line there.
        """
        assert len(tokens) == len(mask) == sum(lengths) and len(rows) == len(lengths)
        for row in rows:
            self._rows.extend(row)
        for part, values in ((TOKENS, tokens), (LOSS_MASK, mask)):
            self._builders[part].add_document(values, lengths)
            self._digests[part].update(values.tobytes())
        self._digests["lengths"].update(np.asarray(lengths, dtype=np.int32).tobytes())
        self.examples += len(lengths)
        self.tokens += len(tokens)
        self.target_tokens += int(mask.sum())

    def leave_out(self, path: str, left: Any) -> None:
        """Notes a record that became no example."""
        if self._left_out is None:
            self._left_out = open(self._directory / LEFT_OUT_FILE, "w", encoding="utf-8")  # noqa: SIM115  closed by `abandon`
        entry = {"file": os.path.abspath(path), "line": left.line, "why": left.reason}
        entry |= {"message": left.message} if left.message else {}
        self._left_out.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def finish(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Writes the indices and ``source.json``; returns what it holds.

        The fingerprint is that of the examples and the tokenizer, not of paths or options.
        """
        for part, builder in self._builders.items():
            # One document an example; add_document counted one a call.
            builder.document_indices = range(self.examples + 1)
            builder.finalize(str(self._directory / f"{part}.idx"))
        np.save(self._directory / ROWS_FILE, np.array(self._rows, np.int64).reshape(-1, 2))
        fingerprint = hashlib.sha256(facts["tokenizer"]["fingerprint"].encode())
        for digest in self._digests.values():
            fingerprint.update(digest.digest())
        source = {
            "format_version": FORMAT_VERSION,
            "name": facts["name"],
            "examples": self.examples,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            **facts,
            "fingerprint": fingerprint.hexdigest(),
        }
        text = json.dumps(source, indent=2, ensure_ascii=False) + "\n"
        (self._directory / SOURCE_FILE).write_text(text, encoding="utf-8")
        return source

    def abandon(self) -> None:
        """Closes the open files of a source that will not be finished."""
        for builder in self._builders.values():
            builder.data_file.close()
        if self._left_out is not None:
            self._left_out.close()


class Staging:
    """A hidden directory inside ``out`` whose entries are renamed into ``out`` all at the end.

    As a context manager it removes itself, ``out`` too if it was made for nothing, and what runs
    that were killed have left there: a run holds a lock on its own directory.
    """

    def __init__(self, out: Path, names: Sequence[str], *, overwrite: bool) -> None:
        self.out = out
        self.names = list(names)
        self.overwrite = overwrite
        for name in self.names:
            self._check_target(out / name, overwrite)

    def __enter__(self) -> Staging:
        self._made_out = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        alone = _locked(self.out, wait=True)  # no run may take a new directory for a left one
        for left in self.out.glob(f"{_STAGED}*"):
            lock = _locked(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
        self.directory = Path(tempfile.mkdtemp(prefix=_STAGED, dir=self.out))
        self._lock = _locked(self.directory)
        if alone is not None:
            os.close(alone)
        return self

    def path(self, name: str) -> Path:
        return self.directory / "new" / name

    def commit(self) -> None:
        """Moves every entry to its place; what stood there goes away with the staging.

        Raises:
            UserError: another run has put one there meanwhile, and none is to be replaced. Nothing
                has been moved then.
        """
        old = self.directory / "old"
        old.mkdir()
        moved: list[str] = []
        try:
            for name in self.names:
                target = self.out / name
                if self.overwrite and target.exists():
                    os.rename(target, old / name)
                self._place(name)
                moved.append(name)
        except BaseException:
            for name in moved:
                if self.path(name).exists():  # a file, that has two names now
                    (self.out / name).unlink()
                else:
                    os.rename(self.out / name, self.path(name))
            for replaced in old.iterdir():
                os.rename(replaced, self.out / replaced.name)
            raise

    def _place(self, name: str) -> None:
        """Moves one entry to its place, in one step that fails if something is there."""
        target = self.out / name
        try:
            if self.path(name).is_dir():
                os.rename(self.path(name), target)  # onto an empty folder at most
            else:
                os.link(self.path(name), target)
        except OSError as error:
            if not target.exists():
                raise
            raise UserError(
                f"{target}: has been written by another run meanwhile (--overwrite replaces it, or "
                "choose another --out or name)"
            ) from error

    def __exit__(self, kind: object, *_: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        if kind is not None and self._made_out and not any(self.out.iterdir()):
            self.out.rmdir()

    @staticmethod
    def _check_target(target: Path, overwrite: bool) -> None:
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return
        if target.is_file() and target.name != TOKENIZER_FILE:
            raise not_a_folder(target)
        if not overwrite:
            raise UserError(f"{target}: exists and is not empty (--overwrite replaces it)")
        if target.is_dir() and not (target / SOURCE_FILE).exists() and not _is_sample(target):
            # It may be the directory of the raw data.
            raise UserError(
                f"{target}: is not a prepared source (it has no {SOURCE_FILE}) and no sample, so "
                "--overwrite leaves it alone (choose another --out or source name)"
            )


def _locked(folder: Path, wait: bool = False) -> int | None:
    """A descriptor that locks the folder until it is closed; None if another process has it, or
    the file system knows no locks.

    The system lets go of the lock when the process ends, however it ends.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_sample(folder: Path) -> bool:
    """Whether a folder has the manifest of `sample`, and not another program's."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.keys() >= _MANIFEST_KEYS


def staging_error(error: OSError, out: Path) -> UserError:
    """What an operating system's refusal is to a user, who knows of `out` and of no staging."""
    place = Path(error.filename or out)
    if place == out or out in place.parents or _STAGED in place.name:
        return disk_error(error, out)
    return UserError(f"{place}: {error.strerror or error} (check this file)")
