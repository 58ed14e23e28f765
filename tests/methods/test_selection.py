"""LESS and RHO-LOSS against brute force, under other layouts, stopped and continued."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_scalebio.methods.pool import EpochOrder, random_rows
from tests.commands import command, metrics, note, noted, the_only_line, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_problem
from tests.methods.naive_selection import LESS_RATES, TOTAL, naive_less, naive_rho

pytestmark = pytest.mark.distributed
SIZES, VALIDATION = (60, 50, 40), (36, 24)
LESS = ["--method", "less", "--less-checkpoints", 2, "--less-warmup-fraction", 0.6,
        "--select-fraction", 0.197]  # fmt: skip
EXACT, SKETCH = ["--less-dimensions", 10**6], ["--less-dimensions", 2048]
ONLINE = ["--method", "rho_loss", "--rho-batch-share", 0.2]
OFFLINE = ["--method", "rho_loss", "--no-rho-online", "--select-fraction", 0.203,
           "--reference-iters", 5]  # fmt: skip
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
    sources, [first] = write_problem(
        folder / "data", [0.9, 0.1, 0.0], 0, length=17, examples=SIZES, validation=VALIDATION[0],
        even=False,
    )  # fmt: skip
    _, [second] = write_problem(
        folder / "more", [0.2, 0.8, 0.0], 0, length=17, examples=1, validation=VALIDATION[1],
        even=False,
    )  # fmt: skip
    validation = [{**first, "weight": 3.0}, {**second, "name": "second", "weight": 1.0}]
    write_config(
        folder / "x.yaml", sources, validation,
        train={"train_iters": 24, "micro_batch_size": 4},
        optimizer={"lr": 5e-3, "adam_eps": 1e-5, "adam_beta1": 0.8, "adam_beta2": 0.97},
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
        assert content["score"].dtype == np.float32 and content["score"].shape == (TOTAL,)
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
    content, want = scores(runs / "less-exact"), np.array(naive["scores"])
    np.testing.assert_allclose(content["score_by_validation"][naive["rows"]], want, atol=2e-4)
    assert want.std(axis=0).min() > 0.02, "scores that differ by more than the tolerance"
    assert (content["score"] == content["score_by_validation"].max(axis=1)).all()
    assert len(set(content["score_by_validation"].argmax(axis=1))) == 2
    found = weights(runs / "less-exact")
    assert found["rates"] == pytest.approx(LESS_RATES) and found["warmup_examples"] == 90


def test_gradients_of_sets_and_examples_are_taken_without_dropout(runs: Path) -> None:
    """Cosines of token means' gradients over two sets and of three examples', all with all."""
    want, got = torch.load(runs / "naive-less.pt", weights_only=True)["cosines"]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_projection_keeps_the_scores(runs: Path) -> None:
    """A cosine of two vectors projected to d numbers is off by about 1/√d."""
    exact, got = (scores(runs / name)["score"] for name in ("less-exact", "less"))
    error = got - exact
    assert np.abs(error - error.mean()).max() < 5 / np.sqrt(2048)
    assert np.corrcoef(exact, got)[0, 1] > 0.8
    for number in (1, 2):
        folder = runs / "less" / "features" / f"checkpoint-{number}"
        features = np.load(folder / "chunk-00000.npy")
        assert features.shape == (128, 2048) and features.dtype == np.float16
        assert np.linalg.norm(features.astype(float), axis=1) == pytest.approx(1, abs=2e-3)


def test_reducible_losses_equal_a_naive_evaluation(runs: Path) -> None:
    naive = torch.load(runs / "naive-rho.pt", weights_only=True)
    assert naive["irreducible steps"] == 23, "three epochs of 60 examples in batches of 8"
    assert naive["offline irreducible steps"] == 5, "as many as were asked for"
    for name in ("irreducible", "offline irreducible"):
        assert naive[f"{name} sources"] == ["validation", "second"]
    got = scores(runs / "online")["irreducible"]
    np.testing.assert_allclose(got, naive["irreducible"], rtol=1e-5)
    got = scores(runs / "offline")
    np.testing.assert_allclose(got["irreducible"], naive["offline irreducible"], rtol=1e-5)
    reducible = np.subtract(naive["offline trained"], naive["offline irreducible"])
    np.testing.assert_allclose(got["score"], reducible, atol=2e-5)
    assert naive["offline trained steps"] == 24 and reducible.std() > 0.01


def test_online_trains_on_the_highest_reducible_losses_of_the_large_batch(runs: Path) -> None:
    naive = torch.load(runs / "naive-rho.pt", weights_only=True)
    irreducible = np.array(naive["irreducible"])
    # A third of it rounded; never more than there are, nor less than a batch.
    assert naive["large batches"] == {"0.3": 27, "0.01": 150, "1.0": 8}
    for step in naive["steps"]:
        large = np.array(step["large"])
        assert len(set(step["large"])) == 40
        reducible = np.array(step["losses"]) - irreducible[large]
        assert step["chosen"] == sorted(large[np.argsort(-reducible)[:8]].tolist())
        np.testing.assert_allclose(step["reducible"], reducible, atol=2e-5)


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


def input_tokens(folder: Path) -> np.ndarray:
    dataset = IndexedDataset(str(folder / "tokens"))  # its arrays do not outlive it
    return np.array(dataset.sequence_lengths, dtype=int) - 1


def drawn(row_N: np.ndarray, batch: int, steps: int) -> np.ndarray:
    """The rows of so many batches, one after the other, as `test_pool` knows them."""
    order = EpochOrder(row_N, 1234)
    return np.concatenate([order.next(batch) for _ in range(steps)])


def test_cost_counts_every_forward_and_backward(runs: Path) -> None:
    """Tokens counted from the prepared files, over the rows that went through each model."""
    pool = np.concatenate([input_tokens(runs / "data" / f"s{i}") for i in range(3)])
    sets = [input_tokens(runs / part / "validation") for part in ("data", "more")]
    held_out, every = np.concatenate(sets), np.arange(TOTAL)
    warmup = drawn(random_rows(TOTAL, 90, 1234 + 2), 8, 24)
    assert weights(runs / "less")["cost"] == {
        "trained_tokens": pool[warmup].sum() + 2 * (pool.sum() + held_out.sum()),
        "scored_tokens": 0,
    }
    reference = held_out[drawn(np.arange(60), 8, 23)].sum()
    assert weights(runs / "online")["cost"] == {
        "trained_tokens": reference + (scores(runs / "online")["chosen"] * pool).sum(),
        "scored_tokens": pool.sum() + pool[drawn(every, 40, 24)].sum(),
    }
    reference = held_out[drawn(np.arange(60), 8, 5)].sum()
    assert weights(runs / "offline")["cost"] == {
        "trained_tokens": reference + pool[drawn(every, 8, 24)].sum(),
        "scored_tokens": 2 * pool.sum(),
    }


def test_what_is_kept_says_what_it_was_made_for(runs: Path) -> None:
    """Features and losses are not taken for those of other data, steps or seeds."""

    def fingerprints(*folders: Path) -> list[str]:
        return [json.loads((f / "source.json").read_text())["fingerprint"] for f in folders]

    data = {
        "sources": fingerprints(*(runs / "data" / f"s{i}" for i in range(3))),
        "validation": fingerprints(runs / "data" / "validation", runs / "more" / "validation"),
        "seed": 1234, "rows": TOTAL, "chunk": 128,
    }  # fmt: skip
    of_less = {**data, "dimensions": 2048, "rates": pytest.approx(LESS_RATES), "checkpoint": 2}
    plain = {k: v for k, v in data.items() if k != "validation"}
    for folder, want in {
        "less/features/checkpoint-2": of_less, "online/irreducible": {**data, "steps": 23},
        "offline/irreducible": {**data, "steps": 5}, "offline/trained": {**plain, "steps": 24},
    }.items():  # fmt: skip
        assert json.loads((runs / folder / "made_for.json").read_text()) == want


def test_weights_json_says_what_the_choice_began_with(runs: Path) -> None:
    for name, count in (("less", 30), ("offline", 30), ("online", None)):
        found = weights(runs / name)
        initial = [entry["initial_weight"] for entry in found["sources"]]
        assert initial == pytest.approx([size / TOTAL for size in SIZES])
        assert (found["method"], found["step"]) == ("less" if name == "less" else "rho_loss", 24)
        assert found["selected"] == (count or sum(map(len, chosen(runs / name))))


def test_the_terminal_says_where_the_chosen_examples_are(runs: Path) -> None:
    for name in ("less", "offline", "online"):
        _, said = noted(runs / "noted", name)
        assert f"{name}/selected.json" in said.replace("\n", "")


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
