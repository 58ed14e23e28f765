"""What a search leaves for the stages after it: weights.json, and which examples a method chose."""

import json
import math
from pathlib import Path

from megatron_scalebio.data.source_writer import MANIFEST_FILE
from megatron_scalebio.errors import UserError

WEIGHTS_FILE = "weights.json"
SHORT = 3  # a training of so many times fewer steps than the search is called short
SELECTED_FILE = "selected.json"  # of methods that choose examples


def read_weights(path: Path) -> dict[str, tuple[float, str]]:
    """Each source's weight and path from a run's ``weights.json``.

    Raises:
        UserError: the file cannot be read or is no such file.
    """
    fix = "give the weights.json of a reweight run, or the folder of the run"
    try:
        sources = json.loads(path.read_text(encoding="utf-8"))["sources"]
        found = {s["name"]: (float(s["weight"]), str(s["path"])) for s in sources}
    except OSError as error:
        raise UserError(f"{path}: cannot read the weights: {error.strerror} ({fix})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no weights ({error!r}) ({fix})") from None
    check_weights({name: weight for name, (weight, _) in found.items()}, str(path))
    return found


def stopped_at(path: Path) -> int | None:
    """The step at which the run of a ``weights.json`` was stopped; None if it came to its end."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return None if content.get("complete", True) else int(content["step"])


def searched_for(path: Path) -> int | None:
    """Steps of the training that the weights (or a run's folder) are for; None: it is not told."""
    path = path / WEIGHTS_FILE if path.is_dir() else path
    steps = json.loads(path.read_text(encoding="utf-8")).get("final_train_iters")
    return steps if isinstance(steps, int) else None


def much_shorter(training: int, search: int) -> bool:
    """Whether a training has so few steps that the mixture of a search may be wrong for it."""
    return SHORT * training <= search


def read_selected(path: Path) -> dict[str, tuple[int, ...]]:
    """The examples of each source that a method chose; nothing if it chose none.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        sources = json.loads(path.read_text(encoding="utf-8"))["sources"]
        found = {str(s["name"]): tuple(int(row) for row in s["taken"]) for s in sources}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: holds no selection ({error!r})") from None
    if any(row < 0 for rows in found.values() for row in rows):
        raise UserError(f"{path}: holds a negative row (select again)")
    return found


def check_weights(weights: dict[str, float], where: str) -> None:
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"{where}: the weight of {name!r} is {weight} (0 or more)")
    if not sum(weights.values()) > 0:
        raise UserError(f"{where}: no source has a weight above 0")


def drawn_from(folder: Path) -> int | None:
    """Usable rows of the source that `sample --per-source` made a folder of; None for others."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        sources = json.loads(path.read_text(encoding="utf-8"))["sources"]
        return int(sources[0]["usable"]) if len(sources) == 1 else None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: is not a manifest ({error!r})") from None
