"""DoReMi, DoGE, RegMix, olmix and CLIMB as commands: right answers, layouts, resume, mistakes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megatron_scalebio.methods.mixture_regression import draw_mixture
from tests.commands import command, metrics, note, noted, the_only_line, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_problem
from tests.methods.naive_regmix import least_error, naive_proxy
from tests.methods.test_log_linear import simplex

pytestmark = pytest.mark.distributed

TP2, PP2 = ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]
VPP = ["--num-layers", 4, *PP2, "--num-layers-per-virtual-pipeline-stage", 1]
SHORT, DOREMI = ["--train-iters", 4], ["--train-iters", 6, "--reference-iters", 4]
PROXIES = ["--proxies", 4, "--proxy-iters", 3, "--eval-examples", 15]
# Whole micro-batches of each of three sources, and as many of them as a multiple of two stages.
EVEN = ["--micro-batch-size", 1, "--global-batch-size", 12, "--validation-batch-size", 8]
# name: (ranks, method, flags)
RUNS: dict[str, tuple[int, str, list]] = {
    "doge": (1, "doge", ["--train-iters", 40, "--domain-lr", 2.5]),
    "regmix": (1, "regmix", ["--train-iters", 40]),
    "regmix-short": (1, "regmix", PROXIES),
    "olmix": (1, "olmix", [*PROXIES, "--kl-to-prior", 1e-3]),
    "climb": (1, "climb", ["--proxies", 5, "--proxy-iters", 2, "--eval-examples", 15]),
    "regmix-epochs": (1, "regmix", ["--train-epochs", 0.1, *PROXIES]),
    "doremi-epochs": (1, "doremi", ["--train-epochs", 0.08, "--reference-iters", 4]),
    "doremi": (1, "doremi", DOREMI),
    "doremi-few-places": (
        1, "doremi", [*SHORT, "--micro-batch-size", 1, "--global-batch-size", 2],
    ),
    "doge-one": (1, "doge", SHORT),
    "doge-one-deeper": (1, "doge", [*SHORT, *EVEN, "--num-layers", 4]),
    "doge-tp2": (2, "doge", [*SHORT, *TP2, "--sequence-parallel"]),
    "doge-pp2": (2, "doge", [*SHORT, *PP2]),
    "doge-vpp": (2, "doge", [*SHORT, *EVEN, *VPP]),
    "doge-dp2": (2, "doge", [*SHORT, "--use-distributed-optimizer", "--micro-batch-size", 1]),
    "doremi-pp2": (2, "doremi", [*DOREMI, *PP2]),
    "doremi-dp2": (2, "doremi", [*DOREMI, "--use-distributed-optimizer"]),
}  # fmt: skip
FIXED = {"uniform": [1, 1, 1], "natural": [5, 3, 2], "manual": [1, 3, 6]}
SIZES, GIVEN = (300, 180, 120), (1.0, 3.0, 6.0)  # where weights are given, most is junk's
SAME = [
    ("doge-one", "doge-tp2"), ("doge-one", "doge-pp2"), ("doge-one", "doge-dp2"),
    ("doge-one-deeper", "doge-vpp"), ("doremi", "doremi-pp2"), ("doremi", "doremi-dp2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighting")
    sources, [first] = write_problem(
        folder / "data", [0.7, 0.3, 0.0], 0, length=17, examples=SIZES, validation=40
    )
    _, [second] = write_problem(
        folder / "more", [0.3, 0.7, 0.0], 0, length=17, examples=1, validation=20
    )
    validation = [{**first, "weight": 3.0}, {**second, "name": "second", "weight": 1.0}]
    given = [{**s, "initial_weight": w} for s, w in zip(sources, GIVEN, strict=True)]
    for name, entries in (("x", sources), ("given", given)):
        write_config(
            folder / f"{name}.yaml", entries, validation,
            optimizer={"lr": 5e-3, "adam_eps": 1e-5}, checkpoint={"save_interval": 0},
        )  # fmt: skip
    for ranks in (1, 2):
        run_distributed(on_ranks, ranks, str(folder))
    return folder


def on_ranks(folder_name: str) -> None:
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    for name, (ranks, method, flags) in RUNS.items():
        if ranks == dist.get_world_size():
            run(folder, name, method, flags)
    if dist.get_world_size() == 1:
        stop_and_go_on(folder, "doge-stopped", "doge-one", [("", 2)])
        stop_and_go_on(folder, "doremi-stopped", "doremi", [("reference", 2), ("", 3)])
        stop_and_go_on(folder, "regmix-stopped", "regmix-short", [("", 5)])
        stop_and_go_on(folder, "climb-stopped", "climb", [("", 7)])
        stop_and_go_on(folder, "doremi-few-stopped", "doremi-few-places", [("", 2)])
        for name in ("regmix-longer", "regmix-seed"):
            shutil.copytree(folder / "regmix-short", folder / name)
        mistakes = {
            "regmix-few": ("regmix", ["--proxies", 3]),
            "regmix-longer": ("regmix", ["--proxies", 4, "--proxy-iters", 4]),
            "regmix-seed": ("regmix", [*PROXIES, "--seed", 7]),
            "olmix-caps": ("olmix", [*PROXIES, "--target-examples", 10**6]),
            "doge-one": ("doremi", SHORT),
            "manual-none": ("manual", []),
        }
        for name, (method, flags) in mistakes.items():
            run(folder, name, method, flags, f"mistake-{name}")
        for method in FIXED:
            run(folder, method, method, [])
        for method, options in (("olmix", ["--kl-to-prior", 1e-3]), ("regmix", [])):
            run(folder, f"{method}-fed", method, ["--swarm", folder / "olmix", *options])
        told_losses(folder)
        (folder / "naive.json").write_text(json.dumps(naive_proxy(folder, 1)))


def run(folder: Path, output: str, method: str, flags: list, noted_as: str = "") -> None:
    given = output == "manual" or output.startswith(("doremi-few", "regmix-"))
    config = folder / ("given.yaml" if given else "x.yaml")
    words = ["--config", config, "--output", folder / output, "--method", method]
    note(folder / "noted", noted_as or output, command("reweight", *words, *flags))


def stop_and_go_on(folder: Path, output: str, like: str, stops: list[tuple[str, int]]) -> None:
    """Signals a run after some steps of its parts, and starts it again each time."""
    _, method, flags = RUNS[like]
    for number, (part, steps) in enumerate(stops):
        sender = threading.Thread(target=send_at, args=(folder / output / part, steps))
        sender.start()
        run(folder, output, method, flags, f"{output}-{number}")
        sender.join()
    run(folder, output, method, flags)


def send_at(run: Path, steps: int) -> None:
    log, deadline = run / "metrics.jsonl", time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < steps:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGTERM)


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


def weights(run: Path) -> dict:
    return json.loads((run / "weights.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_ends_in_whole_weights(runs: Path, name: str) -> None:
    code, said = noted(runs / "noted", name)
    assert code == 0, said
    found = weights(runs / name)
    assert found["complete"] and (runs / name / "report.html").is_file()
    assert found["method"] == RUNS[name][1] and found["converged"] is False
    steps = found["step"] * len(found.get("proxies", [0]))
    assert metrics(runs / name)[-1]["step"] == steps > 0
    shares = [entry["weight"] for entry in found["sources"]]
    assert sum(shares) == pytest.approx(1.0) and min(shares) >= 0


def test_doge_finds_the_useful_sources(runs: Path) -> None:
    first, second, junk = (entry["weight"] for entry in weights(runs / "doge")["sources"])
    assert junk < 0.2 < min(first, second)


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


def test_blends_keep_the_weights_of_the_validation_sets(runs: Path) -> None:
    blend = json.loads((runs / "doge" / "blend.json").read_text())
    first, one, second, other = blend["valid"]
    assert float(first) == 3 * float(second) > 0
    assert one == str(runs / "data" / "validation" / "tokens")
    assert other == str(runs / "more" / "validation" / "tokens")
    assert blend["test"] is None, "no test set was given"


@pytest.mark.parametrize(("name", "counts"), FIXED.items())
def test_mixtures_that_nothing_is_learned_for(runs: Path, name: str, counts: list) -> None:
    code, said = noted(runs / "noted", name)
    assert code == 0, said
    for key in ("weight", "initial_weight"):
        got = [entry[key] for entry in weights(runs / name)["sources"]]
        assert got == pytest.approx([count / sum(counts) for count in counts])
    assert weights(runs / name)["cost"] == {"trained_tokens": 0, "scored_tokens": 0}


@pytest.mark.parametrize(
    ("name", "prior", "places"),
    [("doremi", SIZES, None), ("doremi-few-places", GIVEN, 2)],
    ids=["natural", "given"],
)
def test_doremi_s_reference_learns_what_one_would_train_on_otherwise(
    runs: Path, name: str, prior: tuple, places: int | None
) -> None:
    """Σ p_i ℓ_i over the sources in a batch, each by the chance of being there (Hájek 1971)."""
    share = np.array(prior) / sum(prior)
    chance = np.ones(3) if places is None else places * (0.75 * share + 0.25 / 3)
    standing = share / chance.clip(max=1)
    for record in metrics(runs / name / "reference"):
        there = [(p, loss) for p, loss in zip(standing, record["loss_w"], strict=True) if loss]
        want = sum(p * loss for p, loss in there) / sum(p for p, _ in there)
        assert record["train_loss_w"] == pytest.approx(want)
    assert len(metrics(runs / name / "reference")) == 4
    # The proxy begins where the reference began, so there is something to learn from it.
    first = metrics(runs / "doremi")[0]["excess_loss"]
    assert min(first) > 0.01


@pytest.mark.parametrize(
    ("name", "rate"), [("doge", 2.5), ("doge-one", 1.0), ("doremi", None), ("doremi-dp2", None)]
)
def test_weights_follow_from_the_scores_told(runs: Path, name: str, rate: float | None) -> None:
    """α ∝ α exp(η W) from uniform; DoGE's η falls with the learning rate, DoReMi smooths."""
    weight = np.full(3, 1 / 3)
    for record in metrics(runs / name):
        if rate is None:
            weight = weight * np.exp(record["excess_loss"])
            weight = 0.999 * weight / weight.sum() + 0.001 / 3
        else:
            weight = weight * np.exp(rate * record["lr_w"] / 5e-3 * np.array(record["alignment"]))
            weight = weight / weight.sum()
        assert record["weights"] == pytest.approx(weight, rel=1e-6), "of numbers told to 9 places"
    initial = [entry["initial_weight"] for entry in weights(runs / name)["sources"]]
    assert initial == pytest.approx([1 / 3] * 3)
    assert abs(weight - 1 / 3).max() > 0.001


@pytest.mark.parametrize(("one", "other"), SAME)
def test_does_not_depend_on_the_layout(runs: Path, one: str, other: str) -> None:
    for a, b in zip(metrics(runs / one), metrics(runs / other), strict=True):
        for field in {"weights", "alignment", "excess_loss", "loss_w", "grad_norm_w"} & a.keys():
            assert b[field] == pytest.approx(a[field], rel=1e-3, abs=1e-5), (a["step"], field)


@pytest.mark.parametrize("name", ["doge", "doremi"])
def test_weights_are_the_average_of_all_steps(runs: Path, name: str) -> None:
    trajectory = [record["weights"] for record in metrics(runs / name)]
    mean = [sum(column) / len(trajectory) for column in zip(*trajectory, strict=True)]
    content = weights(runs / name)
    assert [entry["weight"] for entry in content["sources"]] == pytest.approx(mean)
    assert content["last_weights"] == pytest.approx(trajectory[-1])


@pytest.mark.parametrize(
    ("stopped", "times", "whole"),
    [("doge-stopped", 1, "doge-one"), ("doremi-stopped", 2, "doremi"),
     ("doremi-few-stopped", 1, "doremi-few-places"), ("regmix-stopped", 1, "regmix-short"),
     ("climb-stopped", 1, "climb")],
)  # fmt: skip
def test_stopped_and_started_again_equals_undisturbed(
    runs: Path, stopped: str, times: int, whole: str
) -> None:
    for number in range(times):
        code, said = noted(runs / "noted", f"{stopped}-{number}")
        assert code == 3 and "the same command continues" in said, said
    code, said = noted(runs / "noted", stopped)
    assert code == 0 and "from step" in said, said
    assert weights(runs / stopped) == weights(runs / whole)
    assert metrics(runs / stopped) == metrics(runs / whole)


def test_cost_counts_what_went_through_models(runs: Path) -> None:
    """Sequences of 16 tokens; 8 a step of training, 6 a step of DoGE's sources and 8 for L1."""
    assert weights(runs / "doge-one")["cost"] == {"trained_tokens": 4 * 14 * 16, "scored_tokens": 0}
    assert weights(runs / "doremi")["cost"] == {
        "trained_tokens": (4 + 6) * 8 * 16,
        "scored_tokens": 6 * 2 * 8 * 16,
    }
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
    """0.08 epochs of 600 examples are 6 steps of 8."""
    for epochs, iters in (("regmix-epochs", "regmix-short"), ("doremi-epochs", "doremi")):
        assert weights(runs / epochs) == weights(runs / iters)
        assert metrics(runs / epochs) == metrics(runs / iters)


def test_a_source_out_of_the_batch_keeps_its_score(runs: Path) -> None:
    records = metrics(runs / "doremi-few-places")
    kept = 0
    for before, after in itertools.pairwise(records):
        for i, loss in enumerate(after["loss_w"]):
            if loss is None:
                assert after["excess_loss"][i] == before["excess_loss"][i]
                kept += 1
    assert kept >= len(records) - 1


def test_mistakes_cost_one_line(runs: Path) -> None:
    for name, words in {
        "regmix-few": "baseline.proxies: 3 can't tell 3 sources apart",
        "regmix-longer": "holds proxies of other sources, steps, seed",
        "regmix-seed": "holds proxies of other sources, steps, seed",
        "olmix-caps": "4 passes over all sources are 2.4 k examples, the final training draws",
        "doge-one": "holds a run of `doge`, which doremi can't continue with",
        "manual-none": "baseline.method: manual needs weights",
    }.items():
        code, said = noted(runs / "noted", f"mistake-{name}")
        assert code == 2 and words in the_only_line(said), said
    assert not (runs / "olmix-caps" / "proxies.json").exists(), "found before anything is trained"
