"""The outcome of a method that scores rows and keeps some: the choice, and every score.

    scores.npz   source [N], index [N], score [N] float32, and what else the method knows of a row;
                 `numpy.load(path)` reads it, so that a user can cut anew

`source` is the place in data.sources, `index` the example within it.
"""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_scalebio import runtime
from megatron_scalebio.engine.state import TokenCost
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.pool import Pool
from megatron_scalebio.mixture.sampler import Floats, Ints
from megatron_scalebio.whole_files import replaced

SCORES_FILE = "scores.npz"


def write_scores(folder: Path, pool: Pool, score_N: Floats, **more: Any) -> None:
    """A collective; the first rank writes."""
    source_N, index_N = pool.locate(np.arange(len(pool)))

    def write() -> None:
        with replaced(folder / SCORES_FILE) as temporary, temporary.open("wb") as stream:
            np.savez(
                stream, source=source_N.astype(np.int32), index=index_N,
                score=score_N.astype(np.float32), **more,
            )  # fmt: skip

    runtime.on_main(write)


def found_from_rows(pool: Pool, row_K: Ints, cost: TokenCost, step: int, **details: Any) -> Found:
    """Chosen rows, repeated as often as they were chosen, as weights and a choice."""
    count_N = np.bincount(row_K, minlength=len(pool)).astype(float)
    return Found(
        sources=pool.sources,
        weight_S=pool.shares(count_N),
        initial_S=pool.shares(np.ones(len(pool))),
        cost=cost,
        step=step,
        selected_S=pool.split(row_K),
        details={"scores": SCORES_FILE, "selected": int((count_N > 0).sum()), **details},
    )
