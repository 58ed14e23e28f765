"""DoReMi, DoGE and RegMix as commands: right answers, layouts, resume, mistakes."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.commands import command, metrics, note, noted, the_only_line, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_problem

pytestmark = pytest.mark.distributed

TP2, PP2 = ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]
VPP = ["--num-layers", 4, *PP2, "--num-layers-per-virtual-pipeline-stage", 1]
SHORT, DOREMI = ["--train-iters", 4], ["--train-iters", 6, "--reference-iters", 4]
# Whole micro-batches of each of three sources, and as many of them as a multiple of two stages.
EVEN = ["--micro-batch-size", 1, "--global-batch-size", 12, "--validation-batch-size", 8]
# name: (ranks, method, flags)
RUNS: dict[str, tuple[int, str, list]] = {
    "doge": (1, "doge", ["--train-iters", 40, "--domain-lr", 2.5]),
    "regmix": (1, "regmix", ["--train-iters", 40]),
    "regmix-short": (1, "regmix", ["--proxies", 4, "--proxy-iters", 3]),
    "regmix-epochs": (
        1, "regmix", ["--train-epochs", 0.1, "--proxies", 4, "--proxy-iters", 3],
    ),
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
SAME = [
    ("doge-one", "doge-tp2"), ("doge-one", "doge-pp2"), ("doge-one", "doge-dp2"),
    ("doge-one-deeper", "doge-vpp"), ("doremi", "doremi-pp2"), ("doremi", "doremi-dp2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighting")
    sources, validation = write_problem(
        folder / "data", [0.6, 0.4, 0.0], 0, length=17, examples=200, validation=60
    )
    write_config(
        folder / "x.yaml", sources, validation,
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
        shutil.copytree(folder / "regmix-short", folder / "regmix-longer")
        mistakes = {
            "regmix-few": ("regmix", ["--proxies", 3]),
            "regmix-longer": ("regmix", ["--proxies", 4, "--proxy-iters", 4]),
            "doge-one": ("doremi", SHORT),
        }
        for name, (method, flags) in mistakes.items():
            run(folder, name, method, flags, f"mistake-{name}")


def run(folder: Path, output: str, method: str, flags: list, noted_as: str = "") -> None:
    words = ["--config", folder / "x.yaml", "--output", folder / output, "--method", method]
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


def weights(run: Path) -> dict:
    return json.loads((run / "weights.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_ends_in_whole_weights(runs: Path, name: str) -> None:
    code, said = noted(runs / "noted", name)
    assert code == 0, said
    found = weights(runs / name)
    assert found["complete"] and (runs / name / "report.html").is_file()
    shares = [entry["weight"] for entry in found["sources"]]
    assert sum(shares) == pytest.approx(1.0) and min(shares) >= 0


def test_doge_finds_the_useful_sources(runs: Path) -> None:
    first, second, junk = (entry["weight"] for entry in weights(runs / "doge")["sources"])
    assert junk < 0.2 < min(first, second)


def test_regmix_leaves_the_useless_source_out(runs: Path) -> None:
    """How it shares between the useful ones is beyond 15 trainings of 8 steps."""
    *_, junk = (entry["weight"] for entry in weights(runs / "regmix")["sources"])
    assert junk < 0.1


def test_regmix_says_when_its_regression_explains_nothing(runs: Path) -> None:
    """Four proxies of three steps hardly differ; forty steps' worth of them tell the junk apart."""
    assert "raise proxy_iters or proxies" in weights(runs / "regmix-short")["reason"]
    assert weights(runs / "regmix")["reason"] == "regmix gives no intervals"


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
     ("regmix-stopped", 1, "regmix-short")],
)  # fmt: skip
def test_stopped_and_started_again_equals_undisturbed(
    runs: Path, stopped: str, times: int, whole: str
) -> None:
    for number in range(times):
        code, said = noted(runs / "noted", f"{stopped}-{number}")
        assert code == 3 and "the same command goes on" in said, said
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
        "doge-one": "holds a run of `doge`, which doremi can't go on with",
    }.items():
        code, said = noted(runs / "noted", f"mistake-{name}")
        assert code == 2 and words in the_only_line(said), said
