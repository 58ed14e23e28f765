"""Groups of sources by their gradients, where their names make none.

    source ─▶ gradient of the mean loss of a few of its examples, in the model that the run starts
    from ─▶ sketched (`sketch.py`), made of length 1 ─▶ Ward's method

Ward's method (J. Am. Stat. Assoc. 58, 1963) joins, one pair at a time, the two groups whose union
adds least to the squared distances within groups, until as many are left as were asked for.

    groups.json    {"made_for": …, "groups": [[names of the sources of each]]}
"""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.engine.start import Job, load_start
from megatron_scalebio.engine.state import RunState
from megatron_scalebio.errors import UserError
from megatron_scalebio.logs.console import RunConsole
from megatron_scalebio.methods.gradient_features import GradientFeatures
from megatron_scalebio.methods.groups import Level
from megatron_scalebio.whole_files import write_json

GROUPS_FILE = "groups.json"
DIMENSIONS = 512
COST = 0.1  # of the run's examples, at most, within these bounds for each source:
FEWEST_EXAMPLES, MOST_EXAMPLES = 16, 64
SECONDS_BETWEEN_LINES = 10.0


def similar_sources(config: Config, job: Job) -> Level | None:
    """The groups that the run asked for; None if it asked for none. A collective.

    They are found once: a resumed run reads them from its folder.

    Raises:
        UserError: if they can't be had, or the folder's are another run's.
    """
    asked = config.bilevel.group_sources
    if asked is None:
        return None
    names = [source.name for source in config.data.sources]
    if any("/" in name for name in names):
        raise UserError(
            f"bilevel.group_sources: {asked}: the sources have groups already, by names such as "
            f"{next(name for name in names if '/' in name)} (drop one or the other)"
        )
    if asked >= len(names):
        raise UserError(
            f"bilevel.group_sources: {asked} groups for only {len(names)} sources (ask for fewer)"
        )
    if config.model.num_experts is not None:
        raise UserError(
            "bilevel.group_sources: does not work with experts (name the groups instead, as in "
            "math/web)"
        )
    made_for = {
        "groups": asked, "sources": names, "seed": config.train.seed,
        "model": {name: str(value) for name, value in asdict(config.model).items()},
    }  # fmt: skip
    path = job.folder / GROUPS_FILE
    groups = runtime.on_main(lambda: _read(path, made_for))
    if groups is None:
        features_SD = _features(config, job)
        groups = runtime.on_main(lambda: grouped(names, features_SD, asked))
        runtime.on_main(lambda: write_json(path, {"made_for": made_for, "groups": groups}))
    return _level(names, groups)


def _read(path: Path, made_for: dict[str, Any]) -> list[list[str]] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        same, groups = found["made_for"] == made_for, found["groups"]
        told = sorted(name for group in groups for name in group)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is damaged (remove it)") from None
    if not same or told != sorted(made_for["sources"]):
        raise UserError(
            f"{path}: has groups of other sources, or of another model (choose a new train.output, "
            "or remove it)"
        )
    return groups


def _features(config: Config, job: Job) -> torch.Tensor:
    """[S, D], equal on all ranks."""
    state = RunState(config, "grouping of sources", job.folder / "cache")
    load_start(state, job.folder)
    sources, train = state.data.sources, config.train
    share = COST * config.train.train_iters * train.global_batch_size / len(sources)
    most = int(np.clip(share, FEWEST_EXAMPLES, MOST_EXAMPLES))
    console, said = RunConsole([], 1), time.monotonic()
    if runtime.is_main():
        console.note(f"gradients of {len(sources):,} sources, {most} examples of each")
    features, mean_SD = GradientFeatures(state, DIMENSIONS, config.train.seed), []
    try:
        for number, source in enumerate(sources):
            draw = np.random.default_rng((train.seed, 6, number))
            row_N = draw.permutation(len(source))[:most]
            mean_SD.append(features.of_mean(source, row_N).cpu())
            if runtime.is_main() and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                console.note(f"gradients of {number + 1:,} of {len(sources):,} sources")
                said = time.monotonic()
    finally:
        features.close()
    return torch.stack(mean_SD)


def grouped(names: list[str], features_SD: torch.Tensor, groups: int) -> list[list[str]]:
    """In the order of their first sources."""
    from scipy.cluster.hierarchy import fcluster, linkage  # a second, which few runs need

    alike_SD = normalize(features_SD.double(), dim=1)
    members: dict[int, list[str]] = {}
    numbers = fcluster(linkage(alike_SD.numpy(), "ward"), groups, "maxclust").tolist()
    for name, number in zip(names, numbers, strict=True):
        members.setdefault(number, []).append(name)
    return list(members.values())


def _level(names: list[str], groups: list[list[str]]) -> Level:
    """Groups are called by their first source, and the number of the others."""
    called = [f"{first} + {len(others):,}" if others else first for first, *others in groups]
    number = {name: g for g, group in enumerate(groups) for name in group}
    return Level(1, called, [number[name] for name in names])
