"""Two steps of DoReMi, DoGE and FastMix against plain autograd of their definitions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.commands import MODEL, write_config
from tests.distributed.harness import next_layout, run_distributed
from tests.markov import write_problem

pytestmark = pytest.mark.distributed

STEPS, SHARES = 2, (0.75, 0.25)
LARGEST = {"doge": 5.0, "doge-few": 5.0, "doge-token": 0.05}
# Of each case: what its configuration changes, η or η / μ, and the bound of norms.
CASES: dict[str, tuple[dict[str, dict], float, float]] = {
    "doremi": ({"baseline": {"domain_lr": 2.0}}, 2.0, 0.7),
    "doremi-token": ({"data": {"loss_mean": "token"}}, 1.0, 0.7),
    "doremi-dropout": ({"model": {"hidden_dropout": 0.3, "attention_dropout": 0.3}}, 1.0, 0.7),
    "doge": ({"baseline": {"domain_lr": 2.0}}, 2.0, 0.7),
    # Fewer places than validation sets; no bound of norms, which would hide how much one counts.
    "doge-few": (
        {
            "baseline": {"domain_lr": 2.0}, "optimizer": {"clip_grad": 0.0},
            "train": {"micro_batch_size": 1, "validation_batch_size": 1},
        },
        2.0, math.inf,
    ),
    # The published reach of 100 over 200 steps, no bound of norms, a tight one of scores.
    "doge-token": (
        {
            "data": {"loss_mean": "token"}, "train": {"train_iters": 200},
            "optimizer": {"clip_grad": 0.0}, "model": {"init_method_std": 0.6},
        },
        0.5, math.inf,
    ),
    "fastmix": ({"baseline": {"domain_lr": 0.3}}, 0.3, 0.7),
    # Fewer places than sources, and than validation sets.
    "fastmix-few": (
        {
            "baseline": {"domain_lr": 0.3},
            "train": {"global_batch_size": 2, "micro_batch_size": 1, "validation_batch_size": 1},
        },
        0.3, 0.7,
    ),
    # 16 over 200 steps; an output layer of its own, whose logits are capped, and frozen under LISA.
    "fastmix-token": (
        {
            "data": {"loss_mean": "token"}, "train": {"train_iters": 200},
            "model": {
                "untie_embeddings_and_output_weights": True, "final_logit_softcapping": 1.0,
            },
            "lisa": {"lisa_layers": 2, "lisa_train_embedding": False},
        },
        0.08, 0.7,
    ),
}  # fmt: skip
Example = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("naive")
    sources, first = write_problem(
        folder / "data", [0.6, 0.4, 0.0], 0, length=17, examples=(20, 28, 36), validation=20,
        even=False,
    )  # fmt: skip
    _, second = write_problem(
        folder / "more", [0.0, 0.5, 0.5], 0, length=17, examples=1, validation=14, even=False
    )
    validation = [
        {"name": name, "path": entry["path"], "weight": weight}
        for name, [entry], weight in (("first", first, 3.0), ("second", second, 1.0))
    ]
    write_config(
        folder / "x.yaml", sources, validation,
        model={**MODEL, "init_method_std": 0.1},
        train={"global_batch_size": 12, "micro_batch_size": 2, "validation_batch_size": 8},
        optimizer={"lr": 5e-3, "clip_grad": 0.7, "lr_warmup_fraction": 0.0},
    )  # fmt: skip
    run_distributed(on_one_rank, 1, str(folder))
    return folder


def on_one_rank(folder_name: str) -> None:
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods import doge, doremi, fastmix
    from megatron_scalebio.model.init import initialize_weights

    folder = Path(folder_name)
    for name, (change, rate, clip) in CASES.items():
        method = name.partition("-")[0]
        change = {**change, "baseline": {"method": method, **change.get("baseline", {})}}
        config = load_config(str(folder / "x.yaml"), change)
        runtime.start(config)
        kept: list[dict[str, Any]] = []
        if method == "doremi":
            state = doremi.DoremiState(config, folder / "cache")
            reference = state.reference
            initialize_weights(reference, 99, 0.1, config.model.num_layers)
        elif method == "fastmix":
            state = fastmix.FastmixState(config, folder / "cache")
        else:
            state = doge.DogeState(config, folder / "cache")
            assert doge.LARGEST_SCORE == 5.0, "published"
            doge.LARGEST_SCORE = LARGEST[name]
        means = Means(config.data.loss_mean)
        mean_norm, moments, tokens = None, [], 0
        for _ in range(STEPS):
            before, iters = state.weight_S, config.train.train_iters
            train, valid, *chances = peeked_examples(state, method != "doremi")
            [w] = state.training.w
            state.training.enter_period()  # which freezes what does not train
            if method == "doremi":
                wanted = naive_doremi(w, reference[0], means, train, before, rate, clip)
                record = state.make_step()
            elif method == "fastmix":
                wanted = naive_fastmix(
                    w, means, train, valid, before, rate, moments, clip, *chances
                )
                record = state.make_step()
            else:
                decayed = 0.1 + 0.9 * (1 + math.cos(math.pi * (state.step + 1) / iters)) / 2
                *wanted, mean_norm = naive_doge(
                    w, means, train, valid, before, rate * decayed, mean_norm, clip,
                    LARGEST[name], chances[1],
                )  # fmt: skip
                record = state.make_step()
            assert record["skipped"] is None
            score = record["excess_loss" if method == "doremi" else "alignment"]
            losses = [record["train_loss_w"], *record["loss_w"]]  # NaN of what is not there
            if method != "doremi":
                losses += [record["validation_loss"], *record["validation_losses"]]
            trained = [p for p in state.training.w[0].parameters() if p.requires_grad]
            gradient = [p.main_grad.clone() for p in trained]
            got = [torch.tensor(score), state.weight_S, torch.tensor(losses), flat(gradient)]
            if "dropout" in name:  # drawn anew where the gradient is taken
                got, wanted = got[:2], wanted[:2]
            tokens += sum(len(x) - 1 for group in (*train, *valid) for x, _ in group)
            kept.append({"got": got, "wanted": list(wanted)})
        mean = torch.stack([step["wanted"][1] for step in kept]).mean(0)
        cost = [tokens, 2 * tokens if method == "doremi" else 0]
        kept[-1]["got"] += [
            state.mean_weight_S,
            torch.tensor([state.cost.trained, state.cost.scored]),
        ]
        kept[-1]["wanted"] += [mean, torch.tensor(cost)]
        torch.save(kept, folder / f"{name}.pt")
        state.training.leave_period()
        next_layout()


def peeked_examples(state, with_validation: bool) -> tuple:
    """The examples of the next step by source, those of the validation sets by set, and how likely
    each was to be there."""
    data = state.data
    samplers = (data.sampler, data.validation_sampler)
    saved = [sampler.state_dict() for sampler in samplers]
    picks = data.sampler.next(np.full(3, 1 / 3))
    train = grouped(data.sources, picks)
    valid_picks = data.validation_sampler.next(np.array(SHARES))
    valid = grouped(data.validation, valid_picks)
    for sampler, content in zip(samplers, saved, strict=True):
        sampler.load_state_dict(content)
    chances = (torch.from_numpy(each.inclusion_S) for each in (picks, valid_picks))
    return train, valid if with_validation else [], *chances


def grouped(sources, picks) -> list[list[Example]]:
    groups: list[list[Example]] = [[] for _ in sources]
    for g, i in zip(picks.group_B, picks.index_B, strict=True):
        tokens, targets = (torch.from_numpy(x.astype("int64")) for x in sources[g].example(i))
        groups[g].append((tokens, targets))
    return groups


def token_loss(model, example: Example) -> torch.Tensor:
    """Of an example's target tokens."""
    tokens, targets = example
    logits = model(tokens[None, :-1], torch.arange(len(tokens) - 1)[None], None)[0]
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    return losses[targets[1:] > 0]


@dataclass(frozen=True)
class Means:
    """ℓ of some examples: the mean of their means over targets, or of all their targets."""

    kind: str

    def loss(self, model, examples: list[Example]) -> torch.Tensor:
        losses = [token_loss(model, example) for example in examples]
        if self.kind == "token":
            return torch.cat(losses).mean()
        return torch.stack([each.mean() for each in losses]).mean()


def flat(parts) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    trained = [p for p in model.parameters() if p.requires_grad]
    return flat(torch.autograd.grad(loss, trained))


def clipped(vector: torch.Tensor, bound: float) -> torch.Tensor:
    return vector * min(1.0, bound / float(vector.norm()))


def naive_doremi(
    proxy, reference, means: Means, train: list[list], weight_S: torch.Tensor, eta: float,
    clip: float,
) -> tuple:  # fmt: skip
    """DoReMi's algorithm 1: λ_i, α ∝ α exp(η λ), c = 1e-3 of it uniform, gradient of Σ α_i ℓ_i."""
    score = []
    for model in (proxy, reference):
        model.eval()
    for examples in train:
        excess = [(token_loss(proxy, x) - token_loss(reference, x)).clamp(min=0) for x in examples]
        score.append(torch.cat(excess).mean().detach())
    for model in (proxy, reference):
        model.train()
    score_S = torch.stack(score).double()
    weight_S = weight_S * torch.exp(eta * score_S)
    weight_S = 0.999 * weight_S / weight_S.sum() + 0.001 / 3
    each = [means.loss(proxy, x) for x in train]
    whole = sum(p * loss for p, loss in zip(weight_S, each, strict=True))
    losses = torch.tensor([float(whole), *map(float, each)])
    return score_S, weight_S, losses, clipped(gradient(proxy, whole), clip)


def naive_doge(
    model, means: Means, train: list[list], valid: list[list], weight_S: torch.Tensor, rate: float,
    mean_norm: float | None, clip: float, largest: float, chance_V: torch.Tensor,
) -> tuple:  # fmt: skip
    """W_i = ⟨g_i, g⟩ / m between ± `largest`, α ∝ α exp(rate W), and the gradient Σ α_i g_i.

    A validation set that is there stands for 1 / chance of its like.
    """
    goals = [means.loss(model, x) if x else torch.tensor(math.nan) for x in valid]
    q_V = torch.tensor(SHARES) / chance_V
    goal = summed(q_V, goals)
    target = clipped(gradient(model, goal), clip)
    losses = [means.loss(model, examples) for examples in train]
    each = [clipped(gradient(model, loss), clip) for loss in losses]
    mean_norm = mean_norm or float(target.norm())
    score_S = torch.stack([g @ target / mean_norm for g in each]).double().clamp(-largest, largest)
    weight_S = weight_S * torch.exp(rate * score_S)
    weight_S = weight_S / weight_S.sum()
    whole = sum(float(p) * g for p, g in zip(weight_S, each, strict=True))
    mixed = sum(float(p) * float(loss) for p, loss in zip(weight_S, losses, strict=True))
    l1 = goal / summed(q_V, [loss / loss for loss in goals])
    told = torch.tensor([mixed, *map(float, losses), float(l1), *map(float, goals)])
    norm = float(torch.stack(each).norm(dim=1).mean())
    return score_S, weight_S, told, clipped(whole, clip), norm


def naive_fastmix(
    model, means: Means, train: list[list], valid: list[list], weight_S: torch.Tensor, rate: float,
    moments: list[tuple[torch.Tensor, torch.Tensor]], clip: float, chance_S: torch.Tensor,
    chance_V: torch.Tensor,
) -> tuple:  # fmt: skip
    """a_i = ⟨∇ℓ_i, ∇L1⟩ in the output layer; Adam of −⟨p, a⟩ on z; the gradient Σ p_i ∇ℓ_i.

    What is there stands for 1 / chance of its like, and a_i of what is not is 0.
    """
    layer = model.output_layer
    tied = model.share_embeddings_and_output_weights
    weight = (model.embedding.word_embeddings if tied else layer).weight.detach()
    weight.requires_grad_()
    copied = layer.register_forward_hook(
        lambda layer, inputs, output: (torch.nn.functional.linear(inputs[0], weight), None),
        prepend=True,
    )
    q_V, p_S = torch.tensor(SHARES) / chance_V, weight_S / chance_S

    def goal_and_losses() -> tuple:
        goals, losses = (
            [means.loss(model, x) if x else torch.tensor(math.nan) for x in examples]
            for examples in (valid, train)
        )
        return summed(q_V, goals), summed(p_S, losses), goals, losses

    goal, _, _, losses = goal_and_losses()
    target = torch.autograd.grad(goal, weight)[0]
    score_S = torch.zeros(len(train), dtype=torch.float64)
    for i, loss in enumerate(losses):
        if not loss.isnan():
            score_S[i] = (torch.autograd.grad(loss, weight)[0] * target).sum() / chance_S[i]
    copied.remove()

    logits_S = weight_S.log().requires_grad_()
    (-(logits_S.softmax(0) * score_S).sum()).backward()
    moments.append((logits_S.grad, logits_S.grad.square()))
    mean_S, square_S = torch.zeros(2, len(train), dtype=torch.float64)
    for g, g2 in moments:
        mean_S, square_S = 0.9 * mean_S + 0.1 * g, 0.95 * square_S + 0.05 * g2
    mean_S, square_S = mean_S / (1 - 0.9 ** len(moments)), square_S / (1 - 0.95 ** len(moments))
    moved_S = (logits_S.detach() - rate * mean_S / (square_S.sqrt() + 1e-8)).softmax(0)

    goal, whole, goals, losses = goal_and_losses()
    told = torch.tensor([
        float(whole / summed(p_S, [loss / loss for loss in losses])), *map(float, losses),
        float(goal / summed(q_V, [loss / loss for loss in goals])), *map(float, goals),
    ])  # fmt: skip
    return score_S, moved_S, told, clipped(gradient(model, whole), clip)


def summed(weights: torch.Tensor, losses: list[torch.Tensor]) -> torch.Tensor:
    """Of those that are there."""
    parts = [p * loss for p, loss in zip(weights, losses, strict=True) if not loss.isnan()]
    return torch.stack(parts).sum()


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_its_definition(steps: Path, name: str, step: int) -> None:
    kept = torch.load(steps / f"{name}.pt", weights_only=True)[step]
    for number, (got, wanted) in enumerate(zip(kept["got"], kept["wanted"], strict=True)):
        got, wanted = got.double(), wanted.double()
        assert torch.equal(got.isnan(), wanted.isnan()), number
        got, wanted = got.nan_to_num(), wanted.nan_to_num()
        assert wanted.norm() > 0, number
        assert float((got - wanted).norm() / wanted.norm()) < 1e-4, (number, got, wanted)
    score_S = kept["wanted"][0]
    assert float(score_S.max() - score_S.min()) > 1e-3, "the sources differ"


def test_weights_from_numbers_worked_out_by_hand() -> None:
    """α = (.5 .5), excess (0, ln 3), η = 1: (.25 .75), then a thousandth of it uniform."""
    from megatron_scalebio.methods.doremi import reweighted

    half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    got = reweighted(half, torch.tensor([0.0, 3.0], dtype=torch.float64).clamp_min(1).log(), 1.0)
    assert got.exp().tolist() == pytest.approx([0.24975 + 0.0005, 0.74925 + 0.0005])
