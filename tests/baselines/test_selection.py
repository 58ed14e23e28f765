"""LESS and RHO-LOSS against brute force, under other layouts, stopped and gone on with."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.commands import command, metrics, note, noted, the_only_line, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_problem

pytestmark = pytest.mark.distributed
EXAMPLES = 50
LESS = ["--method", "less", "--less-checkpoints", 2, "--less-warmup-fraction", 0.6,
        "--select-fraction", 0.2]  # fmt: skip
EXACT, SKETCH = ["--less-dimensions", 10**6], ["--less-dimensions", 2048]
ONLINE = ["--method", "rho_loss", "--rho-batch-share", 0.2]
OFFLINE = ["--method", "rho_loss", "--no-rho-online", "--select-fraction", 0.2]
TP2, PP2 = ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]
RUNS: dict[str, tuple[int, list]] = {
    "less-exact": (1, [*LESS, *EXACT]),
    "less": (1, [*LESS, *SKETCH]),
    "online": (1, ONLINE),
    "offline": (1, OFFLINE),
    "less-exact-tp2": (2, [*LESS, *EXACT, *TP2]),
    "less-pp2": (2, [*LESS, *SKETCH, *PP2]),
    "less-dp2": (2, [*LESS, *SKETCH, "--use-distributed-optimizer"]),
    "online-dp2": (2, ONLINE),
    "offline-pp2": (2, [*OFFLINE, *PP2]),
}  # fmt: skip
SAME = [
    ("less-exact", "less-exact-tp2"), ("less", "less-pp2"), ("less", "less-dp2"),
    ("online", "online-dp2"), ("offline", "offline-pp2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selection")
    sources, validation = write_problem(
        folder / "data", [0.6, 0.4, 0.0], 0, length=17, examples=EXAMPLES, validation=60
    )
    write_config(
        folder / "x.yaml", sources, validation,
        train={"train_iters": 24, "micro_batch_size": 4}, optimizer={"lr": 5e-3, "adam_eps": 1e-5},
        checkpoint={"save_interval": 5},
    )  # fmt: skip
    for ranks in (1, 2):
        run_distributed(on_ranks, ranks, str(folder))
    return folder


def on_ranks(folder_name: str) -> None:
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    for name, (ranks, flags) in RUNS.items():
        if ranks == dist.get_world_size():
            run(folder, name, flags)
    if dist.get_world_size() == 1:
        stopped_and_gone_on(folder)
        mistakes(folder)
        torch.save(naive_less(folder), folder / "naive-less.pt")
        torch.save(naive_rho(folder), folder / "naive-rho.pt")
    else:
        run(folder, "cp", [*LESS, "--context-parallel-size", 2])


def run(folder: Path, output: str, flags: list, noted_as: str | None = None) -> None:
    words = ["reweight", "--config", folder / "x.yaml", "--output", folder / output, *flags]
    note(folder / "noted", noted_as or output, command(*words))


def signalled(folder: Path, output: str, flags: list, noted_as: str, when: Callable) -> None:
    """Runs until a condition on the output folder holds, then gets SIGTERM."""

    def send() -> None:
        deadline = time.monotonic() + 120
        while not when(folder / output) and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    run(folder, output, flags, noted_as)
    sender.join()


def steps_in(part: str, steps: int) -> Callable[[Path], bool]:
    def logged(output: Path) -> bool:
        log = output / part / "metrics.jsonl"
        return log.is_file() and log.read_bytes().count(b"\n") >= steps

    return logged


def stopped_and_gone_on(folder: Path) -> None:
    flags = RUNS["online"][1]
    signalled(folder, "rho-again", flags, "rho-1", steps_in("reference", 3))
    signalled(folder, "rho-again", flags, "rho-2", steps_in("", 7))
    run(folder, "rho-again", flags, "rho-3")
    flags = RUNS["less"][1]
    signalled(folder, "less-again", flags, "less-1", steps_in("warmup", 3))
    first_chunk = Path("features", "checkpoint-1", "chunk-00000.npy")
    signalled(folder, "less-again", flags, "less-2", lambda o: (o / first_chunk).is_file())
    note(folder / "noted", "less-2-left", (len(list(folder.rglob("less-again/**/chunk-*"))), ""))
    run(folder, "less-again", flags, "less-3")


def mistakes(folder: Path) -> None:
    run(folder, "less", [*LESS, "--less-dimensions", 1024], "other-dimensions")
    run(folder, "less-lisa", [*LESS, "--lisa-layers", 1], "lisa")
    damaged = folder / "damaged"
    shutil.copytree(folder / "less", damaged)
    (damaged / "features" / "checkpoint-2" / "chunk-00001.npy").write_bytes(b"\x93NUMPY")
    run(folder, "damaged", RUNS["less"][1])
    run(folder, "no-share", ["--method", "less", "--select-fraction", 1.5])


def model_losses(model: Any, source: Any, index: int) -> torch.Tensor:
    """Mean cross-entropy of an example's target tokens, written out."""
    tokens, targets = (torch.from_numpy(x.astype("int64")) for x in source.example(index))
    logits = model(tokens[None, :-1], torch.arange(len(tokens) - 1)[None], None)[0]
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    return losses[targets[1:] > 0].mean()


def naive_less(folder: Path) -> dict[str, Any]:
    """LESS of some examples: autograd one by one, Adam written out, no projection."""
    from megatron_scalebio import runtime
    from megatron_scalebio.baselines import less
    from megatron_scalebio.baselines.pool_training import PoolState
    from megatron_scalebio.checkpoint import saver
    from megatron_scalebio.config_loader import load_config

    config = load_config(str(folder / "less-exact" / "config.yaml"))
    runtime.start(config)
    row_W, epoch_steps = less.warmup_plan(config, 3 * EXAMPLES)
    side = load_config(str(folder / "less-exact" / "warmup" / "config.yaml"))
    state = PoolState(side, folder / "cache", "less warm-up", row_W)
    [validation] = less.Data(config, folder / "cache").validation
    rates = less.epoch_rates(state.schedule, 2, epoch_steps)
    beta1, beta2, eps = (getattr(config.optimizer, f"adam_{k}") for k in ("beta1", "beta2", "eps"))
    rows = np.arange(0, 3 * EXAMPLES, 7)
    scores = np.zeros(len(rows))
    for number, rate in enumerate(rates, start=1):
        checkpoints = folder / "less-exact" / "warmup" / "checkpoints"
        saver.load_step(state, checkpoints, number * epoch_steps)
        [model] = state.w
        named = [(n, p) for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
        weights = [p for _, p in named]
        adam = state.period.optimizers["w"].chained_optimizers[0].optimizer.state
        gradients = [
            torch.autograd.grad(model_losses(model, validation, i), weights)
            for i in range(len(validation))
        ]
        mean = torch.cat([torch.stack(g).mean(0).flatten() for g in zip(*gradients, strict=True)])
        for place, row in enumerate(rows):
            update = []
            found = torch.autograd.grad(model_losses(model, state.pool, int(row)), weights)
            for weight, g in zip(weights, found, strict=True):
                held = adam[weight]
                assert int(held["step"]) == number * epoch_steps
                t = number * epoch_steps + 1
                m = (beta1 * held["exp_avg"] + (1 - beta1) * g) / (1 - beta1**t)
                v = (beta2 * held["exp_avg_sq"] + (1 - beta2) * g * g) / (1 - beta2**t)
                update.append((m / (v.sqrt() + eps)).flatten())
            cosine = torch.nn.functional.cosine_similarity(torch.cat(update), mean, dim=0)
            scores[place] += rate * float(cosine) / sum(rates)
        state.leave_period()
    runtime.stop_model_parallel()
    return {"rows": rows.tolist(), "scores": scores.tolist(), "names": [n for n, _ in named]}


def naive_rho(folder: Path) -> dict[str, Any]:
    """Irreducible losses one by one, and three online selections with the batches they are from."""
    from megatron_scalebio import runtime
    from megatron_scalebio.baselines.pool_training import PoolState, training_config
    from megatron_scalebio.baselines.rho_loss import RhoState, reference_config
    from megatron_scalebio.checkpoint import saver
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.train.finetune import train_step

    config = load_config(str(folder / "online" / "config.yaml"))
    runtime.start(config)
    cache = folder / "cache"
    reference = PoolState(reference_config(config, 60), cache, "rho_loss reference")
    saver.load_latest(reference, folder / "online" / "reference" / "checkpoints", required=True)
    state = RhoState(training_config(config, 24), cache, np.zeros(3 * EXAMPLES))
    with torch.no_grad():
        losses = [
            float(model_losses(reference.w[0], state.pool, row)) for row in range(3 * EXAMPLES)
        ]
    state.irreducible_N = np.array(losses)
    steps = []
    for _ in range(3):
        order = replace_order(state)
        large = order.next(40)
        with torch.no_grad():
            now = [float(model_losses(state.w[0], state.pool, int(row))) for row in large]
        before = state.chosen_N.copy()
        with locating_at_most(len(large)):  # nothing in a step may cost as much as the pool is long
            record = train_step(state)
        assert record["weights"] == state.pool.shares(state.chosen_N.astype(float))
        chosen = np.flatnonzero(state.chosen_N - before).tolist()
        steps.append({"large": large.tolist(), "losses": now, "chosen": chosen})
    state.leave_period()
    runtime.stop_model_parallel()
    return {"irreducible": losses, "steps": steps, "reference_steps": reference.step}


@contextlib.contextmanager
def locating_at_most(rows: int) -> Iterator[None]:
    from megatron_scalebio.baselines.pool import Pool

    locate = Pool.locate

    def limited(pool: Pool, row_N: np.ndarray) -> Any:
        assert len(row_N) <= rows
        return locate(pool, row_N)

    with unittest.mock.patch.object(Pool, "locate", limited):
        yield


def replace_order(state: Any) -> Any:
    """A copy of the order that the state draws from."""
    from megatron_scalebio.baselines.pool import EpochOrder

    order = EpochOrder(state.order.row_N, state.order.seed)
    order.position = state.order.position
    return order


def scores(run: Path) -> dict[str, np.ndarray]:
    with np.load(run / "scores.npz", allow_pickle=False) as content:
        return dict(content)


def chosen(run: Path) -> list[list[int]]:
    return [s["taken"] for s in json.loads((run / "selected.json").read_text())["sources"]]


def weights(run: Path) -> dict[str, Any]:
    return json.loads((run / "weights.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_ends_well_and_prefers_what_the_validation_set_is_made_of(runs: Path, name: str) -> None:
    code, said = noted(runs / "noted", name)
    assert code == 0, said
    share = {e["name"]: e["weight"] for e in weights(runs / name)["sources"]}
    assert sum(share.values()) == pytest.approx(1)
    assert share["s2"] < min(share["s0"], share["s1"])
    assert share["s2"] < 0.25


def test_the_choice_is_the_highest_scores_and_the_weights_are_its_shares(runs: Path) -> None:
    for name in ("less", "offline"):
        content, taken = scores(runs / name), chosen(runs / name)
        assert content["score"].dtype == np.float32 and content["score"].shape == (3 * EXAMPLES,)
        best = np.argsort(-content["score"], kind="stable")[:30]
        for source, rows in enumerate(taken):
            mine = best[content["source"][best] == source]
            assert sorted(content["index"][mine].tolist()) == rows
            assert weights(runs / name)["sources"][source]["weight"] == len(rows) / 30
    content, taken = scores(runs / "online"), chosen(runs / "online")
    assert content["chosen"].sum() == 24 * 8
    for source, rows in enumerate(taken):
        mine = content["source"] == source
        assert content["index"][mine & (content["chosen"] > 0)].tolist() == rows
        share = weights(runs / "online")["sources"][source]["weight"]
        assert share == pytest.approx(content["chosen"][mine].sum() / 192)


def test_less_equals_gradients_one_by_one_and_adam_written_out(runs: Path) -> None:
    naive = torch.load(runs / "naive-less.pt", weights_only=True)
    assert len(naive["names"]) == 2 * 4
    got = scores(runs / "less-exact")["score"][naive["rows"]]
    np.testing.assert_allclose(got, naive["scores"], atol=2e-4)
    assert np.std(naive["scores"]) > 0.02, "scores that differ by more than the tolerance"


def test_the_projection_keeps_the_scores(runs: Path) -> None:
    """A cosine of two vectors projected to d numbers is off by about 1/√d."""
    exact, got = (scores(runs / name)["score"] for name in ("less-exact", "less"))
    error = got - exact
    assert np.abs(error - error.mean()).max() < 5 / np.sqrt(2048)
    assert np.corrcoef(exact, got)[0, 1] > 0.8


def test_reducible_losses_equal_a_naive_evaluation(runs: Path) -> None:
    naive = torch.load(runs / "naive-rho.pt", weights_only=True)
    assert naive["reference_steps"] == 23, "three epochs of 60 examples in batches of 8"
    for name in ("online", "offline"):
        got = scores(runs / name)["irreducible"]
        np.testing.assert_allclose(got, naive["irreducible"], rtol=1e-5)


def test_online_trains_on_the_highest_reducible_losses_of_the_large_batch(runs: Path) -> None:
    naive = torch.load(runs / "naive-rho.pt", weights_only=True)
    irreducible = np.array(naive["irreducible"])
    for step in naive["steps"]:
        large = np.array(step["large"])
        assert len(set(step["large"])) == 40
        reducible = np.array(step["losses"]) - irreducible[large]
        assert step["chosen"] == sorted(large[np.argsort(-reducible)[:8]].tolist())


@pytest.mark.parametrize(("one", "other"), SAME)
def test_does_not_depend_on_the_layout(runs: Path, one: str, other: str) -> None:
    a, b = scores(runs / one), scores(runs / other)
    np.testing.assert_allclose(b["score"], a["score"], atol=2e-3)
    # Scores closer than rounding may change places.
    both = [set(enumerate_rows(chosen(runs / name))) for name in (one, other)]
    assert len(both[0] & both[1]) >= 0.98 * len(both[0])
    cost = [weights(runs / name)["cost"]["trained_tokens"] for name in (one, other)]
    assert cost[0] == cost[1]


def enumerate_rows(taken: list[list[int]]) -> list[tuple[int, int]]:
    return [(source, row) for source, rows in enumerate(taken) for row in rows]


@pytest.mark.parametrize(("again", "whole"), [("rho-again", "online"), ("less-again", "less")])
def test_stopped_twice_and_gone_on_equals_never_stopping(
    runs: Path, again: str, whole: str
) -> None:
    kind = again.partition("-")[0]
    for number, code in ((1, 3), (2, 3), (3, 0)):
        got, said = noted(runs / "noted", f"{kind}-{number}")
        assert got == code, said
    assert weights(runs / again) == weights(runs / whole)
    assert chosen(runs / again) == chosen(runs / whole)
    for key, values in scores(runs / whole).items():
        np.testing.assert_array_equal(scores(runs / again)[key], values)
    for part in ("", "reference") if kind == "rho" else ("warmup",):
        assert metrics(runs / again / part) == metrics(runs / whole / part)


def test_less_goes_on_from_the_chunk_it_stopped_at(runs: Path) -> None:
    left, _ = noted(runs / "noted", "less-2-left")
    assert left is not None and 1 <= left < 4, "two checkpoints of two chunks"


def test_cost_counts_every_forward_and_backward(runs: Path) -> None:
    """All examples have 16 input tokens; 90 warm up, in epochs of 12 batches of 8."""
    cost = weights(runs / "less")["cost"]
    assert cost == {"trained_tokens": 16 * (24 * 8 + 2 * (150 + 60)), "scored_tokens": 0}
    cost = weights(runs / "online")["cost"]
    assert cost == {"trained_tokens": 16 * (23 + 24) * 8, "scored_tokens": 16 * (150 + 24 * 40)}
    cost = weights(runs / "offline")["cost"]
    assert cost == {"trained_tokens": 16 * (23 + 24) * 8, "scored_tokens": 16 * 300}


def test_mistakes_cost_one_line(runs: Path) -> None:
    for name, words in {
        "other-dimensions": ("features/checkpoint-1", "other data or options"),
        "lisa": ("lisa.lisa_layers",),
        "damaged": ("chunk-00001.npy", "remove it"),
        "cp": ("parallel.context_parallel_size", "set it to 1"),
        "no-share": ("--select-fraction", "1.5"),
    }.items():
        code, said = noted(runs / "noted", name)
        line = said.strip().splitlines()[-1]
        assert code == 2 and all(word in line for word in words), (name, said)
    assert "--select-fraction" in the_only_line(noted(runs / "noted", "no-share")[1])
