"""`example_weights.npz`: one score per example, of a run with `--level example`.

np.load("example_weights.npz")
    sources, fingerprints [S]    names, and the data that was scored
    offsets [S + 1]              example k of source s is at offsets[s] + k
    score [N]                    above 0: more of it, in place of the mixture's average, lowers the
                                 validation loss; float32
    visits [N]                   times it was looked at; without one it has its source's score
    standard_error [N]           of the score, NaN where nothing tells
"""

import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_scalebio.errors import UserError
from megatron_scalebio.whole_files import replaced

EXAMPLE_WEIGHTS_FILE = "example_weights.npz"


@dataclass(frozen=True)
class ExampleWeights:
    """What the file holds."""

    sources: npt.NDArray[np.str_]
    fingerprints: npt.NDArray[np.str_]
    offsets: npt.NDArray[np.int64]
    score: npt.NDArray[np.float32]
    visits: npt.NDArray[np.int32]
    standard_error: npt.NDArray[np.float32]

    def write(self, folder: Path) -> None:
        with replaced(folder / EXAMPLE_WEIGHTS_FILE) as temporary, open(temporary, "wb") as file:
            np.savez(file, **vars(self))


def read_example_weights(folder: Path) -> ExampleWeights:
    """What a run has written.

    Raises:
        UserError: it has written none, or the file is damaged.
    """
    path = folder / EXAMPLE_WEIGHTS_FILE
    if not path.is_file():
        raise UserError(
            f"{path}: this run has no scores of single examples (search with --level example)"
        )
    found: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {field.name: file[field.name] for field in fields(ExampleWeights)}
        sources, offsets = len(found["sources"]), found["offsets"]
        whole = len(found["fingerprints"]) == sources and len(offsets) == sources + 1
        whole = whole and offsets[0] == 0 and bool((np.diff(offsets) >= 0).all())
        for name in ("score", "visits", "standard_error"):
            whole = whole and found[name].shape == (offsets[-1],)
    except (OSError, ValueError, KeyError, IndexError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: holds no scores ({error!r}) (search again)") from None
    if not whole:
        raise UserError(f"{path}: holds no scores of its examples (search again)")
    return ExampleWeights(**found)
