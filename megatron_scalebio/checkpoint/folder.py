"""The checkpoint folder: names, atomic commit, keep-last, choice of the newest whole checkpoint.

    SAVE/latest_checkpointed_iteration.txt
    SAVE/iter_0000100/          w and the run's common state: an ordinary Megatron checkpoint
    SAVE/iter_0000100/bilevel/  u where it differs from w, and both optimizers
    …/integrity.json            checksums of the files beside it

A checkpoint is written under a temporary name and renamed when whole, so a crash at any time
leaves the last good one. No two attempts share a name: what writes for a killed run may outlive it.
"""

import contextlib
import pickle
import re
import shutil
import uuid
import zipfile
from pathlib import Path
from typing import Any

from megatron_scalebio.checkpoint import integrity
from megatron_scalebio.compat import switched_on
from megatron_scalebio.errors import UserError, disk_errors_named
from megatron_scalebio.whole_files import write_text

TRACKER = "latest_checkpointed_iteration.txt"
# The object of what is no tensor. Megatron-Core wrote a file common.pt instead until 0.18.
COMMON, COMMON_FILE = "common_state/shard_0_1", "common.pt"
BILEVEL = "bilevel"
_METADATA_NAMES = {
    *(
        (f"torch.distributed.checkpoint.{module}", name)
        for module, names in {
            "filesystem": ("_StorageInfo",),
            "planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
            "metadata": (
                "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
                "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
            ),
        }.items()
        for name in names
    ),
    ("torch.serialization", "_get_layout"),
    *(
        ("torch", name)
        for name in (
            "Size", "float32", "bfloat16", "float16", "float64", "uint8", "int8", "int16", "int32",
            "int64", "bool", "float8_e4m3fn", "float8_e5m2",
        )
    ),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Reads `.metadata` of a distributed checkpoint; refuses all but its own plain classes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_NAMES:
            return super().find_class(module, name)
        raise UserError(
            f".metadata: refers to {module}.{name}, which a checkpoint may not run (use a "
            "checkpoint from a source you trust)"
        )


def iteration_folder(save: Path, step: int) -> Path:
    return save / f"iter_{step:07d}"


def temporary_folder(save: Path, step: int) -> Path:
    """A new name each time."""
    return save / f"iter_{step:07d}.{uuid.uuid4().hex[:8]}.incomplete"


def steps_on_disk(save: Path) -> list[int]:
    """Steps of the committed checkpoints, ascending."""
    names = (re.fullmatch(r"iter_(\d+)", path.name) for path in save.glob("iter_*"))
    return sorted(int(match[1]) for match in names if match)


def begin(save: Path, step: int) -> Path:
    """Makes a temporary folder for a step, and drops what saves that were cut off left behind."""
    for left in save.glob("iter_*.incomplete"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = temporary_folder(save, step)
    make_empty(temporary)
    return temporary


def make_empty(folder: Path) -> None:
    """Makes a folder, empty even if an earlier run left something there. UserError if it cannot."""
    with disk_errors_named(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)


def commit(temporary: Path, save: Path, step: int, keep_last: int) -> None:
    """Gives a whole checkpoint its name, points the tracker to it, drops the oldest ones.

    Raises:
        UserError: if the disk refuses.
    """
    final = iteration_folder(save, step)
    with disk_errors_named(final):
        for part in (temporary, temporary / BILEVEL):
            integrity.seal(part)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        write_text(save / TRACKER, str(step))
    for old in steps_on_disk(save)[:-keep_last]:
        if old != step:
            shutil.rmtree(iteration_folder(save, old), ignore_errors=True)


def newest_whole(save: Path, before: int | None = None) -> tuple[int | None, list[str]]:
    """The newest checkpoint that is not damaged, and what is wrong with newer ones.

    The bytes of its files are left to `integrity.changed_file`, which the ranks share.

    Args:
        before: only steps before this one.

    Returns:
        (step or None, one line for each damaged checkpoint that was passed over)
    """
    problems: list[str] = []
    for step in reversed(steps_on_disk(save)):
        if before is not None and step >= before:
            continue
        folder = iteration_folder(save, step)
        problem = damage(folder) or damage(folder / BILEVEL)
        if not problem:
            return step, problems
        problems.append(problem)
    return None, problems


def set_aside(save: Path, after: int) -> None:
    """Renames the damaged checkpoints after the one that a run continues from: `keep_last` counts
    whole ones, and nothing is deleted.
    """
    for step in steps_on_disk(save):
        if step > after:
            folder = iteration_folder(save, step)
            with contextlib.suppress(OSError):
                folder.rename(folder.with_name(f"{folder.name}.damaged"))


def damage(folder: Path) -> str:
    """What is missing or cut short in a distributed checkpoint folder; "" if nothing.

    Raises:
        UserError: if its metadata names code that a checkpoint has no business to name.
    """
    for name in ("metadata.json", ".metadata"):
        if not (folder / name).is_file():
            return f"{folder}: lacks {name}"
    try:
        with (folder / ".metadata").open("rb") as stream:
            storage = _MetadataUnpickler(stream).load().storage_data
            ends = [
                (folder / info.relative_path, int(info.offset + info.length))
                for info in storage.values()
            ]
            names = {index.fqn for index in storage}
    except UserError as error:
        raise UserError(f"{folder}/{error}") from None
    except _UNPICKLING_ERRORS as error:
        return f"{folder}/.metadata: unreadable ({error})"
    if COMMON not in names:
        problem = _damage_of_common(folder / COMMON_FILE)
        if problem:
            return problem
    for path, end in ends:
        size = path.stat().st_size if path.is_file() else -1
        if size < end:
            return f"{path}: " + ("missing" if size < 0 else f"cut short at {size} bytes")
    return ""


# What a pickle of damaged bytes may raise.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError, EOFError, AttributeError, ValueError, IndexError, KeyError, TypeError,
    ImportError, OverflowError, MemoryError, RecursionError, OSError,
)  # fmt: skip


def _damage_of_common(path: Path) -> str:
    if not path.is_file():
        return f"{path.parent}: lacks {COMMON} and {COMMON_FILE}"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, RuntimeError) as error:
        return f"{path}: unreadable ({error})"
    return f"{path}: {broken} is damaged" if broken else ""


def data_alone() -> contextlib.AbstractContextManager[None]:
    """A block in which torch reads the pickled objects of a checkpoint as data alone."""
    return switched_on("TORCH_FORCE_WEIGHTS_ONLY_LOAD")


def find_checkpoint(load: Path) -> Path:
    """The folder that holds a checkpoint's tensors.

    Args:
        load: that folder, or one with a tracker file (a run's `checkpoints`).

    Raises:
        UserError: if there is none.
    """
    tracker = load / TRACKER
    if tracker.is_file():
        step = tracker.read_text(errors="replace").strip()
        if step != "release" and not step.isdecimal():
            raise UserError(f"{tracker}: {step[:40]!r} is not a step (write it again)")
        return load / step if step == "release" else iteration_folder(load, int(step))
    if (load / "metadata.json").is_file():
        return load
    missing = "" if load.exists() else ", there is no such folder"
    raise UserError(
        f"{load}: not a Megatron checkpoint{missing} (name a folder that holds {TRACKER})"
    )


def is_plain(load: Path) -> bool:
    """Whether a folder holds a whole checkpoint, and nothing that a run would continue with."""
    with contextlib.suppress(UserError):
        source = find_checkpoint(load)
        return not (source / BILEVEL).exists() and not damage(source)
    return False
