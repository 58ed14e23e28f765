"""`interaction.npz`: which source serves which validation set, with intervals.

np.load("interaction.npz")["serves"]      [S, V], in the order of ["sources"], ["validation"]
"""

import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_scalebio.whole_files import replaced

INTERACTION_FILE = "interaction.npz"


@dataclass(frozen=True)
class Interaction:
    """Of S sources and V validation sets.

    Attributes:
        sources, validation: their names.
        serves: [S, V]; above 0: more of the source, in place of the mixture's average, lowers the
            set's loss. In units of its own: what is twice as large helps twice as much.
        low, high: ends of its intervals.
        confidence: their level.
    """

    sources: npt.NDArray[np.str_]
    validation: npt.NDArray[np.str_]
    serves: npt.NDArray[np.float64]
    low: npt.NDArray[np.float64]
    high: npt.NDArray[np.float64]
    confidence: float

    @property
    def scaled(self) -> npt.NDArray[np.float64]:
        """`serves` over its largest size, -1 to 1."""
        return self.serves / max(np.abs(self.serves).max(), 1e-300)

    @property
    def sure(self) -> npt.NDArray[np.bool_]:
        """Where the interval leaves out 0."""
        return (self.low > 0) | (self.high < 0)

    def write(self, folder: Path) -> Path:
        path = folder / INTERACTION_FILE
        with replaced(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **asdict(self))
        return path


def read_interaction(folder: Path) -> Interaction | None:
    """What a run has written; None where there is none, or nothing of that shape."""
    try:
        with np.load(folder / INTERACTION_FILE, allow_pickle=False) as file:
            found = {field.name: file[field.name] for field in fields(Interaction)}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    shape = (len(found["sources"]), len(found["validation"]))
    if any(found[name].shape != shape for name in ("serves", "low", "high")):
        return None
    return Interaction(**{**found, "confidence": float(found["confidence"])})
