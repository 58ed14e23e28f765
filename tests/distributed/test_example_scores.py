"""The visits of single examples are what evaluating w and u before the step says, in any layout.

And a run that was stopped, killed or moved has the visits, and the scores, of one that never was.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from tests.commands import MODEL, command, note, noted
from tests.distributed.harness import next_layout, run_distributed
from tests.markov import VOCAB, draw, transition_matrices, write_problem, write_source

pytestmark = pytest.mark.distributed
STEPS, INTERVAL = 7, 3
CASES: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one": (1, {}),
    "packed": (1, {"train": {"packing": True, "micro_batch_size": 4}}),
    "token": (1, {"data": {"loss_mean": "token"}}),
    "dp2": (2, {}),
    "pp2": (2, {"parallel": {"pipeline_model_parallel_size": 2}}),
    "vpp": (
        2,
        {
            "parallel": {
                "pipeline_model_parallel_size": 2,
                "num_layers_per_virtual_pipeline_stage": 1,
            },
            "model": {"num_layers": 4},
        },
    ),
    "tp2": (2, {"parallel": {"tensor_model_parallel_size": 2}}),
    "cp2": (2, {"parallel": {"context_parallel_size": 2}}),
}


def tree_of(problem: tuple[list, list], output: Path, sections: dict) -> dict[str, dict[str, Any]]:
    sources, validation = problem
    tree: dict[str, dict[str, Any]] = {
        "data": {"seq_length": 16, "sources": sources, "validation": validation},
        "model": dict(MODEL),
        # An eps that rounding noise does not reach, as in test_exact_step.
        "optimizer": {"lr": 3e-3, "adam_eps": 1e-5, "lr_decay_style": "constant",
                      "lr_warmup_fraction": 0.0},
        "bilevel": {"resync_interval": INTERVAL, "level": "example"},
        "train": {"train_iters": STEPS, "micro_batch_size": 2, "global_batch_size": 8,
                  "output": str(output)},
        "parallel": {"distributed_timeout_minutes": 1},
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = {**tree[name], **section}
    return tree


def by_hand(state: Any) -> list[tuple[int, float]]:
    """The visits of the next step, from losses that are evaluated by themselves."""
    from megatron_scalebio.engine.evaluate import example_losses_of
    from megatron_scalebio.mixture.sampler import BlendSampler

    data, bio = state.data, state.training
    copy = BlendSampler(
        data.sampler.sizes_S.tolist(), 8, data.sampler.seed, data.sampler.floor_share
    )
    copy.load_state_dict(data.sampler.state_dict())
    picks = copy.next(bio.weights)
    start, visits, means = 0, [], []
    for number, source in enumerate(data.sources):
        index_N = picks.index_B[picks.group_B == number]
        u, w = example_losses_of([bio.u, bio.w], source, index_N, state.config, data.layout)
        gain_N = (u.mean_N - w.mean_N).tolist()
        visits += [(start + int(i), g) for i, g in zip(index_N, gain_N, strict=True)]
        means.append(bio.weights[number] * np.mean(gain_N))
        start += len(source)
    return [(row, gain - sum(means)) for row, gain in visits]


def on_ranks(folder: Path, problem: tuple[list, list], names: list[str]) -> None:
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.scalebio import TrainState

    for name in names:
        config = load_config(None, tree_of(problem, folder / name, CASES[name][1]))
        runtime.start(config)
        (folder / name).mkdir(exist_ok=True)
        state = TrainState(config, folder / "cache")
        wanted = []
        for step in range(STEPS):
            if step % INTERVAL:  # else u is reset to w
                wanted.append(by_hand(state))
            state.make_step()
        state.visits.flush()
        told = held_out_with_other_bits(state)
        state.training.leave_period()
        if dist.get_rank() == 0:
            (folder / f"{name}.json").write_text(json.dumps(wanted))
            (folder / f"{name}-held-out.json").write_text(json.dumps(told))
        next_layout()
    if dist.get_world_size() == 1:
        find_noise(folder)
        runs(folder, problem)


def held_out_with_other_bits(state: Any) -> list[list[float]]:
    """What each rank is told of a set, if the last rank computes other last bits."""
    from megatron_scalebio.engine import evaluate

    real, rank = evaluate.example_losses, dist.get_rank()

    def example_losses(*given: Any) -> Any:
        found = real(*given)
        found.sum_N.mul_(1 + 1e-12 * rank)
        return found

    evaluate.example_losses = example_losses
    data = state.data
    [loss] = evaluate.held_out_losses(state.training.w, data.validation, state.config, data.layout)
    evaluate.example_losses = real
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, [loss.sample_mean, loss.token_mean])
    return told


def find_noise(folder: Path) -> None:
    """Scores the examples of three sources; a fifth of the first is random tokens."""
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.scalebio import TrainState

    chains, rng, entries = transition_matrices(3, 0), np.random.default_rng(1), []
    noisy_N = rng.random(400) < 0.2
    for number in range(3):
        rows = draw(chains, np.full(400, number), 17, (0, 8, number))
        if number == 0:
            rows[noisy_N] = rng.integers(VOCAB, size=(int(noisy_N.sum()), 17))
        path = write_source(folder / "noise", f"s{number}", list(rows))
        entries.append({"name": f"s{number}", "path": path})
    rows = draw(chains, np.repeat([0, 1], [1200, 800]), 17, (0, 9))
    path = write_source(folder / "noise", "validation", list(rows))
    sections: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
        "optimizer": {"lr": 1e-2, "lr_decay_style": "cosine"},
        "bilevel": {"resync_interval": 40},
        "train": {"train_iters": 250, "micro_batch_size": 32, "global_batch_size": 32},
    }
    problem = entries, [{"name": "validation", "path": path}]
    config = load_config(None, tree_of(problem, folder / "noise", sections))
    runtime.start(config)
    state = TrainState(config, folder / "noise cache")
    for _ in range(250):
        state.make_step()
    state.visits.write_scores(folder / "noise")
    np.save(folder / "noisy.npy", noisy_N)
    state.training.leave_period()
    next_layout()


def runs(folder: Path, problem: tuple[list, list]) -> None:
    """One that is never stopped; one that is killed and goes on; one that goes on elsewhere."""
    from megatron_scalebio.methods.example_scores import VISITS_FILE

    def run(name: str, output: str, *flags: object) -> None:
        note(folder, name, command("reweight", "--config", config, "--output", folder / output,
                                   *flags))  # fmt: skip

    config = folder / "run.json"
    config.write_text(json.dumps(tree_of(problem, folder / "run", {})))
    run("whole", "whole", "--train-iters", 11)
    run("first", "killed", "--train-iters", 5)
    shutil.copytree(folder / "killed", folder / "moved")
    visits = folder / "killed" / VISITS_FILE
    visits.write_bytes(visits.read_bytes() + b"visits behind the last checkpoint")
    run("killed", "killed", "--train-iters", 11)
    (folder / "moved" / VISITS_FILE).unlink()
    run("loaded", "elsewhere", "--train-iters", 11, "--load", folder / "moved" / "checkpoints")
    shutil.copytree(folder / "whole", folder / "lost")
    for gone in ("lost", "whole"):
        (folder / gone / VISITS_FILE).rename(folder / gone / "away")
    run("lost", "lost", "--train-iters", 12)
    run("rival", "rival", "--method", "doge")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example scores")
    problem = write_problem(
        folder / "data", [0.6, 0.4], 0, length=17, examples=20, validation=40, even=False
    )
    for ranks in (1, 2):
        names = [name for name, case in CASES.items() if case[0] == ranks]
        run_distributed(on_ranks, ranks, folder, problem, names)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_visits_are_what_evaluation_says(results: Path, name: str) -> None:
    from megatron_scalebio.methods.example_scores import VISIT, VISITS_FILE

    wanted = [
        visit for step in json.loads((results / f"{name}.json").read_text()) for visit in step
    ]
    found = np.fromfile(results / name / VISITS_FILE, VISIT)
    assert sorted(found["row"].tolist()) == sorted(row for row, _ in wanted)
    assert found["row"].tolist() == [row for row, _ in wanted]
    np.testing.assert_allclose(found["gain"], [gain for _, gain in wanted], atol=2e-6)
    assert np.abs(found["gain"]).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_are_told_the_first_ones_losses(results: Path, name: str) -> None:
    """Which decide what is saved: last bits may differ between processors."""
    first, *others = json.loads((results / f"{name}-held-out.json").read_text())
    assert all(other == first for other in others) and first[0] > 0


@pytest.mark.parametrize("name", ["killed", "elsewhere"])
def test_a_run_that_goes_on_ends_in_the_same_scores(results: Path, name: str) -> None:
    for run in ("whole", "first", "killed", "loaded"):
        assert noted(results, run)[0] == 0, noted(results, run)[1]
    whole, other = (dict(np.load(results / n / "example_weights.npz")) for n in ("whole", name))
    assert whole.keys() == other.keys()
    for field, values in whole.items():
        np.testing.assert_array_equal(values, other[field], field)
    weights = json.loads((results / name / "weights.json").read_text())
    assert weights["example_scores"]["visits"] == 7 * 8, "all but those where u was w"
    assert "40 examples scored in 56 visits" in (results / name / "report.html").read_text()


def test_lost_visits_and_methods_without_any_are_refused(results: Path) -> None:
    code, said = noted(results, "lost")
    assert code == 2 and "example_visits.bin: lacks visits" in said
    code, said = noted(results, "rival")
    assert code == 2 and "bilevel.level: doge does not score single examples" in said


def test_noise_in_a_source_is_found_and_the_rest_of_it_kept(results: Path) -> None:
    noisy_N = np.load(results / "noisy.npy")
    score_N = np.load(results / "noise" / "example_weights.npz")["score"][:400]
    clean, noisy = score_N[~noisy_N], score_N[noisy_N]
    above = (clean[:, None] > noisy).mean()  # the area under the ROC curve
    assert above > 0.9
    kept_N = score_N >= np.quantile(score_N, 0.2)
    assert kept_N[~noisy_N].mean() > 0.9 and kept_N[noisy_N].mean() < 0.35
