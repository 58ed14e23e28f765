"""An output folder that exists only when it is whole.

It is written as `.NAME.incomplete` beside its place and renamed at the end.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_scalebio.checkpoint.folder import make_empty
from megatron_scalebio.convert.ranks import Ranks
from megatron_scalebio.errors import UserError

_MARGIN_BYTES = 64 << 20  # metadata, tokenizer, directory blocks


@contextmanager
def new_folder(target: Path, needed_bytes: int, ranks: Ranks) -> Iterator[Path]:
    """Gives a folder to write to, which gets its name if the block ends well.

    Args:
        needed_bytes: what will be written to it.

    Raises:
        UserError: if the target exists, or the disk has not enough room.
    """
    target = target.absolute()
    temporary = target.parent / f".{target.name}.incomplete"
    ranks.main(lambda: _prepare(target, temporary, needed_bytes))
    try:
        yield temporary
        ranks.main(lambda: _rename(temporary, target))
    except BaseException:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(target: Path) -> None:
    """Refuses to write where something is."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target}: exists (choose a new folder, or remove it)")


def _prepare(target: Path, temporary: Path, needed_bytes: int) -> None:
    refuse_existing(target)
    make_empty(temporary)
    free = shutil.disk_usage(temporary).free
    if needed_bytes + _MARGIN_BYTES > free:
        shutil.rmtree(temporary)
        raise UserError(
            f"{target}: needs {_gib(needed_bytes + _MARGIN_BYTES)}, its disk has {_gib(free)} left "
            "(free space, or choose another disk)"
        )


def _rename(temporary: Path, target: Path) -> None:
    refuse_existing(target)
    temporary.rename(target)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
