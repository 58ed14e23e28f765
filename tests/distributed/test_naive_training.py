"""Whole steps of `reweight` and of `train` equal those of their definitions, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed import naive_loop
from tests.distributed.gather import global_tensors, relative
from tests.distributed.harness import next_layout, run_distributed
from tests.distributed.small_runs import (
    BATCH,
    PLAIN,
    SHAPE,
    SHARES,
    begun,
    ended,
    examples,
    step_of,
    tree_of,
    write_problem,
)

pytestmark = pytest.mark.distributed

BIASED = {"add_bias_linear": True, "add_qkv_bias": True}
# Every option has another value than its default. The limit of the norms clips w and u by
# different factors, and the epsilon is of the gradients' size.
OPTIMIZER = {
    "lr": 0.02, "lr_u": 0.03, "min_lr": 0.005, "lr_decay_style": "linear",
    "lr_warmup_fraction": 0.26, "weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9,
    "adam_eps": 3e-3, "clip_grad": 0.4,
}  # fmt: skip
GROWING = {
    "alpha": 3.0, "alpha_growth": 2.0, "outer_rounds": 3, "lr_lambda": 0.4,
    "lr_lambda_decay_style": "linear", "resync_interval": 3, "floor_share": 0.6,
}  # fmt: skip
ROOMY = {**BATCH, "train_iters": 8, "validation_batch_size": 4, "seed": 5}
NARROW = {**ROOMY, "global_batch_size": 2, "validation_batch_size": 2}

# name: sections of the configuration; `weights` are those of the sources at the start.
REWEIGHT: dict[str, dict] = {
    "growing": {"model": BIASED, "optimizer": OPTIMIZER, "bilevel": GROWING, "train": ROOMY},
    "published": {
        "weights": [0.5, 1.0, 2.0],
        "data": {"loss_mean": "token"},
        "model": {"untie_embeddings_and_output_weights": True},
        "optimizer": {**PLAIN, "clip_grad": 0.0},
        "bilevel": {"mixture_optimizer": "adamw", "lr_lambda_decay_style": "cosine",
                    "resync_interval": None},
        "train": {**ROOMY, "train_iters": 6},
    },
    "few places": {
        "weights": [1.0, 0.3, 0.05],
        "optimizer": PLAIN,
        "bilevel": {"alpha": 2.0, "floor_share": 0.5, "lr_lambda": 0.03},
        "train": {**NARROW, "train_iters": 12},
    },
    "few places, token": {
        "data": {"loss_mean": "token"}, "optimizer": PLAIN, "bilevel": {"alpha": 2.0},
        "train": {**NARROW, "train_iters": 4},
    },
    "longer memory": {
        "optimizer": {**PLAIN, "weight_decay": 0.1}, "whole_resets": 10,
        "bilevel": {"resync_interval": 2, "memory_growth": 0.6},
        "train": {**ROOMY, "train_iters": 27},
    },
    "lisa": {
        "weights": [1.0, 0.7, 1e-7],  # the last below what a source may fall to
        "optimizer": PLAIN, "lisa": {"lisa_layers": 1, "lisa_interval": 3}, "train": BATCH,
    },
    "lisa, never reset": {
        "optimizer": PLAIN, "lisa": {"lisa_layers": 1, "lisa_interval": 2},
        "bilevel": {"resync_interval": None}, "train": BATCH,
    },
}  # fmt: skip
TRAIN: dict[str, dict] = {
    "train": {
        "weights": [0.9, 0.1, 0.2], "model": BIASED, "optimizer": OPTIMIZER, "train": ROOMY,
    },
    "train, token": {
        "weights": [0.9, 0.1, 0.2], "data": {"loss_mean": "token"}, "optimizer": PLAIN,
        "train": {**ROOMY, "train_iters": 3},
    },
    "train, few places": {
        "weights": [1.0, 0.3, 0.1], "optimizer": PLAIN, "bilevel": {"floor_share": 0.5},
        "train": {**NARROW, "train_iters": 6},
    },
}  # fmt: skip


def on_one_rank(folder_name: str) -> None:
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.core import training
    from megatron_scalebio.methods.finetune import FinetuneState
    from megatron_scalebio.methods.scalebio import TrainState

    folder = Path(folder_name)

    for scenarios, make in ((REWEIGHT, TrainState), (TRAIN, FinetuneState)):
        for name, scenario in scenarios.items():
            training.WHOLE_RESETS = scenario.get("whole_resets", 40)
            config = load_config(None, tree_of(scenario, folder))
            runtime.start(config)
            state = make(config, folder / "cache")
            torch.save(recorded(state), folder / f"{name}.pt")
            state.training.leave_period()
            next_layout()
    (folder / "seeds.json").write_text(json.dumps([seeded(folder, seed) for seed in (4, 5)]))
    (folder / "learned.json").write_text(json.dumps(weights_and_epochs(folder)))
    (folder / "reset.json").write_text(json.dumps(reset_in_bf16(folder)))


def seeded(folder: Path, seed: int) -> dict:
    """What a seed decides: weights, layers, and which examples come when."""
    train, lisa = {**BATCH, "seed": seed}, {"lisa_layers": 1, "lisa_interval": 2}
    state = begun(folder, "reweight", train=train, lisa=lisa)
    thirds = torch.full((3,), 1 / 3, dtype=torch.float64)
    result = {
        "weights": state.training.w[0].embedding.word_embeddings.weight[0].tolist(),
        "layers": [],
    }
    samplers = (state.data.sampler, state.data.validation_sampler)
    result["seeds"] = [sampler.seed for sampler in samplers]
    result["examples"] = [sampler.next(thirds.numpy()).index_B.tolist() for sampler in samplers]
    for state.training.steps in (0, 2):
        state.training.enter_period()
        result["layers"].append(state.training.active_layers)
    ended(state)
    return result


def weights_and_epochs(folder: Path) -> list:
    """Of runs on the weights that another one learned: their mixture, steps and decay."""
    learned = {"a": 0.5, "b": 0.3, "c": 0.2}
    entries = [
        {"name": name, "path": name, "weight": learned[name], "initial_weight": 1 / 3}
        for name in "cab"
    ]
    (folder / "weights.json").write_text(json.dumps({"sources": entries}))
    train, data = (
        {**BATCH, "train_iters": 99, "train_epochs": 1.5},
        {"weights": str(folder / "weights.json")},
    )
    result = []
    for stage in ("reweight", "train"):
        state = begun(folder, stage, train=train, data=data)
        probs_S = state.probs_S if stage == "train" else state.training.mixture.probs_S
        last = state.schedule.at(state.config.train.train_iters - 1).lr_w
        result.append([probs_S.tolist(), state.config.train.train_iters, last])
        ended(state)
    return result


def reset_in_bf16(folder: Path) -> list[bool]:
    """Whether u differs from w before a reset and after it: weights, fp32 masters, moments."""
    state = begun(
        folder, "reweight", parallel={"bf16": True}, bilevel={"resync_interval": 2},
    )  # fmt: skip
    for _ in range(2):
        step_of(state)

    def differ() -> list[bool]:
        [w], [u] = (
            state.training.period.optimizers[name].chained_optimizers for name in ("w", "u")
        )
        of_w, of_u = ([p for g in x.optimizer.param_groups for p in g["params"]] for x in (w, u))
        moments = [
            [x.optimizer.state[p][key] for p in params]
            for key in ("exp_avg", "exp_avg_sq")
            for x, params in ((w, of_w), (u, of_u))
        ]
        models = (
            [p.data for p in state.training.models[name][0].parameters()] for name in ("w", "u")
        )
        pairs = [tuple(models), (of_w, of_u), tuple(moments[:2]), tuple(moments[2:])]
        return [any(not a.equal(b) for a, b in zip(*pair, strict=True)) for pair in pairs]

    before = differ()
    state.training.enter_period()
    result = [before, differ(), state.training.u_is_w]
    ended(state)
    return result


def recorded(state) -> dict:
    """Runs all steps: the weights at the start, then every batch, record and new weights."""
    draws: dict[str, list] = {"sampler": [], "validation_sampler": []}
    for name, drawn in draws.items():
        watch(getattr(state.data, name), drawn)
    start, steps = global_tensors(state.training.w, lambda p: p.data), []
    for _ in range(state.config.train.train_iters):
        record = state.make_step()
        weights = {
            name: global_tensors(chunks, lambda p: p.data)
            for name, chunks in state.training.models.items()
        }
        steps.append({"record": record, "layers": state.training.active_layers, **weights})
    content = {
        "start": start,
        "steps": steps,
        "draws": draws,
        "spikes": state.training.spikes.applied,
    }
    content |= {"trained": state.cost.trained, "step": state.step}
    if hasattr(state.training, "mixture"):
        content["tail"] = state.training.mixture.trajectory.tail(1.0)
    return content


def watch(sampler, drawn: list) -> None:
    """Has a sampler note what it is asked for and what it answers."""
    answer = sampler.next

    def noting(shares: np.ndarray):
        picks = answer(shares)
        picked = list(zip(picks.group_B.tolist(), picks.index_B.tolist(), strict=True))
        drawn.append({"shares": shares.tolist(), "picks": picked})
        return picks

    sampler.next = noting


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("naive-training")
    problem = write_problem(folder / "data")
    run_distributed(on_one_rank, 1, str(folder))
    return folder, problem


# Relative and absolute tolerances of differences of losses in fp32, and of what follows them.
LOOSER = {
    "excess_loss": (1e-3, 2e-6), "grad_norm_lambda": (1e-3, 2e-6), "weights": (2e-4, 1e-6),
}  # fmt: skip


@pytest.mark.parametrize("name", [*REWEIGHT, *TRAIN])
def test_steps_equal_their_definition(ran: tuple[Path, dict], name: str) -> None:
    folder, problem = ran
    scenario = {**REWEIGHT, **TRAIN}[name]
    got = torch.load(folder / f"{name}.pt", weights_only=True)
    kind = naive_loop.Training if name in TRAIN else naive_loop.Reweighting
    initial = scenario.get("weights", [1.0, 1.0, 1.0])
    naive = kind(tree_of(scenario, folder), got["start"], SHAPE, initial, SHARES)
    naive.whole_resets = scenario.get("whole_resets", 40)
    start = {key: value.double() for key, value in got["start"].items()}
    spikes: list[dict[str, float]] = []
    mixtures = []
    for number, step in enumerate(got["steps"]):
        draw = got["draws"]["sampler"][number]
        np.testing.assert_allclose(draw["shares"], naive.mixture.p, *LOOSER["weights"])
        assert len(draw["picks"]) == scenario["train"]["global_batch_size"]
        train, valid = examples(problem, "abc", draw), {}
        if name in REWEIGHT:
            draw = got["draws"]["validation_sampler"][number]
            np.testing.assert_allclose(draw["shares"], [0.6, 0.2, 0.2])
            places = scenario["train"].get("validation_batch_size", BATCH["global_batch_size"])
            assert len(draw["picks"]) == places
            valid = examples(problem, "vxy", draw)
        want = naive.step(train, valid, step["layers"])
        mixtures.append(naive.mixture.p)
        assert step["record"]["skipped"] is None
        assert step["record"]["active_layers"] == step["layers"]
        for field, value in want.items():
            np.testing.assert_allclose(
                step["record"][field], value, *LOOSER.get(field, (2e-5, 0.0)), err_msg=field
            )
        for model in {"w", "u"} & step.keys():
            for key, value in getattr(naive, model).weights.items():
                # Of the way gone so far: by far the weights are their start.
                away = relative(step[model][key] - start[key], value.detach() - start[key])
                assert away < 2e-4, (number, model, key, away)
        spikes.append(watched(want))
    for field, values in got["spikes"].items():
        want_values = [step[field] for step in spikes if field in step]
        np.testing.assert_allclose(values, want_values, rtol=1e-4, atol=1e-6, err_msg=field)
    assert (got["trained"], got["step"]) == (naive.tokens, len(got["steps"]))
    if "tail" in got:
        np.testing.assert_allclose(got["tail"], mixtures, *LOOSER["weights"])


def watched(record: dict) -> dict[str, float]:
    """What the spike guard looks at, from a record."""
    values = {"w: training loss": record["train_loss_w"], "w: gradient norm": record["grad_norm_w"]}
    if "train_loss_u" in record:
        values |= {
            "u: training loss": record["train_loss_u"],
            "w: validation loss": record["validation_loss"],
            "u: gradient norm": record["grad_norm_u"],
            "w and u: distance of their training losses": abs(
                record["train_loss_w"] - record["train_loss_u"]
            ),
        }
    return values


def test_the_seed_decides_weights_layers_and_examples(ran: tuple[Path, dict]) -> None:
    one, other = json.loads((ran[0] / "seeds.json").read_text())
    assert all(one[what] != other[what] for what in one), (one, other)
    assert one["seeds"] == [4, 5], "validation examples are not drawn as those of training"


def test_a_reset_takes_over_masters_and_moments_too(ran: tuple[Path, dict]) -> None:
    before, after, u_is_w = json.loads((ran[0] / "reset.json").read_text())
    assert before == [True] * 4 and after == [False] * 4 and u_is_w


def test_a_run_takes_over_learned_weights_and_counts_epochs(ran: tuple[Path, dict]) -> None:
    for weights, steps, last_rate in json.loads((ran[0] / "learned.json").read_text()):
        assert weights == pytest.approx([0.5, 0.3, 0.2])
        assert steps == 6, "27 examples, once and a half, eight a step"
        assert last_rate == pytest.approx(PLAIN["lr"] / 10)
