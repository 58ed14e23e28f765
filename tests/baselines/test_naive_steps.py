"""Two steps of DoReMi and of DoGE against plain autograd of their definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.commands import MODEL, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_problem

pytestmark = pytest.mark.distributed

CLIP, DOMAIN_LR, STEPS = 0.7, 2.0, 2


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("naive")
    sources, validation = write_problem(
        folder / "data", [0.6, 0.4, 0.0], 0, length=17, examples=20, validation=20
    )
    write_config(
        folder / "x.yaml", sources, validation,
        model={**MODEL, "init_method_std": 0.1},
        train={"global_batch_size": 12, "micro_batch_size": 2},
        optimizer={"lr": 5e-3, "clip_grad": CLIP},
        baseline={"domain_lr": DOMAIN_LR},
    )  # fmt: skip
    run_distributed(on_one_rank, 1, str(folder))
    return folder


def on_one_rank(folder_name: str) -> None:
    from megatron_scalebio import runtime
    from megatron_scalebio.baselines import doge, doremi
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.model.init import initialize_weights
    from megatron_scalebio.model.provider import build_model

    folder = Path(folder_name)
    for method in ("doremi", "doge"):
        config = load_config(str(folder / "x.yaml"), {"baseline": {"method": method}})
        runtime.start(config)
        kept = []
        if method == "doremi":
            state = doremi.DoremiState(config, folder / "cache")
            reference = build_model(config, state.megatron, state.data.vocab_size)
            initialize_weights(reference, 99, 0.1, config.model.num_layers)
        else:
            state = doge.DogeState(config, folder / "cache")
        mean_norm = None
        for _ in range(STEPS):
            before = state.weight_S
            train, valid = peeked_examples(state, method == "doge")
            if method == "doremi":
                wanted = naive_doremi(state.w[0], reference[0], train, before)
                record = doremi.doremi_step(state, reference)
            else:
                rate = DOMAIN_LR * state.schedule.at(state.step).lr_w / config.optimizer.lr
                *wanted, mean_norm = naive_doge(state.w[0], train, valid, before, rate, mean_norm)
                record = doge.doge_step(state)
            assert record["skipped"] is None
            gradient = [p.main_grad.clone() for p in state.w[0].parameters()]
            score = record["excess_loss" if method == "doremi" else "alignment"]
            got = (torch.tensor(score), state.weight_S, flat(gradient))
            kept.append({"got": list(got), "wanted": list(wanted)})
        torch.save(kept, folder / f"{method}.pt")
        state.leave_period()
        runtime.stop_model_parallel()


def peeked_examples(state, with_validation: bool) -> tuple[list[list], list]:
    """The examples of the next step, by source, and those of the validation set."""
    data = state.data
    samplers = (data.sampler, data.validation_sampler)
    saved = [sampler.state_dict() for sampler in samplers]
    picks = data.sampler.next(torch.full((3,), 1 / 3, dtype=torch.float64).numpy())
    train: list[list] = [[], [], []]
    for g, i in zip(picks.group_B, picks.index_B, strict=True):
        train[g].append(torch.tensor(data.sources[g].example(i)[0].astype("int64")))
    picks = data.validation_sampler.next(data.shares_V)
    valid = [torch.tensor(data.validation[0].example(i)[0].astype("int64")) for i in picks.index_B]
    for sampler, content in zip(samplers, saved, strict=True):
        sampler.load_state_dict(content)
    return train, valid if with_validation else []


def token_loss(model, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[None, :-1], torch.arange(len(tokens) - 1)[None], None)[0]
    return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")


def mean_loss(model, examples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([token_loss(model, tokens).mean() for tokens in examples]).mean()


def flat(parts) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    return flat(torch.autograd.grad(loss, list(model.parameters())))


def clipped(vector: torch.Tensor) -> torch.Tensor:
    return vector * min(1.0, CLIP / float(vector.norm()))


def naive_doremi(proxy, reference, train: list[list], weight_S: torch.Tensor) -> tuple:
    score = []
    for examples in train:
        excess = [(token_loss(proxy, x) - token_loss(reference, x)).clamp(min=0) for x in examples]
        score.append(torch.cat(excess).mean().detach())
    score_S = torch.stack(score).double()
    weight_S = weight_S * torch.exp(DOMAIN_LR * score_S)
    weight_S = 0.999 * weight_S / weight_S.sum() + 0.001 / 3
    whole = sum(p * mean_loss(proxy, x) for p, x in zip(weight_S, train, strict=True))
    return score_S, weight_S, clipped(gradient(proxy, whole))


def naive_doge(
    model, train: list[list], valid: list, weight_S: torch.Tensor, rate: float,
    mean_norm: float | None,
) -> tuple:  # fmt: skip
    target = clipped(gradient(model, mean_loss(model, valid)))
    each = [clipped(gradient(model, mean_loss(model, examples))) for examples in train]
    mean_norm = mean_norm or float(target.norm())
    score_S = torch.stack([g @ target / mean_norm for g in each]).double()
    weight_S = weight_S * torch.exp(rate * score_S)
    weight_S = weight_S / weight_S.sum()
    whole = sum(float(p) * g for p, g in zip(weight_S, each, strict=True))
    return score_S, weight_S, clipped(whole), float(torch.stack(each).norm(dim=1).mean())


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("method", ["doremi", "doge"])
def test_a_step_equals_its_definition(steps: Path, method: str, step: int) -> None:
    kept = torch.load(steps / f"{method}.pt", weights_only=True)[step]
    for what, got, wanted in zip(
        ("score", "weights", "gradient"), kept["got"], kept["wanted"], strict=True
    ):
        assert wanted.norm() > 0, what
        error = float((got.double() - wanted.double()).norm() / wanted.double().norm())
        assert error < 1e-4, (what, got, wanted)
    score_S = kept["wanted"][0]
    assert float(score_S.max() - score_S.min()) > 1e-3, "the sources differ"


def test_weights_from_numbers_worked_out_by_hand() -> None:
    """α = (.5 .5), excess (0, ln 3), η = 1: (.25 .75), then a thousandth of it uniform."""
    from megatron_scalebio.baselines.doremi import reweighted

    half = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    got = reweighted(half, torch.tensor([0.0, 3.0], dtype=torch.float64).clamp_min(1).log(), 1.0)
    assert got.exp().tolist() == pytest.approx([0.24975 + 0.0005, 0.74925 + 0.0005])
