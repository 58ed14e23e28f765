"""Steps that are not applied, steps with dropout, and what a run does at its best and last ones."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands import command, metrics, note, noted, write_config
from tests.distributed import naive, naive_loop
from tests.distributed.gather import global_tensors
from tests.distributed.harness import run_distributed
from tests.distributed.small_runs import (
    BATCH,
    PLAIN,
    SHAPE,
    SHARES,
    begun,
    ended,
    step_of,
    tree_of,
    write_problem,
)

pytestmark = pytest.mark.distributed

EXPERTS = {
    "num_experts": 4, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True
}  # fmt: skip
# stage and the model of which one gradient is spoilt, by what; and what the models are
SPOILT: list[tuple[str, str, float, dict]] = [
    ("reweight", "w", math.inf, {}), ("reweight", "u", -math.inf, {}),
    ("reweight", "u", math.nan, EXPERTS), ("train", "w", math.inf, {}),
]  # fmt: skip
DROPS = {"hidden": {"hidden_dropout": 0.4}, "attention": {"attention_dropout": 0.3}}
FEW = 3  # examples of a set
# Validation losses after each step of a run of three, resumed for one.
CURVE = [2.0, 2.75, 2.5, 2.25]


def on_one_rank(folder_name: str) -> None:
    folder = Path(folder_name)
    for number, case in enumerate(SPOILT):
        torch.save(spoilt_step(folder, *case), folder / f"spoilt-{number}.pt")
    for name in DROPS:
        torch.save(dropping(folder, name), folder / f"drops-{name}.pt")
    torch.save(doge_with_few_places(folder), folder / "doge.pt")
    torch.save(fastmix_without_an_alignment(folder), folder / "fastmix.pt")
    commands(folder)


def spoiling(model: str, value: float, when: list[int]) -> None:
    """Has one entry of a model's gradient be `value` in the flushes of these numbers, from now."""
    from megatron_scalebio.core import training

    whole, flushes = training.flush, [0]

    @functools.wraps(whole)
    def flush(twins, *args: Any, **kwargs: Any) -> Any:
        records = whole(twins, *args, **kwargs)
        flushes[0] += 1
        if flushes[0] in when:
            getattr(twins[0], model).buffers[0].grad_data[7] = value
        return records

    training.flush = flush
    spoiling.undo = lambda: setattr(training, "flush", whole)


def everything(state: Any) -> dict[str, Any]:
    """What a step moves, copied."""
    held = {
        name: global_tensors(chunks, lambda p: p.data)
        for name, chunks in state.training.models.items()
    }
    for name, optimizer in state.training.period.optimizers.items():
        for part in optimizer.chained_optimizers:
            for number, moments in enumerate(part.optimizer.state.values()):
                held[f"adam {name} {number}"] = {
                    key: torch.as_tensor(value).clone() for key, value in moments.items()
                }
    if hasattr(state.training, "mixture"):
        mixture = state.training.mixture
        held["mixture"] = {
            "logits": mixture.logits_S.clone(),
            "moved": torch.tensor([mixture.steps, mixture.squares[0]]),
            "trajectory": mixture.trajectory.tail(1.0).clone(),
        }
    return held


def spoilt_step(folder: Path, stage: str, model: str, value: float, sizes: dict) -> dict:
    state = begun(folder, stage, model=sizes)
    spoiling(model, value, when=[3, 4])
    result: dict[str, list] = {"said": [], "loss": [], "held": [], "in_a_row": [], "step": []}
    for _ in range(5):
        said, loss = step_of(state)
        now = (said, loss, everything(state), state.training.skipped_in_a_row, state.step)
        for kept, each in zip(result.values(), now, strict=True):
            kept.append(each)
    spoiling.undo()
    ended(state)
    return result


def dropping(folder: Path, name: str) -> dict:
    """Held-out losses of a model that drops out, twice, and then the losses of steps."""
    result = {}
    for stage in ("train", "reweight"):
        sections = {"data": {"loss_mean": "token"}, "train": {**BATCH, "eval_examples": FEW}}
        state = begun(folder, stage, model=DROPS[name], **sections)
        settings, attention = state.megatron, state.training.w[0].decoder.layers[0].self_attention
        result["shares"] = [settings.hidden_dropout, settings.attention_dropout]
        assert attention.core_attention.dropout == settings.attention_dropout
        result[f"{stage} start"] = global_tensors(state.training.w, lambda p: p.data)
        if stage == "train":
            held_out = [state.held_out() for _ in range(2)]
            result["held out"] = [[loss.as_dict() for loss in losses] for losses in held_out]
            result["validation loss"] = state.validation_loss(held_out[0])
            result["all"] = [loss.as_dict() for loss in state.held_out(test=True)]
        picks = state.data.sampler.state_dict()
        drawn = state.data.sampler.next(torch.full((3,), 1 / 3, dtype=torch.float64).numpy())
        state.data.sampler.load_state_dict(picks)
        result[f"{stage} picks"] = torch.tensor([drawn.group_B, drawn.index_B])
        result[f"{stage} loss"] = step_of(state)[1]
        ended(state)
    return result


def doge_with_few_places(folder: Path) -> dict:
    """A step of DoGE whose batch has two places for three validation sets."""

    train = {**BATCH, "validation_batch_size": 2}
    state = begun(folder, "doge", train=train, baseline={"method": "doge"})
    result: dict[str, Any] = {"start": global_tensors(state.training.w, lambda p: p.data)}
    sampler = state.data.validation_sampler
    before = sampler.state_dict()
    drawn = sampler.next(state.data.shares_V)
    sampler.load_state_dict(before)
    result["picks"] = torch.tensor([drawn.group_B, drawn.index_B])
    record = state.make_step()
    result |= {name: record[name] for name in ("validation_loss", "validation_losses")}
    ended(state)
    return result


def fastmix_without_an_alignment(folder: Path) -> dict:
    """Three steps of FastMix, the second of whose alignments is not finite, as nothing else is."""
    from megatron_scalebio.methods.fastmix import OutputAlignment

    state = begun(folder, "fastmix", baseline={"method": "fastmix"})
    whole, result = OutputAlignment.by_source, {"said": [], "weight": [], "held": []}
    for value in (1.0, math.nan, 1.0):
        OutputAlignment.by_source = lambda self, n, value=value: value * whole(self, n)
        result["said"].append(step_of(state)[0])
        result["weight"].append(torch.cat([state.log_weight_S, *state.moments_2S]))
        result["held"].append(everything(state))
    OutputAlignment.by_source = whole
    ended(state)
    return result


def commands(folder: Path) -> None:
    from megatron_scalebio.methods import finetune, scalebio
    from megatron_scalebio.mixture.confidence import Verdict

    tree = tree_of({"optimizer": PLAIN, "train": BATCH}, folder)
    path = write_config(
        folder / "x.yaml", tree["data"]["sources"], tree["data"]["validation"],
        model=tree["model"],
        data={"seq_length": tree["data"]["seq_length"], "loss_mean": "token"},
        optimizer=PLAIN,
        train={**BATCH, "train_iters": 4, "eval_interval": 0, "validation_batch_size": 6},
        checkpoint={"save_interval": 2, "keep_last": 9},
    )  # fmt: skip

    def run(stage: str, name: str, *flags: object) -> None:
        words = [stage, "--config", path, "--output", folder / name, *flags]
        note(folder / "noted", name, command(*words))

    mixtures = []

    def converged_from_the_third(state) -> Verdict:
        mixtures.append(state.training.mixture.probs_S.tolist())
        return Verdict(state.step >= 3, "as asked")

    judged, scalebio.verdict = scalebio.verdict, converged_from_the_third
    scalebio.FEWEST_AVERAGED = 1  # intervals of few steps, which can be worked out
    spoiling("w", math.inf, when=[2])
    run("reweight", "reweight once")
    spoiling.undo()
    mixtures.clear()
    words = ["--lr-lambda", 0.5, "--average-fraction", 0.67, "--confidence", 0.8]
    words += ["--save", folder / "elsewhere" / "checkpoints"]
    run("reweight", "stops early", "--early-stop", *words)
    (folder / "mixtures.json").write_text(json.dumps(mixtures))
    scalebio.verdict = judged

    losses = iter(CURVE)
    whole = finetune.FinetuneState.validation_loss
    finetune.FinetuneState.validation_loss = lambda state, held_out: next(losses)
    spoiling("w", math.inf, when=[2])
    flags = ["--eval-interval", 1, "--train-iters"]
    run("train", "train once", *flags, 3)
    spoiling.undo()
    (folder / "first.txt").write_text(noted(folder / "noted", "train once")[1])
    # Where it began is not looked at again.
    run("train", "train once", *flags, 4, "--load", folder / "nothing")
    finetune.FinetuneState.validation_loss = whole
    spoiling("w", math.inf, when=[2, 3, 4])
    run("train", "train ends", "--skip-limit", 2)
    spoiling.undo()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("unusual")
    problem = write_problem(folder / "data")
    run_distributed(on_one_rank, 1, str(folder))
    return folder, problem


@pytest.mark.parametrize("number", range(len(SPOILT)))
def test_a_gradient_that_is_not_finite_is_not_applied(ran: tuple[Path, dict], number: int) -> None:
    """Though the losses are: nothing moves, and the step counts as one of a row."""
    _, model, value, _ = SPOILT[number]
    got = torch.load(ran[0] / f"spoilt-{number}.pt", weights_only=True)
    assert all(math.isfinite(loss) for loss in got["loss"])
    said = f"{model}: gradient norm is {'nan' if math.isnan(value) else 'inf'}"
    assert got["said"] == [None, None, said, said, None]
    assert got["in_a_row"] == [0, 0, 1, 2, 0]
    assert got["step"] == [1, 2, 3, 4, 5], "skipped steps are counted"
    _, before, *during, after = got["held"]
    for held in during:
        assert flat(held).equal(flat(before))
    for name, tensors in after.items():
        moved = flat({name: tensors})
        assert moved.isfinite().all() and not moved.equal(flat({name: before[name]})), name


def flat(held: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
    parts = [tensor for name in sorted(held) for _, tensor in sorted(held[name].items())]
    return torch.cat([part.detach().double().flatten() for part in parts])


@pytest.mark.parametrize(("stage", "at"), [("reweight", [4]), ("train", [3, 4])])
def test_a_step_that_is_not_applied_is_not_saved(
    ran: tuple[Path, dict], stage: str, at: list[int]
) -> None:
    folder, _ = ran
    assert noted(folder / "noted", f"{stage} once")[0] == 0
    skipped = [record["skipped"] for record in metrics(folder / f"{stage} once")]
    assert skipped == [None, "w: gradient norm is inf", None, None]
    assert saved(folder / f"{stage} once") == at


def test_as_many_in_a_row_as_allowed_end_a_training(ran: tuple[Path, dict]) -> None:
    folder, _ = ran
    code, said = noted(folder / "noted", "train ends")
    assert code == 2 and "step 3: 2 steps in a row were not applied: w: gradient norm is" in said
    assert len(metrics(folder / "train ends")) == 3
    assert saved(folder / "train ends") == []


def saved(run: Path, kind: str = "checkpoints") -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in (run / kind).glob("iter_*"))


@pytest.mark.parametrize("name", DROPS)
def test_held_out_losses_are_without_dropout(ran: tuple[Path, dict], name: str) -> None:
    folder, problem = ran
    got = torch.load(folder / f"drops-{name}.pt", weights_only=True)
    assert got["shares"] == {"hidden": [0.4, 0.0], "attention": [0.0, 0.3]}[name]
    assert got["held out"][0] == got["held out"][1]
    for kind in ("sample", "token"):
        for field, count in (("held out", FEW), ("all", None)):
            groups = {number: problem[each][:count] for number, each in enumerate("vxy")}
            want = means(got["train start"], groups, kind)
            losses = got[field][0] if field == "held out" else got[field]
            assert [entry[f"{kind}_mean"] for entry in losses] == pytest.approx(want, rel=1e-5)
            assert [entry["examples"] for entry in losses] == [len(x) for x in groups.values()]
    want = means(got["train start"], {n: problem[x][:FEW] for n, x in enumerate("vxy")}, "token")
    total = sum(share * loss for share, loss in zip(SHARES, want, strict=True)) / sum(SHARES)
    assert got["validation loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("stage", ["reweight", "train"])
@pytest.mark.parametrize("name", DROPS)
def test_training_drops_out(ran: tuple[Path, dict], name: str, stage: str) -> None:
    """After held-out losses were taken, too."""
    folder, problem = ran
    got = torch.load(folder / f"drops-{name}.pt", weights_only=True)
    groups: dict[int, list] = {}
    for group, index in got[f"{stage} picks"].T.tolist():
        groups.setdefault(group, []).append(problem["abc"[group]][index])
    without = sum(means(got[f"{stage} start"], groups, "token")) / 3
    assert abs(got[f"{stage} loss"] - without) > 1e-4
    assert got[f"{stage} loss"] == pytest.approx(without, rel=0.3)


def test_doge_does_not_show_absent_validation_sets_as_zero(ran: tuple[Path, dict]) -> None:
    folder, problem = ran
    got = torch.load(folder / "doge.pt", weights_only=True)
    groups: dict[int, list] = {}
    for group, index in got["picks"].T.tolist():
        groups.setdefault(group, []).append(problem["vxy"[group]][index])
    here, want = sorted(groups), means(got["start"], groups, "sample")
    assert len(here) == 2
    assert [got["validation_losses"][number] for number in here] == pytest.approx(want, rel=1e-5)
    assert math.isnan(got["validation_losses"][({0, 1, 2} - set(here)).pop()])
    shares = [share / sum(SHARES) for share in SHARES]
    chances = naive_loop.inclusion(np.array(shares), 2, 0.5)
    standing = [shares[number] / chances[number] for number in here]
    total = sum(s * loss for s, loss in zip(standing, want, strict=True)) / sum(standing)
    assert got["validation_loss"] == pytest.approx(total, rel=1e-5)


def test_a_mixture_without_a_gradient_is_not_moved(ran: tuple[Path, dict]) -> None:
    got = torch.load(ran[0] / "fastmix.pt", weights_only=True)
    assert got["said"] == [None, "w: the gradient of the mixture is not finite", None]
    before, during, after = got["weight"]
    assert during.equal(before) and after.isfinite().all() and not after.equal(before)
    assert flat(got["held"][1]).equal(flat(got["held"][0]))


def means(weights: naive.Weights, groups: dict[int, list], kind: str) -> list[float]:
    with torch.no_grad():
        losses = naive.mean_losses({k: v.double() for k, v in weights.items()}, SHAPE, groups, kind)
    return [float(losses[number]) for number in sorted(losses)]


def test_the_best_weights_are_kept_over_a_resume(ran: tuple[Path, dict]) -> None:
    run = ran[0] / "train once"
    code, said = noted(ran[0] / "noted", "train once")
    assert code == 0 and "from step 3" in said, said
    assert "step 2  validation 2.7500" in (ran[0] / "first.txt").read_text()
    records = metrics(run)
    assert [record["validation_loss"] for record in records] == CURVE
    assert saved(run, "best") == [1]
    content = json.loads((run / "evaluation.json").read_text())
    assert (content["best_validation_loss"], content["step"]) == (2.0, 4)
    per_token = [entry["token_mean"] for entry in content["sets"]]
    assert records[-1]["validation_losses"] == pytest.approx(per_token, rel=1e-6)
    assert content["cost"]["trained_tokens"] == sum(record["tokens"] for record in records)


def test_a_converged_run_stops_where_that_is_asked_for(ran: tuple[Path, dict]) -> None:
    folder, _ = ran
    for name, steps, place in (
        ("stops early", 3, "elsewhere"), ("reweight once", 4, "reweight once"),
    ):  # fmt: skip
        code, said = noted(folder / "noted", name)
        assert code == 0, said
        assert len(metrics(folder / name)) == steps == max(saved(folder / place))
        content = json.loads((folder / name / "weights.json").read_text())
        assert (content["step"], content["complete"]) == (steps, True)
        tokens = sum(record["tokens"] for record in metrics(folder / name))
        assert content["cost"]["trained_tokens"] == tokens


def test_the_banner_says_what_a_step_takes(ran: tuple[Path, dict]) -> None:
    _, said = noted(ran[0] / "noted", "stops early")
    assert "4 of 8 training and 6 validation sequences" in said, said
    assert "eg lr 0.5, alpha 10" in said


def test_weights_average_the_last_share_of_the_steps(ran: tuple[Path, dict]) -> None:
    """p̄ = (1/n) Σ p_k of the last n, ± 3.875 √(Σ_r (Σ_{k≤r} (p_k − p̄))² / n³) at 80 %.

    With them, as squares: 2.94 times what parts the halves, 1.28 √(p̄ (1 − p̄) / examples), .01.
    """
    folder, _ = ran
    every = json.loads((folder / "mixtures.json").read_text())
    last = torch.tensor(every[1:3], dtype=torch.float64)  # of three steps, 67 %
    content = json.loads((folder / "stops early" / "weights.json").read_text())
    mean = last.mean(0)
    wandering = 3.875 * ((last - mean).cumsum(0).square().sum(0) / 8).sqrt()
    drift = 2.942474596 * (last[1] - last[0]).abs()
    examples = 25 / (9 / 8 + 1 / 5 + 1 / 6)  # sets of 8, 5 and 6 that weigh 3, 1 and 1
    sampling = 1.281551566 * (mean * (1 - mean) / examples).sqrt()
    half = (wandering**2 + drift**2 + sampling**2 + 0.01**2).sqrt()
    for number, entry in enumerate(content["sources"]):
        assert entry["weight"] == pytest.approx(float(mean[number]), rel=1e-6)
        low = max(0.0, float(mean[number] - half[number]))
        assert entry["ci_low"] == pytest.approx(low, rel=1e-5, abs=1e-9)
        high = min(1.0, float(mean[number] + half[number]))
        assert entry["ci_high"] == pytest.approx(high, rel=1e-5)
    assert float(half.min()) > 1e-3 and content["confidence"] == 0.8
