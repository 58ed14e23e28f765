"""Every number that a run of `reweight` leaves or shows, computed another way.

One rank runs with no option at its default, on sources of uneven sizes, lengths and masks.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_scalebio.formatting import pace
from tests.commands import MODEL, noted, refused
from tests.distributed.harness import run_distributed
from tests.outputs_run import (
    ALPHA,
    BATCH,
    EVERY,
    INITIAL,
    KNOWN,
    RATE,
    RESYNC,
    SIZES,
    STEPS,
    TAIL,
    run_all,
)  # fmt: skip

pytestmark = pytest.mark.distributed

CRITICAL_80 = 3.875  # Abadir and Paruolo 1997, table II
EXAMPLES = 1 / (0.75**2 / 20 + 0.25**2 / 7)  # of validation, were all to weigh alike


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    run_distributed(run_all, 1, str(folder))
    code, said = noted(folder / "noted", "run")
    assert code == 0, said
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]


def trajectory(folder: Path) -> np.ndarray:
    """p after each step, from the excess losses alone, STEPS × 3.

    g = α (excess − mean under p); v is the running mean of Σ p g² (decay .99, bias taken out);
    λ −= lr g / √v; p = softmax(λ).
    """
    p, square, path = INITIAL.copy(), 0.0, []
    for number, record in enumerate(records(folder), 1):
        excess = np.array(record["excess_loss"])
        g = ALPHA * (excess - (p * excess).sum())
        square = 0.99 * square + 0.01 * (p * g**2).sum()
        usual = math.sqrt(square / (1 - 0.99**number)) or 1.0
        p = p * np.exp(-RATE * g / usual)
        p /= p.sum()
        path.append(p)
    return np.array(path)


def in_phases(record: dict[str, Any]) -> float:
    """Seconds of a step that some phase claims; a line can't hold the time of its own writing."""
    return sum(seconds for phase, seconds in record["time_s"].items() if phase != "log")


def test_a_record_says_what_the_losses_and_the_mixture_make(folder: Path) -> None:
    found, path = records(folder), trajectory(folder)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for number, record in enumerate(found):
        p = INITIAL if number == 0 else path[number - 1]
        assert record["weights"] == pytest.approx(p, rel=1e-6)
        loss_w, loss_u, excess = (np.array(record[k]) for k in ("loss_w", "loss_u", "excess_loss"))
        np.testing.assert_allclose(excess, loss_w - loss_u, atol=2e-8)
        assert record["train_loss_w"] == pytest.approx((p * loss_w).sum(), rel=1e-7)
        assert record["train_loss_u"] == pytest.approx((p * loss_u).sum(), rel=1e-7)
        v, x = record["validation_losses"]
        assert record["validation_loss"] == pytest.approx(0.75 * v + 0.25 * x, rel=1e-7)
        g = ALPHA * excess
        into_logits = p * (g - (p * g).sum())
        assert record["grad_norm_lambda"] == pytest.approx(np.linalg.norm(into_logits), abs=1e-6)
        # Warm-up over three steps, then a straight line to a half of the peak.
        share = min(1.0, (number + 1) / 3)
        if share == 1.0:
            share = 1 - 0.5 * (number + 1 - 3) / (STEPS - 3)
        assert record["lr_w"] == pytest.approx(2e-3 * share)
        assert record["lr_u"] == pytest.approx(5e-3 * share)
        assert (record["alpha"], record["lr_lambda"], record["outer_round"]) == (ALPHA, RATE, 0)
        assert record["skipped"] is None and record["active_layers"] is None
        after_reset = number % RESYNC == 0
        assert (abs(excess).max() == 0) == after_reset
        per_second = record["tokens"] / record["step_time_s"]
        assert record["tokens_per_second"] == pytest.approx(per_second)
        assert 0 < in_phases(record) <= record["step_time_s"]
    assert sum(map(in_phases, found)) > 0.5 * sum(record["step_time_s"] for record in found)


def test_tokens_are_counted_without_padding_once_a_pass(folder: Path) -> None:
    """Input tokens of each drawn sequence: twice in training (once after a reset), and validation.

    Which sequences were drawn is the sampler's to say.
    """
    from megatron_scalebio.mixture.sampler import BlendSampler

    lengths = json.loads((folder / "data" / "lengths.json").read_text())
    seed = 1234
    train = BlendSampler(list(SIZES.values()), BATCH, seed, 0.5)
    valid = BlendSampler([20, 7], 6, seed + 1, 0.5)

    def drawn(sampler: BlendSampler, names: str, shares: np.ndarray) -> int:
        picks = sampler.next(shares)
        pairs = zip(picks.group_B, picks.index_B, strict=True)
        return sum(lengths[names[group]][index] for group, index in pairs)

    total = 0
    for number, record in enumerate(records(folder)):
        passes = 1 if number % RESYNC == 0 else 2
        tokens = passes * drawn(train, "abc", np.array(record["weights"]))
        tokens += drawn(valid, "vx", np.array([0.75, 0.25]))
        assert record["tokens"] == tokens
        total += tokens
    content = json.loads((folder / "run" / "weights.json").read_text())
    assert content["cost"] == {"trained_tokens": total, "scored_tokens": 0}


def test_gradient_norms_and_rates_are_those_of_the_step(folder: Path) -> None:
    measured = json.loads((folder / "measured.json").read_text())
    record = measured["record"]
    for name in ("w", "u"):
        assert record[f"grad_norm_{name}"] == pytest.approx(measured["norms"][name], rel=1e-5)
    assert measured["norms"]["w"] != pytest.approx(measured["norms"]["u"], rel=1e-3)
    # Embedding (61 rounded up to 64), two layers of QKV, projection, gated MLP and norms, a norm.
    layer = 32 * 96 + 32 * 32 + 32 * 2 * 48 + 48 * 32 + 2 * 32
    assert measured["parameters"] == 64 * 32 + MODEL["num_layers"] * layer + 32
    run = json.loads((folder / "run" / "run.json").read_text())
    assert run["parameters"] == measured["parameters"]


def test_memory_is_in_bytes(folder: Path) -> None:
    peak = json.loads((folder / "measured.json").read_text())["peak"]
    content = json.loads((folder / "run" / "memory.json").read_text())
    for held in (content["peak_bytes"], records(folder)[-1]["memory_bytes"]):
        assert peak / 4 < held <= peak


def test_weights_and_intervals_are_of_the_tail_of_the_trajectory(folder: Path) -> None:
    """p̄ ± c √(Σ_r (Σ_{k≤r} (p_k − p̄))² / n³), within [0, 1] (Lee et al. 2022)."""
    content = json.loads((folder / "run" / "weights.json").read_text())
    tail = trajectory(folder)[-TAIL:]
    weights = tail.mean(0)
    wandering = CRITICAL_80 * np.sqrt((np.cumsum(tail - weights, 0) ** 2).sum(0) / TAIL**3)
    drift = np.abs(tail[TAIL // 2 :].mean(0) - tail[: TAIL // 2].mean(0))
    drift *= np.log(2) / (2 * np.log(9 / 8))  # of an error b / t, from T/2 to T
    sampling = 1.2815516 * np.sqrt(weights * (1 - weights) / EXAMPLES)
    half = np.sqrt(wandering**2 + drift**2 + sampling**2 + 0.01**2)  # .01: what cannot be resolved
    for i, entry in enumerate(content["sources"]):
        assert entry["name"] == "abc"[i] and entry["examples"] == SIZES["abc"[i]]
        assert entry["weight"] == pytest.approx(weights[i], rel=1e-6)
        assert entry["initial_weight"] == pytest.approx(INITIAL[i])
        low = 0.0 if weights[i] < 0.01 else max(0.0, weights[i] - half[i])
        assert entry["ci_low"] == pytest.approx(low, rel=1e-5, abs=1e-9)
        assert entry["ci_high"] == pytest.approx(min(1.0, weights[i] + half[i]), rel=1e-5)
    assert (content["step"], content["confidence"], content["complete"]) == (STEPS, 0.8, True)
    assert content["reason"] == (
        "only 3 steps are averaged, at least 200 are needed (set train_iters to 800 or more)"
    )


def test_blend_has_shares_of_tokens_without_what_is_below_the_floor(folder: Path) -> None:
    content = json.loads((folder / "run" / "weights.json").read_text())
    weights = {entry["path"]: entry["weight"] for entry in content["sources"]}
    assert 0.001 < min(weights.values()) < 0.03, "the floor has something to leave out"
    lengths = json.loads((folder / "data" / "lengths.json").read_text())
    mean = {f"{folder}/data/{name}/tokens": np.mean(lengths[name]) + 1 for name in "abc"}
    assert max(mean.values()) > 1.05 * min(mean.values()), "examples differ in length"
    kept = {path: w * mean[path] for path, w in weights.items() if w >= 0.03}
    words = shlex.split((folder / "run" / "blend.txt").read_text())
    assert words[1::2] == list(kept)
    shares = [w / sum(kept.values()) for w in kept.values()]
    assert [float(word) for word in words[::2]] == pytest.approx(shares, abs=1e-6)
    splits = json.loads((folder / "run" / "blend.json").read_text())
    sets = ["3.000000", f"{folder}/data/v/tokens", "1.000000", f"{folder}/data/x/tokens"]
    assert splits == {"train": words, "valid": sets, "test": None}
    said = noted(folder / "noted", "run")[1]
    assert (
        "warning: weight below 0.03, on which Megatron-LM may fail; left out of blend.txt" in said
    )
    assert ": a; `sample` and" in said


def test_of_many_sources_a_tenth_of_a_uniform_weight_stays() -> None:
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.engine.outputs import blend_floor

    for count, floor, least in ((4, 0.4, 0.025), (4, 0.01, 0.01), (1000, 1e-3, 1e-4)):
        sources = [{"name": f"s{i}", "path": "x"} for i in range(count)]
        config = load_config(
            None, {"data": {"sources": sources}, "bilevel": {"blend_floor": floor}}
        )
        assert blend_floor(config) == pytest.approx(least)


# tag: the field of metrics.jsonl; Megatron-LM's, then this package's
TAGS = {
    "lm loss": "train_loss_w", "lm loss validation": "validation_loss", "learning-rate": "lr_w",
    "grad-norm": "grad_norm_w", "iteration-time": "step_time_s",
    "throughput": "tokens_per_second", "mem-allocated-bytes": "memory_bytes",
    "bilevel/L1": "validation_loss", "bilevel/L2_w": "train_loss_w",
    "bilevel/L2_u": "train_loss_u", "bilevel/alpha": "alpha",
    "bilevel/grad_norm_u": "grad_norm_u", "bilevel/grad_norm_lambda": "grad_norm_lambda",
    "learning-rate-u": "lr_u", "learning-rate-lambda": "lr_lambda",
}  # fmt: skip
PER_SOURCE = {
    "mixture/weight": "weights", "mixture/excess_loss": "excess_loss", "mixture/loss_w": "loss_w",
    "mixture/loss_u": "loss_u",
}  # fmt: skip


def test_tensorboard_shows_the_record_under_its_tags(folder: Path) -> None:
    accumulator = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0})
    accumulator.Reload()
    logged = records(folder)[EVERY - 1 :: EVERY]

    def expect(tag: str, values: list[float], per_step: int = 1) -> None:
        events = accumulator.Scalars(tag)
        assert [e.step for e in events] == [per_step * r["step"] for r in logged], tag
        assert [e.value for e in events] == pytest.approx(values, rel=1e-6), tag
        seen.add(tag)

    seen: set[str] = set()
    for tag, field in TAGS.items():
        expect(tag, [record[field] for record in logged])
    for tag, field in (("lm loss", "train_loss_w"), ("lm loss validation", "validation_loss")):
        expect(f"{tag} vs samples", [record[field] for record in logged], per_step=BATCH)
    for prefix, field in PER_SOURCE.items():
        for i, name in enumerate(SIZES):
            expect(f"{prefix}/{name}", [record[field][i] for record in logged])
    for i, name in enumerate("vx"):
        expect(f"lm loss validation-{name}", [r["validation_losses"][i] for r in logged])
        expect(f"mixture/validation/{name}", [r["validation_weights"][i] for r in logged])
    for phase in logged[0]["time_s"]:
        expect(f"time/{phase}", [record["time_s"][phase] for record in logged])
    expect("batch-size", [BATCH] * len(logged))
    assert set(accumulator.Tags()["scalars"]) == seen
    assert not (folder / "run" / "tensorboard").exists()


def shown_percent(share: float) -> str:
    if share < 0.00005:
        return "<0.01%" if share else "0%"
    return f"{100 * share:.1f}%" if share >= 0.00995 else f"{100 * share:.2f}%"


def test_the_console_shows_the_run_in_the_numbers_of_its_files(folder: Path) -> None:
    said = noted(folder / "noted", "run")[1]
    lines = [line.split() for line in said.splitlines()]
    lengths = json.loads((folder / "data" / "lengths.json").read_text())
    content = json.loads((folder / "run" / "weights.json").read_text())
    natural = {name: count / 56 for name, count in SIZES.items()}
    run = json.loads((folder / "run" / "run.json").read_text())
    assert run["natural"] == pytest.approx(list(natural.values()))
    for i, name in enumerate(SIZES):
        tokens = sum(lengths[name]) + SIZES[name]  # with the token behind each input
        shares = [shown_percent(natural[name]), shown_percent(INITIAL[i])]
        assert [name, str(SIZES[name]), str(tokens), *shares] in lines
        entry = content["sources"][i]
        ends = [shown_percent(entry["ci_low"]), "–", shown_percent(entry["ci_high"])]
        row = [name, shown_percent(entry["weight"]), *ends, *reversed(shares)]
        assert [*row, shown_percent(KNOWN[name])] in lines
    assert ["source", "weight", "80%", "interval", "initial", "natural", "known"] in lines
    away = sum(abs(e["weight"] - KNOWN[e["name"]]) for e in content["sources"])
    assert f"distance from the known mixture: {away:.3f}" in said
    assert "12 of 10 training and 6 validation sequences" in said
    assert "eg lr 0.3, alpha 7" in said
    assert "without loss masks, so that prompts train too" in said
    assert f"2 layers x 32, {run['parameters']:,} parameters, new" in said
    shown = {int(n): rest for n, rest in re.findall(r"^step (\d+)/12  (.*)$", said, re.M)}
    assert list(shown) == [1, 4, 8, 12]
    found = records(folder)
    for step, rest in shown.items():
        record = found[step - 1]
        assert rest.startswith(f"validation {record['validation_loss']:.3f}  ETA ")
        usual = np.median([r["step_time_s"] for r in found[:step]])
        assert f"  {pace(usual)}  " in rest
        assert f"ETA {round(usual * (STEPS - step))} s" in rest
        top = sorted(range(3), key=lambda i: -record["weights"][i])
        assert rest.endswith(
            ", ".join(f"{'abc'[i]} {100 * record['weights'][i]:.0f}%" for i in top)
        )


def test_checkpoints_are_kept_where_and_as_often_as_asked(folder: Path) -> None:
    kept = sorted(path.name for path in (folder / "kept").glob("iter_*"))
    assert kept == ["iter_0000005", "iter_0000010", "iter_0000012"]
    assert not (folder / "run" / "checkpoints").exists()


def test_a_run_does_not_go_back(folder: Path) -> None:
    refused(folder, "shorter", "train.train_iters: 11 is below step 12, which this run has reached")


def test_a_run_may_stop_once_converged(folder: Path) -> None:
    code, said = noted(folder / "noted", "stopped")
    assert code == 0, said
    content = json.loads((folder / "stopped" / "weights.json").read_text())
    assert (content["step"], content["converged"], content["complete"]) == (3, True, True)
    assert "converged: as asked" in said


def test_train_records_the_mixture_that_it_was_given(folder: Path) -> None:
    code, said = noted(folder / "noted", "trained")
    assert code == 0, said
    learned = json.loads((folder / "run" / "weights.json").read_text())["sources"]
    p = np.array([entry["weight"] for entry in learned])
    found = [json.loads(line) for line in (folder / "trained" / "metrics.jsonl").open()]
    for record in found:
        loss = (p * record["loss_w"]).sum() / p.sum()
        assert record["train_loss_w"] == pytest.approx(loss, rel=1e-7)
        per_second = record["tokens"] / record["step_time_s"]
        assert record["tokens_per_second"] == pytest.approx(per_second)
        # Warm-up over one step of four, then a straight line to a half of the peak.
        share = 1 - 0.5 * (record["step"] - 1) / 3
        assert record["lr_w"] == pytest.approx(2e-3 * share)
    evaluated = [record for record in found if "validation_loss" in record]
    assert [record["step"] for record in evaluated] == [3, 4]
    for record in evaluated:
        v, x = record["validation_losses"]
        assert record["validation_loss"] == pytest.approx(0.75 * v + 0.25 * x)
        words = f"step {record['step']}  validation {record['validation_loss']:.4f}"
        assert words in said.splitlines()
    content = json.loads((folder / "trained" / "evaluation.json").read_text())
    assert content["best_validation_loss"] == min(r["validation_loss"] for r in evaluated)
    assert content["cost"]["trained_tokens"] == sum(record["tokens"] for record in found)


def test_models_that_did_not_learn_are_warned_of_once(folder: Path) -> None:
    _, said = noted(folder / "noted", "still")
    assert said.count("the validation loss did not fall by more than its noise") == 1
    assert "Raise lr, or make more steps" in (folder / "still" / "report.html").read_text()
    assert "did not fall" not in noted(folder / "noted", "run")[1], "too few steps to say"
