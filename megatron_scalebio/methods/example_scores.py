"""Scores of single examples: what the mixture's gradient would be if each were a source.

    y_x(t) = ℓ_x(u) − ℓ_x(w), less its mean under the mixture       of example x in the batch of t

w differs from u in leaning to the validation set, so y is above 0 where more of x lowers the
validation loss. Both losses are those of the step itself: nothing more is computed. Where u has
just been reset to w, y is 0 whatever x is, and no visit. A visit is noisy; of several of one,

    y_x(t) = m_i + s_i(t) + d_x + e,   var d_x = b_i,   var e = v_i     x in source i
    score  = m_i + n b_i / (n b_i + v_i) · (mean of y_x − s_i − m_i)    after n visits

the mean, shrunk to its source's by how much of its spread is noise (empirical Bayes; b and v from
an analysis of variance). One visit alone tells no v, and nothing is shrunk. s_i(t) is what all of a
source have in common in a step, from where w happened to lean; it is estimated, and shrunk, alike.

    example_visits.bin       every visit, 16 bytes: row over all sources (int64), step (uint32),
                             y (float32)
    example_weights.npz      scores (data/example_weights.py)

A resumed run cuts the visits back to its checkpoint. Memory is used at the end, 20 bytes an
example on rank 0.
"""

import os
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_scalebio import runtime
from megatron_scalebio.core.batch import sequence_sums
from megatron_scalebio.core.collectives import summed
from megatron_scalebio.core.flush import Losses
from megatron_scalebio.data.example_weights import ExampleWeights
from megatron_scalebio.data.sources import Source
from megatron_scalebio.errors import UserError, disk_errors_named
from megatron_scalebio.formatting import few
from megatron_scalebio.logs.records import write_whole
from megatron_scalebio.mixture.objective import Role
from megatron_scalebio.mixture.sampler import Floats, Ints, Picks

VISITS_FILE = "example_visits.bin"
VISIT = np.dtype([("row", "<i8"), ("step", "<u4"), ("gain", "<f4")])
_WRITTEN_TOGETHER = 65_536  # visits
_READ_TOGETHER = 1_000_000


class ExampleVisits:
    """The visits of a run, on disk. Its methods are collectives.

    Attributes:
        count: visits that are written.
    """

    def __init__(self, path: Path, sources: Sequence[Source]) -> None:
        self.path, self.sources, self.count = path, sources, 0
        self._start_S = np.cumsum([0, *map(len, sources)])
        self._waiting: list[npt.NDArray[Any]] = []

    def append(self, step: int, losses: Losses, picks: Picks, probs_S: Floats) -> None:
        """The visits of a step that was applied, and in which u was not w."""
        gain_B = gains(losses, len(picks.index_B))
        seen_B = np.isfinite(gain_B)
        group_B, gain_B = picks.group_B[seen_B], gain_B[seen_B]
        if not gain_B.any():  # u has not parted from w, or there is no target
            return
        share_B = (probs_S / np.maximum(np.bincount(group_B, minlength=len(probs_S)), 1))[group_B]
        visits = np.empty(len(gain_B), VISIT)
        visits["row"] = self._start_S[group_B] + picks.index_B[seen_B]
        visits["step"] = step
        visits["gain"] = gain_B - np.average(gain_B, weights=share_B)
        self._waiting.append(visits)
        if sum(map(len, self._waiting)) >= _WRITTEN_TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Writes what waits.

        Raises:
            UserError: on all ranks, if the disk refuses.
        """
        if self._waiting:
            visits, self._waiting = np.concatenate(self._waiting), []
            runtime.on_main(lambda: self._write(visits))
            self.count += len(visits)

    def _write(self, visits: npt.NDArray[Any]) -> None:
        """Over whatever lies behind the visits that this run, or its checkpoint, knows of."""
        with (
            disk_errors_named(self.path),
            open(self.path, "r+b" if self.count else "wb", buffering=0) as file,
        ):
            file.truncate(self.count * VISIT.itemsize)
            file.seek(0, os.SEEK_END)
            write_whole(file, visits.tobytes())
            os.fsync(file.fileno())

    def write_scores(self, folder: Path) -> dict[str, Any]:
        """Writes the scores of all examples; what weights.json has of them."""
        self.flush()
        return runtime.on_main(lambda: self._write_scores(folder))

    def _write_scores(self, folder: Path) -> dict[str, Any]:
        visits: npt.NDArray[Any] = np.empty(0, VISIT)
        if self.count:
            visits = np.memmap(self.path, VISIT, "r", shape=(self.count,))
        score_N, visits_N, error_N, reliability_S = scores(visits, self._start_S)
        ExampleWeights(
            sources=np.array([source.name for source in self.sources]),
            fingerprints=np.array([source.fingerprint for source in self.sources]),
            offsets=self._start_S, score=score_N, visits=visits_N, standard_error=error_N,
        ).write(folder)  # fmt: skip
        names = [source.name for source in self.sources]
        reliability = dict(zip(names, reliability_S, strict=True))
        never = int((visits_N == 0).sum())
        return {
            "examples": len(score_N),
            "visits": self.count,
            "never_visited": never,
            "reliability": reliability,
            "told": _told(len(score_N), self.count, never, reliability),
        }

    def state_dict(self) -> dict[str, Any]:
        self.flush()
        return {"count": self.count, "path": str(self.path.resolve())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on behind the visits of a checkpoint, which may be of a run in another folder.

        Raises:
            UserError: if they are gone.
        """
        self._waiting, self.count = [], state["count"]
        runtime.on_main(lambda: self._take(Path(state["path"])))

    def _take(self, theirs: Path) -> None:
        size = self.count * VISIT.itemsize
        if not size:
            return
        theirs_whole = theirs.is_file() and theirs.stat().st_size >= size
        if theirs_whole and theirs != self.path.resolve():
            with disk_errors_named(self.path):
                shutil.copyfile(theirs, self.path)
        elif not self.path.is_file() or self.path.stat().st_size < size:
            raise UserError(
                f"{self.path}: lacks visits that the checkpoint has counted (restore it, or resume "
                "without scores: --level source)"
            )


def gains(losses: Losses, batch_size: int) -> Floats:
    """ℓ_x(u) − ℓ_x(w) of each example of a global batch, means over its targets; NaN without one.

    A collective.
    """
    sums_2B = torch.zeros(2, batch_size, dtype=torch.float64)  # of losses, of targets
    for this, part_B in losses.parts:
        counts_B = this.coefficient_B > 0
        member_B = this.batch.member_B[counts_B]
        sum_B = part_B[counts_B] / this.coefficient_B[counts_B]
        if this.role is Role.TRAIN_U:
            sums_2B[0].index_add_(0, member_B, sum_B)
        elif this.role is Role.TRAIN_W:
            targets_B = sequence_sums(this.batch.mask_BS > 0, this.batch)[counts_B]
            sums_2B[0].index_add_(0, member_B, -sum_B)
            sums_2B[1].index_add_(0, member_B, targets_B)
    gain_B, targets_B = summed(sums_2B).numpy()
    return np.divide(gain_B, targets_B, out=np.full(batch_size, np.nan), where=targets_B > 0)


def scores(
    visits: npt.NDArray[Any], start_S: Ints
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], list[float | None]]:
    """The module's score of every row.

    Args:
        start_S: first row of each source, and the end of the last.

    Returns:
        Scores, visits and standard errors of the rows, and of each source the share of its means'
        spread that is not noise; None where nothing tells.
    """
    rows, sources = int(start_S[-1]), len(start_S) - 1
    sum_N, visits_N = np.zeros(rows), np.zeros(rows, np.int32)
    square_S = np.zeros(sources)
    for start in range(0, len(visits), _READ_TOGETHER):
        part = visits[start : start + _READ_TOGETHER]
        row_V, source_V = part["row"], np.searchsorted(start_S, part["row"], side="right") - 1
        gain_V = without_steps(part["gain"].astype(np.float64), source_V, part["step"])
        np.add.at(sum_N, row_V, gain_V)
        np.add.at(visits_N, row_V, 1)
        square_S += np.bincount(source_V, gain_V**2, minlength=sources)
    score_N, error_N = np.full((2, rows), np.nan, np.float32)
    reliability_S: list[float | None] = [None] * sources
    for s, (start, end) in enumerate(pairwise(start_S.tolist())):
        here = slice(start, end)
        score_N[here], error_N[here], reliability_S[s] = _shrunk(
            sum_N[here], visits_N[here], square_S[s]
        )
    return score_N, visits_N, error_N, reliability_S


def without_steps(gain_V: Floats, source_V: Ints, step_V: npt.NDArray[np.uint32]) -> Floats:
    """Visits without what their source's have in common in their step, s_i(t)."""
    cells, cell_V = np.unique(source_V << 32 | step_V, return_inverse=True)
    sum_C, visits_C = np.bincount(cell_V, gain_V).astype(float), np.bincount(cell_V)
    square_S = np.bincount(source_V, gain_V**2)
    common_C = np.zeros(len(cells))
    first_S = np.searchsorted(cells >> 32, np.arange(len(square_S) + 1))
    for source, (start, end) in enumerate(pairwise(first_S.tolist())):
        here = slice(start, end)
        mean_C, _, known = _shrunk(sum_C[here], visits_C[here], square_S[source])
        if known is not None:  # of one visit a step nothing is
            common_C[here] = mean_C - sum_C[here].sum() / visits_C[here].sum()
    return gain_V - common_C[cell_V]


def _shrunk(
    sum_n: Floats, visits_n: npt.NDArray[np.integer], square: float
) -> tuple[Floats, Floats, float | None]:
    """Of one source: scores, their standard errors, and how much of the means' spread is real.

    Args:
        sum_n, visits_n: sum and number of each example's (or each step's) visits.
        square: sum of the squares of all.
    """
    seen_n, visits = visits_n > 0, int(visits_n.sum())
    nothing_n = np.full(len(sum_n), np.nan)
    if not visits:
        return nothing_n, nothing_n, None
    mean = sum_n.sum() / visits
    off_n = np.divide(sum_n, visits_n, out=np.full(len(sum_n), mean), where=seen_n) - mean
    again = visits - int(seen_n.sum())
    if not again:
        return mean + off_n, nothing_n, None
    means_square = float((visits_n * (off_n + mean) ** 2).sum())
    noise = max(0.0, square - means_square) / again
    unequal = visits - float((visits_n.astype(np.float64) ** 2).sum()) / visits
    between = float((visits_n * off_n**2).sum()) - (int(seen_n.sum()) - 1) * noise
    spread = max(0.0, between / unequal) if unequal > 0 else 0.0
    kept_n = visits_n * spread / np.maximum(visits_n * spread + noise, 1e-300)
    error_n = np.sqrt(spread * (1 - kept_n))
    return mean + kept_n * off_n, error_n, float(kept_n[seen_n].mean())


def _told(examples: int, visits: int, never: int, reliability: dict[str, float | None]) -> str:
    line = f"{examples:,} examples scored in {visits:,} visits"
    if never:
        line += f"; {never:,} never visited: each has its source's score"
    known = {name: share for name, share in reliability.items() if share is not None}
    if not known:
        return f"{line}; none was visited twice, so the noise of scores is unknown"
    most = sorted(known, key=lambda name: -known[name])
    shares = few([f"{known[name]:.0%} in {name}" for name in most])
    return f"{line}; share of the spread of scores that is not noise: {shares}"
