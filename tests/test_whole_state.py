"""Nothing that a run has learned or counted is lost in a checkpoint, in every kind of run.

Each goes some steps, is saved, and loaded into a run that has just begun. The whole state of both
is compared, at once and after two more steps; and every saved field is missed where it is lacking.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_scalebio.config import LisaConfig
from megatron_scalebio.core.lisa import active_layers
from tests import described
from tests.distributed.harness import run_distributed
from tests.markov import write_problem

pytestmark = pytest.mark.distributed

LISA = {"lisa_layers": 1, "lisa_interval": 3}
SHARDED = {"bf16": True, "use_distributed_optimizer": True}
Kind = tuple[str, int, dict[str, dict[str, Any]]]
# name: (stage, steps until it is saved, sections of the configuration)
KINDS: dict[str, Kind] = {
    "reweight": ("reweight", 5, {"bilevel": {"resync_interval": 3}}),
    "bf16 lisa adamw": (
        "reweight", 5,
        {"lisa": LISA, "parallel": SHARDED, "bilevel": {"mixture_optimizer": "adamw"}},
    ),
    "bf16 masters, at a reset": (
        "reweight", 3, {"parallel": {"bf16": True}, "bilevel": {"resync_interval": 3}},
    ),
    "lisa, never reset, at a draw": (
        "reweight", 6,
        {"lisa": LISA, "bilevel": {"resync_interval": None},
         "parallel": {"use_distributed_optimizer": True}},
    ),
    "bf16 lisa, never reset, at a draw": (
        "reweight", 6, {"lisa": LISA, "bilevel": {"resync_interval": None}, "parallel": SHARDED},
    ),
    "several goals": (
        "reweight", 5,
        {"bilevel": {"resync_interval": 3, "objective": "worst_case", "interactions": True}},
    ),
    "train": ("train", 3, {"parallel": {"bf16": True}}),
    "doremi": ("doremi", 3, {"baseline": {"method": "doremi"}}),
    "doge": ("doge", 3, {"baseline": {"method": "doge"}, "optimizer": {"lr": 0.02}}),
    "fastmix": ("fastmix", 3, {"baseline": {"method": "fastmix"}}),
    "rho_loss": (
        "rho_loss", 3,
        {"baseline": {"method": "rho_loss", "rho_batch_share": 0.4}, "train": {"seed": 5}},
    ),
}  # fmt: skip
# Of `reweight`, the LISA periods whose layers of u are its own when it is saved; [] without LISA.
DRAWN: dict[str, list[int]] = {
    "reweight": [], "several goals": [], "bf16 masters, at a reset": [], "bf16 lisa adamw": [1],
    "lisa, never reset, at a draw": [0, 1], "bf16 lisa, never reset, at a draw": [0, 1],
}  # fmt: skip
# Of a state saved: what the configuration and the data decide.
GIVEN = ("stage", "settings", "sources", "validation", "mixture")


def settings(problem: tuple[list, list], name: str) -> dict[str, Any]:
    sources, validation = problem
    tree: dict[str, Any] = {
        "data": {"seq_length": 12, "sources": sources, "validation": validation},
        "model": {
            "num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 24,
            "make_vocab_size_divisible_by": 16, "hidden_dropout": 0.1, "attention_dropout": 0.1,
        },
        "optimizer": {"lr": 3e-3, "weight_decay": 0.1},
        "train": {"train_iters": 9, "micro_batch_size": 2, "global_batch_size": 8, "seed": 77},
    }  # fmt: skip
    if name == "train":
        given = zip(sources, (1.0, 3.0, 1.0), strict=True)
        tree["data"]["sources"] = [{**source, "initial_weight": w} for source, w in given]
    if name == "several goals":
        tree["data"]["validation"] = [*validation, {**validation[0], "name": "again"}]
    for section, values in KINDS[name][2].items():
        tree[section] = {**tree.get(section, {}), **values}
    return tree


Run = tuple[Any, Callable[[], Any]]  # a state and what makes its next step


def begin(name: str, problem: tuple[list, list], cache: Path, **optimizer: float) -> Run:
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.doge import DogeState
    from megatron_scalebio.methods.doremi import DoremiState
    from megatron_scalebio.methods.fastmix import FastmixState
    from megatron_scalebio.methods.finetune import FinetuneState
    from megatron_scalebio.methods.pool_training import training_config
    from megatron_scalebio.methods.rho_loss import RhoState
    from megatron_scalebio.methods.scalebio import TrainState
    from megatron_scalebio.model.init import initialize_weights

    tree, stage = settings(problem, name), KINDS[name][0]
    config = load_config(None, {**tree, "optimizer": {**tree["optimizer"], **optimizer}})
    state: Any
    if stage == "doremi":
        state = DoremiState(config, cache)
        initialize_weights(state.reference, 5, 0.1, 3)
    elif stage == "rho_loss":
        state = RhoState(training_config(config, 9), cache, np.linspace(1, 4, 90))
    else:
        kinds = {
            "reweight": TrainState, "doge": DogeState, "fastmix": FastmixState,
            "train": FinetuneState,
        }  # fmt: skip
        state = kinds[stage](config, cache)
    return state, state.make_step


def disturb(state: Any) -> None:
    """Moves what a few good steps leave as it was."""
    state.training.skipped_in_a_row = 3
    state.cost.trained += 11
    state.cost.scored += 7
    for kind in (state.training.spikes.applied, state.training.spikes.last):
        for number, name in enumerate(kind):
            kind[name] = [*kind[name], 2.5 + number]
    for number, sampler in enumerate((state.data.sampler, state.data.validation_sampler)):
        sampler.step += 5 + number
        sampler.drawn_S += 3 + number
    if state.stage == "reweight":
        state.training.mixture.initial_S = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
        state.training.mixture.squares[0] += 0.25
        state.training.mixture.recent_S += 0.125
        state.training.mixture.is_slow = True
        for number in range(50):
            excess_S = torch.tensor([0.1 * number, -0.2, 0.3]).double()
            state.training.mixture.lookalikes.append(excess_S)
        state.training.goals.sums_2V += 0.5
        state.sets.start_V = [2.5] * len(state.data.validation)
        paths = [state.training.mixture.trajectory, state.sets.path]
        if state.interactions is not None:
            paths.append(state.interactions.sums)
        for path in paths:
            while path.block_length == 1 or not path.steps % 2:
                path.append(torch.rand(path.tail().shape[1]).double())
    if hasattr(state, "best_loss"):
        state.best_loss = 3.25


def on_ranks(problem: tuple[list, list], folder_name: str) -> None:
    from megatron_scalebio import runtime
    from megatron_scalebio.config import Config

    runtime.start(Config())
    for number, name in enumerate(KINDS):
        folder = Path(folder_name) / str(number)
        folder.mkdir()
        outcome = round_trip(name, problem, folder)
        (Path(folder_name) / f"{name}.json").write_text(json.dumps(outcome))
        if name == "train":
            goes_on_with_other_settings(name, problem, folder)


def goes_on_with_other_settings(name: str, problem: tuple[list, list], folder: Path) -> None:
    """Those of the configuration hold, not those in the checkpoint's groups of parameters."""
    from megatron_scalebio.checkpoint import saver

    other = {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_eps": 1e-3, "weight_decay": 0.3}
    state, step = begin(name, problem, folder / "cache", **other)
    assert state.probs_S.tolist() == [0.2, 0.6, 0.2]
    resumed, [warning] = saver.load_latest(state, folder)
    assert resumed and warning == (
        "continues with other settings: optimizer.weight_decay 0.1 -> 0.3, optimizer.adam_beta1 "
        "0.9 -> 0.5, optimizer.adam_beta2 0.95 -> 0.6, optimizer.adam_eps 1e-08 -> 0.001"
    )
    step()
    groups = state.training.period.optimizers["w"].param_groups
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.5, 0.6), 1e-3)}
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}, "norms have none"
    assert {group["lr"] for group in groups} == {state.schedule.at(3).lr_w}
    state.training.leave_period()


def whole(state: Any) -> described.Table:
    table = {**described.described(state), **described.models(state), **described.generators()}
    if state.stage == "rho_loss":
        del table[".probs_S"]  # of the batch, which each step draws anew
    return table


def round_trip(name: str, problem: tuple[list, list], folder: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    from megatron_scalebio.checkpoint import saver

    state, step = begin(name, problem, folder / "cache")
    for _ in range(KINDS[name][1]):
        step()
    disturb(state)
    saver.save(state, folder)
    saved, layers = whole(state), layers_of_u(name, folder, state)
    [part] = folder.glob("iter_*/bilevel")
    common = dist_checkpointing.load_common_state_dict(part)["run"]
    two_more = [step() and whole(state) for _ in range(2)]
    state.training.leave_period()

    fresh, fresh_step = begin(name, problem, folder / "cache")
    unmoved = unmoved_fields(common, fresh)
    unmissed = unmissed_fields(common, fresh)
    fresh, fresh_step = begin(name, problem, folder / "cache")
    assert saver.load_latest(fresh, folder) == (True, [])
    lost = described.differing(whole(fresh), saved)
    parted = [described.differing(fresh_step() and whole(fresh), then) for then in two_more]
    fresh.training.leave_period()
    return {
        "unmoved": unmoved, "unmissed": unmissed, "lost": lost, "parted": parted, "layers": layers,
        "megatron": told_to_megatron(folder, fresh),
    }  # fmt: skip


def flat(state: dict[str, Any], path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """What a saved state tells that is not given, by the keys on the way to it."""
    leaves: list[tuple[tuple[Any, ...], Any]] = []
    for key, value in state.items():
        if key in GIVEN and not path:
            continue
        if isinstance(value, dict):
            leaves += flat(value, (*path, key))
        elif value != []:
            leaves.append(((*path, key), value))
    return leaves


def without(state: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    left = dict(state)
    if len(path) == 1:
        del left[path[0]]
    else:
        left[path[0]] = without(state[path[0]], path[1:])
    return left


def unmoved_fields(common: dict[str, Any], fresh: Any) -> list[str]:
    """Fields in which a run that has just begun is no other: their loss would not show."""
    begun = dict(flat(fresh.common_state()))
    return [
        str(path) for path, value in flat(common)
        if path in begun and described.same(value, begun[path])
    ]  # fmt: skip


def unmissed_fields(common: dict[str, Any], fresh: Any) -> list[str]:
    """Fields without which a state loads, and is then the same."""
    begun = fresh.common_state()
    fresh.load_common_state(common)
    right, unmissed = described.described(fresh), []
    for path, _ in flat(common):
        fresh.load_common_state(begun)
        try:
            fresh.load_common_state(without(common, path))
        except (KeyError, TypeError, IndexError):
            continue
        if not described.differing(described.described(fresh), right):
            unmissed.append(str(path))
    return unmissed


def layers_of_u(name: str, folder: Path, state: Any) -> list[int] | None:
    """Which layers of u are in the checkpoint, besides its embedding and final norm.

    Low bits are there in bf16 under LISA, u's own where it is never reset.
    """
    from megatron.core import dist_checkpointing

    if "u" not in state.training.models:
        return None
    [part] = folder.glob("iter_*/bilevel")
    keys = dist_checkpointing.load_tensors_metadata(str(part))
    optimizers = {"optimizer_w", "optimizer_u"} if described.going_on(state) else set()
    bits = set() if "lisa" not in name or "bf16" not in name else {"low_bits_w"}
    bits |= {"low_bits_u"} if "bf16 lisa, never" in name else set()
    assert {key.split(".")[0] for key in keys} == {"u", *optimizers, *bits}
    held = {int(key.split(".")[3]) for key in keys if key.startswith("u.decoder.layers.")}
    rest = {k for k in keys if k.startswith("u.") and ".layers." not in k}
    assert rest == {"u.embedding.word_embeddings.weight", "u.decoder.final_layernorm.weight"}
    return sorted(held)


def told_to_megatron(folder: Path, state: Any) -> dict[str, Any]:
    """What w's part says of itself, besides whether its arguments are the configuration's."""
    from megatron.core import dist_checkpointing

    from megatron_scalebio.checkpoint.megatron_args import megatron_args

    [part] = folder.glob("iter_*")
    common = dist_checkpointing.load_common_state_dict(part)
    args = megatron_args(state.config, 32, state.data.tokenizer)
    right = vars(common["args"]) == vars(args)
    return {"folder": part.name, "args are right": right, **{
        key: common[key] for key in ("iteration", "checkpoint_version", "content_metadata")
    }}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole state")
    problem = write_problem(
        folder / "data", [0.6, 0.4, 0.0], 0, length=13, examples=30, validation=20
    )
    run_distributed(on_ranks, 1, problem, str(folder))
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_was_loaded_is_the_one_that_was_saved(outcomes: Path, name: str) -> None:
    outcome = json.loads((outcomes / f"{name}.json").read_text())
    assert outcome["lost"] == []
    assert outcome["parted"] == [[], []]
    # Else the two above would not see it.
    assert outcome["unmoved"] == [] and outcome["unmissed"] == []


@pytest.mark.parametrize("name", KINDS)
def test_megatron_is_told_the_step_and_the_arguments(outcomes: Path, name: str) -> None:
    steps = KINDS[name][1]
    assert json.loads((outcomes / f"{name}.json").read_text())["megatron"] == {
        "folder": f"iter_{steps:07d}", "args are right": True, "iteration": steps,
        "checkpoint_version": 3.0, "content_metadata": {"singleton_local_shards": False},
    }  # fmt: skip


@pytest.mark.parametrize(("name", "periods"), DRAWN.items())
def test_a_checkpoint_holds_what_is_us_own(outcomes: Path, name: str, periods: list[int]) -> None:
    """What u has trained since it was last equal to w; all else is w's."""
    lisa = LisaConfig(**LISA).options()
    drawn = {layer for p in periods for layer in active_layers(lisa, 3, 1, 1, p, 77) or ()}
    held = json.loads((outcomes / f"{name}.json").read_text())["layers"]
    assert held == sorted(drawn or {0, 1, 2})
