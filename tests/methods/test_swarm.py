"""RegMix, olmix and CLIMB as commands: their swarms, what comes of them, resume, mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron_scalebio.methods.mixture_regression import draw_mixture
from tests.commands import metrics, noted, the_only_line
from tests.distributed.harness import run_distributed
from tests.methods.method_runs import (
    GIVEN,
    SIZES,
    Runs,
    require_as_undisturbed,
    require_whole,
    run,
    stop_and_go_on,
    weights,
    write_configs,
)
from tests.methods.naive_regmix import least_error, naive_proxy
from tests.methods.test_log_linear import simplex

pytestmark = pytest.mark.distributed

PROXIES = ["--proxies", 4, "--proxy-iters", 3, "--eval-examples", 15]
RUNS: Runs = {
    "regmix": (1, "regmix", ["--train-iters", 40]),
    "regmix-short": (1, "regmix", PROXIES),
    "olmix": (1, "olmix", [*PROXIES, "--kl-to-prior", 1e-3]),
    "climb": (1, "climb", ["--proxies", 5, "--proxy-iters", 2, "--eval-examples", 15]),
    "regmix-epochs": (1, "regmix", ["--train-epochs", 0.1, *PROXIES]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swarm")
    write_configs(folder)
    run_distributed(on_a_rank, 1, str(folder))
    return folder


def on_a_rank(folder_name: str) -> None:
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    for name, (_, method, flags) in RUNS.items():
        run(folder, name, method, flags)
    stop_and_go_on(folder, RUNS, "regmix-stopped", "regmix-short", [("", 5)])
    stop_and_go_on(folder, RUNS, "climb-stopped", "climb", [("", 7)])
    for name in ("regmix-longer", "regmix-seed"):
        shutil.copytree(folder / "regmix-short", folder / name)
    mistakes = {
        "regmix-few": ("regmix", ["--proxies", 3]),
        "regmix-longer": ("regmix", ["--proxies", 4, "--proxy-iters", 4]),
        "regmix-seed": ("regmix", [*PROXIES, "--seed", 7]),
        "olmix-caps": ("olmix", [*PROXIES, "--target-examples", 10**6]),
    }
    for name, (method, flags) in mistakes.items():
        run(folder, name, method, flags, f"mistake-{name}")
    for method, options in (("olmix", ["--kl-to-prior", 1e-3]), ("regmix", [])):
        run(folder, f"{method}-fed", method, ["--swarm", folder / "olmix", *options])
    told_losses(folder)
    (folder / "naive.json").write_text(json.dumps(naive_proxy(folder, 1)))


def told_losses(folder: Path) -> None:
    """Has RegMix end a run whose proxies' losses are such that its regression errs a little."""
    shutil.copytree(folder / "regmix-short", folder / "regmix-told")
    path = folder / "regmix-told" / "proxies.json"
    content = json.loads(path.read_text())
    mixtures = np.array([proxy["weights"] for proxy in content["proxies"]])
    for seed in range(100):
        losses = 3 + mixtures @ [0.5, 0.0, 0.2] + np.random.default_rng(seed).normal(0, 0.1, 4)
        if 0.6 < least_error(mixtures, losses)[1] / losses.std() < 0.9:
            break
    for proxy, loss in zip(content["proxies"], losses, strict=True):
        proxy["losses"] = [float(loss)] * 2
    path.write_text(json.dumps(content))
    run(folder, "regmix-told", "regmix", PROXIES)


@pytest.mark.parametrize("name", RUNS)
def test_ends_in_whole_weights(runs: Path, name: str) -> None:
    require_whole(runs, name, RUNS[name][1])


def test_regmix_leaves_the_useless_source_out(runs: Path) -> None:
    """How it shares between the useful ones is beyond 15 trainings of 8 steps."""
    *_, junk = (entry["weight"] for entry in weights(runs / "regmix")["sources"])
    assert junk < 0.1


@pytest.mark.parametrize("name", ["regmix", "regmix-short", "regmix-told"])
def test_regmix_ends_in_the_best_mixture_of_its_regression(runs: Path, name: str) -> None:
    """Its proxies' losses put anew into a ridge, and mixtures drawn anew around the prior."""
    code, said = noted(runs / "noted", name)
    assert code == 0, said
    found = weights(runs / name)
    mixtures = np.array([proxy["weights"] for proxy in found["proxies"]])
    losses = np.array([proxy["loss"] for proxy in found["proxies"]])
    ridge, error = least_error(mixtures, losses)
    told = {"features": ridge.features, "left_out_error": pytest.approx(error, rel=1e-4)}
    assert found["regression"] == told
    prior = np.array(SIZES if name == "regmix" else GIVEN) / sum(
        SIZES if name == "regmix" else GIVEN
    )
    assert [e["initial_weight"] for e in found["sources"]] == pytest.approx(prior)
    want = [draw_mixture(prior, 1234, number) for number in range(len(mixtures))]
    np.testing.assert_allclose(mixtures, want, atol=1e-12)
    drawn = np.random.default_rng(0).dirichlet(prior, 100_000)
    best = drawn[np.argsort(ridge.predict(drawn, mixtures, losses))[:128]].mean(axis=0)
    assert [e["weight"] for e in found["sources"]] == pytest.approx(best, abs=0.03)
    remark = (
        f"; its regression misses a proxy left out by {error:.2g}, and they differ by "
        f"{losses.std():.2g}: raise proxy_iters or proxies"
    )
    assert found["reason"] == "regmix gives no intervals" + remark * int(error > losses.std() / 2)
    assert (name == "regmix") == (error < losses.std() / 2)


def test_olmix_ends_in_the_best_mixture_of_its_laws(runs: Path) -> None:
    """Of the laws of both validation sets, which count three to one, on a grid of mixtures."""
    found = weights(runs / "olmix")
    grid_NS = simplex(200)[1:-1]
    laws = found["regression"]["laws"]
    losses = [law["floor"] + np.exp(grid_NS @ law["slopes"]) for law in laws]
    prior = np.array(SIZES) / sum(SIZES)
    pull_N = 1e-3 * np.sum(grid_NS * np.log(np.maximum(grid_NS, 1e-9) / prior), axis=1)
    whole_N = 0.75 * losses[0] + 0.25 * losses[1] + pull_N
    got = np.array([entry["weight"] for entry in found["sources"]])
    assert np.abs(got - grid_NS[whole_N.argmin()]).max() < 0.006
    assert found["regression"]["kl_to_prior"] == 1e-3
    told = [proxy["weights"] for proxy in found["proxies"]]
    assert told == [draw_mixture(prior, 1234, number).tolist() for number in range(4)]


def test_climb_ends_in_the_candidate_that_its_regression_likes_best(runs: Path) -> None:
    found = weights(runs / "climb")
    prior = np.array(SIZES) / sum(SIZES)
    pool = np.stack([draw_mixture(prior, 1234, 5 + number) for number in range(5000)])
    mixtures = np.array([proxy["weights"] for proxy in found["proxies"]])
    losses = np.array([proxy["loss"] for proxy in found["proxies"]])
    ridge, _ = least_error(mixtures, losses)
    best = pool[ridge.predict(pool, mixtures, losses).argmin()]
    assert [entry["weight"] for entry in found["sources"]] == best.tolist()
    assert mixtures[:3].tolist() == [draw_mixture(prior, 1234, k).tolist() for k in range(3)]
    assert all(row in pool.tolist() for row in mixtures[3:].tolist())


def test_a_finished_swarm_feeds_both_regressions(runs: Path) -> None:
    """The tables of a run have all that its end came of but the validation sets' weights."""
    for method in ("olmix", "regmix"):
        code, said = noted(runs / "noted", f"{method}-fed")
        assert code == 0, said
        fed = weights(runs / f"{method}-fed")
        assert fed["cost"] == {"trained_tokens": 0, "scored_tokens": 0} and fed["step"] == 0
        mixtures = [proxy["weights"] for proxy in weights(runs / "olmix")["proxies"]]
        assert [proxy["weights"] for proxy in fed["proxies"]] == mixtures
        trained = json.loads((runs / "olmix" / "proxies.json").read_text())["proxies"]
        means = [sum(proxy["losses"]) / 2 for proxy in trained]
        assert [proxy["loss"] for proxy in fed["proxies"]] == pytest.approx(means)
    laws = [weights(runs / name)["regression"]["laws"] for name in ("olmix", "olmix-fed")]
    assert laws[0] == laws[1]


def test_every_proxy_begins_anew_and_is_judged_by_all_validation_sets(runs: Path) -> None:
    first, second = json.loads((runs / "naive.json").read_text())
    found = weights(runs / "regmix-short")["proxies"][1]["loss"]
    assert found == pytest.approx((3 * first + second) / 4, rel=1e-5)
    assert abs(first - second) > 0.001


@pytest.mark.parametrize(
    ("stopped", "whole"), [("regmix-stopped", "regmix-short"), ("climb-stopped", "climb")]
)
def test_stopped_and_started_again_equals_undisturbed(runs: Path, stopped: str, whole: str) -> None:
    require_as_undisturbed(runs, stopped, 1, whole)


def test_cost_counts_what_went_through_models(runs: Path) -> None:
    """Sequences of 16 tokens, 8 a step of training."""
    # 15 proxies of 8 steps: as much as 40 steps with three batches each
    assert len(weights(runs / "regmix")["proxies"]) == 15
    assert weights(runs / "regmix")["cost"] == {
        "trained_tokens": 40 * 3 * 8 * 16,
        "scored_tokens": 15 * 60 * 16,
    }
    assert weights(runs / "regmix-short")["cost"] == {
        "trained_tokens": 4 * 3 * 8 * 16,
        "scored_tokens": 4 * (15 + 15) * 16,
    }


def test_epochs_are_of_the_run_and_not_of_its_parts(runs: Path) -> None:
    assert weights(runs / "regmix-epochs") == weights(runs / "regmix-short")
    assert metrics(runs / "regmix-epochs") == metrics(runs / "regmix-short")


def test_mistakes_cost_one_line(runs: Path) -> None:
    for name, words in {
        "regmix-few": "baseline.proxies: 3 can't tell 3 sources apart",
        "regmix-longer": "holds proxies of other sources, steps, seed",
        "regmix-seed": "holds proxies of other sources, steps, seed",
        "olmix-caps": "4 passes over all sources are 2.4 k examples, but the final training needs",
    }.items():
        code, said = noted(runs / "noted", f"mistake-{name}")
        assert code == 2 and words in the_only_line(said), said
    assert not (runs / "olmix-caps" / "proxies.json").exists(), "found before anything is trained"
