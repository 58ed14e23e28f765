"""Does `interactions` say which source serves which set? Against trainings without each source.

Five Markov-chain sources, three validation sets: drawn from sources 0 and 1 (.6 .4), from 1 and 2
(.3 .7), and from 3 with a tenth of 0 and 2 each. Source 4 is in none. A run learns the mixture and
fits the interactions; then one training on the mixture found, and one without each source, of as
many steps, are measured on all sets. Leaving out a source of weight p should change a set's loss by
p / (1 − p) · (its interaction less the mean under p), times a number that is the same for all.

Reported: correlation of both over all pairs, and for each set; whether the signs agree where the
interaction is told from 0 and the loss changes by a hundredth of a nat or more.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import build, table

from megatron_scalebio import runtime
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.methods.finetune import FinetuneState
from megatron_scalebio.methods.scalebio import train_step
from tests.markov import draw, transition_matrices, write_source

SETS = np.array([[0.6, 0.4, 0, 0, 0], [0, 0.3, 0.7, 0, 0], [0.1, 0, 0.1, 0.8, 0]])
LENGTH, SOURCES = 32, 5


def write_data(folder: Path, seed: int, rows: int = 2000) -> tuple[list[dict], list[dict]]:
    """Entries of the sources and of the validation sets."""
    matrices, entries = transition_matrices(SOURCES, seed), []
    for number in range(SOURCES + len(SETS)):
        name = f"s{number}" if number < SOURCES else f"v{number - SOURCES}"
        share = np.eye(SOURCES)[number] if number < SOURCES else SETS[number - SOURCES]
        source_B = np.repeat(np.arange(SOURCES), np.floor(share * rows + 0.5).astype(int))
        drawn = draw(matrices, source_B, LENGTH + 1, (seed, 8 + (number >= SOURCES), number))
        entries.append({"name": name, "path": write_source(folder, name, list(drawn))})
    return entries[:SOURCES], entries[SOURCES:]


def settings(sources: list[dict], sets: list[dict], steps: int, seed: int) -> dict[str, dict]:
    return {
        "data": {"seq_length": LENGTH, "sources": sources, "validation": sets},
        "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2},
        "optimizer": {"lr": 5e-3},
        "bilevel": {"interactions": True},
        "train": {
            "train_iters": steps, "global_batch_size": 20, "micro_batch_size": 4,
            "validation_batch_size": 24, "seed": seed,
        },
    }  # fmt: skip


def searched(tree: dict[str, dict], cache: Path) -> tuple[np.ndarray, Any]:
    """The weights found, and the interactions."""
    state = build(tree, cache)
    while state.step < state.config.train.train_iters:
        train_step(state)
    assert state.interactions is not None
    return state.training.intervals().weight_S.numpy(), state.interactions.found(state.data, 0.95)


def trained(tree: dict[str, dict], weight_S: np.ndarray, cache: Path) -> np.ndarray:
    """Losses on the sets of a training of w alone on a mixture."""
    weight_S = np.maximum(weight_S / weight_S.sum(), 1e-9)  # 0 is no initial weight
    pairs = zip(tree["data"]["sources"], weight_S.tolist(), strict=True)
    sources = [{**source, "initial_weight": weight} for source, weight in pairs]
    changed = {"data": {**tree["data"], "sources": sources}, "bilevel": {"floor_share": 0.01}}
    train = {**tree["train"], "global_batch_size": 40}
    config = load_config(None, {**tree, **changed, "train": train})
    runtime.start(config)
    state = FinetuneState(config, cache)
    while state.step < config.train.train_iters:
        state.make_step()
    return np.array([each.sample_mean for each in state.held_out()])


def compared(seed: int, steps: int, trainings: int) -> dict[str, Any]:
    """Interactions against losses, of one seed."""
    with tempfile.TemporaryDirectory() as folder:
        tree = settings(*write_data(Path(folder), seed), steps, seed)
        cache = Path(folder) / "cache"
        weight_S, found = searched(tree, cache)
        short = {**tree, "train": {**tree["train"], "train_iters": trainings}}
        whole_V = trained(short, weight_S, cache)
        without = np.eye(SOURCES) == 0
        changes_SV = np.array([trained(short, weight_S * w, cache) - whole_V for w in without])
    above_SV = found.serves - weight_S @ found.serves
    guessed_SV = (weight_S / (1 - weight_S))[:, None] * above_SV
    told = found.sure & (np.abs(changes_SV) >= 0.01)
    return {
        "weights": weight_S,
        "changes": changes_SV,
        "guessed": guessed_SV,
        "all": np.corrcoef(guessed_SV.ravel(), changes_SV.ravel())[0, 1],
        "sets": [np.corrcoef(guessed_SV[:, v], changes_SV[:, v])[0, 1] for v in range(len(SETS))],
        "signs": int((np.sign(guessed_SV) == np.sign(changes_SV))[told].sum()),
        "told": int(told.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=400, help="of the search")
    parser.add_argument("--trainings", type=int, default=400, help="steps of the trainings")
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        result = compared(seed, args.steps, args.trainings)
        np.set_printoptions(precision=3, suppress=True)
        for name in ("weights", "changes", "guessed"):
            print(name, result[name], sep="\n", flush=True)
        sets = " ".join(f"{each:.2f}" for each in result["sets"])
        rows.append([seed, f"{result['all']:.2f}", sets, f"{result['signs']} of {result['told']}"])
    print(table(["seed", "correlation", "for each set", "signs that agree"], rows))


if __name__ == "__main__":
    main()
