"""Which examples of each source the scores of a run leave to be drawn."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron_scalebio.data.example_weights import EXAMPLE_WEIGHTS_FILE, read_example_weights
from megatron_scalebio.errors import UserError
from megatron_scalebio.mixture.sampler import Ints
from megatron_scalebio.sample.inputs import locate


def selected_by_score(
    run: Path, paths: Mapping[str, str], min_score: float | None, top: float | None
) -> tuple[dict[str, Ints], int]:
    """The examples of each source that score enough, ascending, and how many were never visited.

    Args:
        paths: where each source is, by name.
        min_score: the least score; or
        top: the share of each source that scores highest.

    Raises:
        UserError: if the run has no scores, or of other data than is there now.
    """
    if top is not None and not 0 < top <= 1:
        raise UserError(f"--top: must be above 0 and at most 1, not {top:g}")
    if min_score is not None and not math.isfinite(min_score):
        raise UserError(f"--min-score: must be a finite number, not {min_score:g}")
    found = read_example_weights(run)
    names = found.sources.tolist()
    scored_data = dict(zip(names, found.fingerprints.tolist(), strict=True))
    for name, path in paths.items():
        if name not in scored_data:
            raise UserError(f"{run / EXAMPLE_WEIGHTS_FILE}: has no scores of source {name!r}")
        _require_same(run, name, path, scored_data[name])
    scored = dict(zip(names, np.split(found.score, found.offsets[1:-1]), strict=True))
    selected = {}
    for name, score_n in scored.items():
        if np.isnan(score_n).all():  # nothing speaks against a source that was never visited
            chosen = np.arange(len(score_n))
        elif min_score is not None:
            chosen = np.flatnonzero(score_n >= min_score)
        else:
            assert top is not None
            count = math.ceil(top * len(score_n))
            chosen = np.sort(np.argsort(-score_n, kind="stable")[:count])
        selected[name] = chosen.astype(np.int64)
    return selected, int((found.visits == 0).sum())


def _require_same(run: Path, name: str, path: str, fingerprint: str) -> None:
    located = locate(name, path)
    if located.description is None:
        raise UserError(
            f"{path}: source {name!r} is not a prepared folder, whose examples the scores are of "
            "(name the one that the search had, or prepare it and search again)"
        )
    if located.description["fingerprint"] != fingerprint:
        raise UserError(
            f"{path}: has changed since the scores of {run} were found (restore it, or search "
            "again)"
        )
