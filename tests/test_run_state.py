"""A run's state from its configuration: which settings it is known by, its samplers and layout."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_scalebio.config import (
    BilevelConfig,
    Config,
    DataConfig,
    LisaConfig,
    OptimizerConfig,
    ParallelConfig,
    SourceConfig,
    TrainConfig,
    ValidationConfig,
)
from megatron_scalebio.config.bounds import GroupBounds
from megatron_scalebio.data.reuse import reused
from megatron_scalebio.data.sources import shared_vocab_size
from megatron_scalebio.engine import state as module
from megatron_scalebio.engine import update
from megatron_scalebio.engine.state import Data, RunState, TokenCost
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods import scalebio
from megatron_scalebio.methods.bounds import at_bounds, bounds_of, prior_of
from megatron_scalebio.methods.goals import broken_bound, goals_of, settle
from megatron_scalebio.methods.scalebio import TrainState
from megatron_scalebio.mixture.constraints import Constraints
from tests.core.regression import rows
from tests.markov import write_problem

# Each of another value than its default.
OPTIMIZER = {
    "lr": 0.01, "lr_u": 0.02, "min_lr": 0.003, "lr_decay_style": "linear",
    "lr_warmup_fraction": 0.4, "weight_decay": 0.5, "adam_beta1": 0.6, "adam_beta2": 0.7,
    "adam_eps": 0.8, "clip_grad": 0.9,
}  # fmt: skip
LISA = {
    "lisa_layers": 3, "lisa_interval": 7, "lisa_train_embedding": False, "lisa_train_norm": False,
    "lisa_train_routers": True,
}  # fmt: skip
TRAIN = {"seed": 77, "global_batch_size": 24, "validation_batch_size": 12}
DATA = {"seq_length": 33, "loss_mean": "token"}
BILEVEL = {
    "alpha": 3.0, "alpha_growth": 1.5, "outer_rounds": 4, "mixture_optimizer": "adamw",
    "lr_lambda": 0.07, "lr_lambda_decay_style": "cosine", "resync_interval": 6, "floor_share": 0.4,
    "memory_growth": 0.7,
}  # fmt: skip
JUDGING: dict[str, Any] = {
    "average_fraction": 0.3, "confidence": 0.9, "tolerance": 0.2, "early_stop": True,
    "blend_floor": 0.01, "final_train_iters": 30, "final_check": False,
}  # fmt: skip


def config_of(**sections: Any) -> Config:
    return Config(
        **{
            "data": DataConfig(**DATA), "optimizer": OptimizerConfig(**OPTIMIZER),
            "lisa": LisaConfig(**LISA), "train": TrainConfig(**TRAIN),
            "bilevel": BilevelConfig(**BILEVEL, **JUDGING), **sections,
        }
    )  # fmt: skip


def bare(kind: type[RunState], config: Config) -> Any:
    state = kind.__new__(kind)
    state.config = config
    return state


def test_a_run_is_known_by_all_that_decides_its_steps() -> None:
    """And not by what judges or writes, which may change when it is continued."""
    sections = {"optimizer": OPTIMIZER, "lisa": LISA, "train": TRAIN, "data": DATA}
    common = {f"{name}.{k}": v for name, each in sections.items() for k, v in each.items()}
    assert bare(RunState, config_of()).settings() == common
    learned = {f"bilevel.{name}": value for name, value in BILEVEL.items()}
    limits = dict.fromkeys((
        "bilevel.kl_to_prior", "bilevel.prior", "data.target", "data.max_epochs",
        "data.keep_ratios", "bounds of data.sources", "bilevel.objective", "bilevel.interactions",
        "bounds of data.validation", "bilevel.level", "bilevel.group_sources",
        "bounds of data.groups", "data.matched_repetition",
    ))  # fmt: skip
    assert bare(TrainState, config_of()).settings() == {**common, **learned, **limits}
    data = {"weights": "x", "keep_ratios": True, "target_examples": 9.0, "max_epochs": 2.0}
    sources = [SourceConfig("a", "p", min_weight=0.1), SourceConfig("b", "p")]
    config = config_of(data=DataConfig(sources=sources, **DATA, **data))
    config.bilevel.kl_to_prior = 0.5
    limited = bare(TrainState, config).settings()
    assert [limited[name] for name in limits][:5] == [0.5, "natural", 9.0, 2.0, True]
    sources[0].min_weight = 0.2
    assert bare(TrainState, config).settings() != limited
    config.data.validation = [ValidationConfig("v", "p"), ValidationConfig("w", "p")]
    config.bilevel.objective, config.bilevel.interactions = "worst_case", True
    several = bare(TrainState, config).settings()
    assert [several["bilevel.objective"], several["bilevel.interactions"]] == ["worst_case", True]
    config.data.validation[1].max_loss_rise = 0.0
    assert bare(TrainState, config).settings() != several
    config.data.groups = {"math": GroupBounds(max_weight=0.4)}
    assert bare(TrainState, config).settings()["bounds of data.groups"] == {"math": (0.0, 0.4)}
    config.bilevel.level = "example"
    assert bare(TrainState, config).settings()["bilevel.level"] == "example"


def test_what_a_set_is_held_to_counts_from_its_start_where_it_is_not_given() -> None:
    """A rise is in nats."""
    given = [{}, {"max_loss_rise": 0.25}, {"max_loss": 1.5}, {"reference_loss": 0.0}]
    sets = [ValidationConfig(str(number), "p", **bound) for number, bound in enumerate(given)]
    goals = goals_of(config_of(data=DataConfig(validation=sets, **DATA)))
    settle(goals, sets, [2.0, 3.0, 4.0, 5.0])
    assert goals.reference_V.tolist() == [2.0, 3.25, 1.5, 0.0]


def test_losses_at_the_start_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [ValidationConfig(name, "p") for name in "vw"]
    state = bare(TrainState, config_of(data=DataConfig(validation=sets, **DATA)))
    state.sets = SimpleNamespace(is_needed=True, start_V=None)
    state.training = SimpleNamespace(goals=goals_of(state.config))
    for losses in ([2.0, 3.0], [8.0, 9.0]):  # the second time, a checkpoint had them
        monkeypatch.setattr(scalebio, "losses_of_sets", lambda state, found=losses: found)
        state.measure_start()
        assert state.sets.start_V == state.training.goals.reference_V.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("u_is_w", [False, True])
def test_a_swing_is_no_part_of_the_weights_that_are_told(u_is_w: bool) -> None:
    """And examples are visited where u has parted from w."""
    nothing_V, told, visited, seen = torch.zeros(2), [], [], []
    goals = SimpleNamespace(swing_V=nothing_V, shares_V=torch.tensor([0.75, 0.25]))
    picks: Any = SimpleNamespace(inclusion_S=np.ones(2))
    losses = SimpleNamespace(tokens=7, w_S=torch.tensor([1.0, 2.0]), u_S=torch.tensor([1.5, 1.0]))

    def step(*given: Any, **options: Any) -> Any:
        seen.append(goals.swing_V.tolist())
        half_S = torch.tensor([0.5, 0.5])
        return SimpleNamespace(
            losses=losses, shares_V=goals.shares_V + goals.swing_V, weights_S=half_S, alpha=2.0,
            step=3, skipped=None,
        )  # fmt: skip

    rates = SimpleNamespace(lr_w=0.1, lr_u=0.1, lr_lambda=0.1, alpha=2.0)
    state: Any = SimpleNamespace(
        step=2, cost=TokenCost(), clock=lambda part: nullcontext(),
        schedule=SimpleNamespace(at=lambda step: rates),
        data=SimpleNamespace(next=lambda *given: ([], [], picks, picks)),
        sets=SimpleNamespace(path=SimpleNamespace(append=lambda x: told.append(x.tolist()))),
        visits=SimpleNamespace(append=lambda *given: visited.append(given[0])),
        interactions=SimpleNamespace(
            begin_step=lambda *given: None, append=lambda *given: None,
            swing=lambda step, shares_V: torch.tensor([0.125, -0.125]),
        ),
        training=SimpleNamespace(
            goals=goals, mixture=SimpleNamespace(probs_S=torch.ones(2)), memory=1.0, step=step,
            u_is_w=u_is_w, grown_alpha=lambda alpha: alpha,
        ),
    )  # fmt: skip
    scalebio.train_step(state)
    assert seen == [[0.125, -0.125]] and told == [[0.75, 0.25]]
    assert goals.swing_V is nothing_V and state.cost.trained == 7
    assert visited == ([] if u_is_w else [3])


def test_what_is_in_a_batch_of_few_places_stands_for_its_like(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a step of w alone. The second source is in two batches of five, and weighs 1 / 0.4."""
    flushed: list[Any] = []
    one, alone = SimpleNamespace(size=lambda: 1), SimpleNamespace(zero_grad=lambda: None)
    state: Any = SimpleNamespace(
        config=config_of(), clock=lambda part: nullcontext(),
        training=SimpleNamespace(
            groups=SimpleNamespace(cp=one, dp=one), enter_period=lambda: alone,
            flush=lambda passes, sources: flushed.extend(passes),
        ),
    )  # fmt: skip
    monkeypatch.setattr(update, "step_w", lambda *given: {})
    picks: Any = SimpleNamespace(inclusion_S=np.array([1.0, 0.4]))
    update.train_on(state, [rows(0, [0, 0, 1])], picks, torch.tensor([0.75, 0.25]))
    [only] = flushed
    assert only.weight_B.tolist() == pytest.approx([0.75 / 2, 0.75 / 2, 0.25 / 0.4])


@pytest.mark.parametrize(
    ("skipped", "told"),
    [(None, None), ("w: loss of source 1 is nan", "w: loss of source 'web' is nan")],
)
def test_a_step_of_w_alone_is_told_with_the_name_of_the_source_that_spoiled_it(
    skipped: str | None, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = SimpleNamespace(norms={"w": 3.0}, skipped=skipped)
    sources = [SimpleNamespace(name=name) for name in ("math", "web")]
    state: Any = SimpleNamespace(
        step=4, cost=TokenCost(), clock=lambda part: nullcontext(),
        schedule=SimpleNamespace(at=lambda step: SimpleNamespace(lr_w=0.1)),
        data=SimpleNamespace(sources=sources, validation=[]),
        training=SimpleNamespace(update=lambda *given: done, active_layers=None),
    )  # fmt: skip
    monkeypatch.setattr(update.runtime, "allocated_bytes", lambda: 5)
    losses: Any = SimpleNamespace(w_S=torch.tensor([1.0, 2.0], dtype=torch.float64), tokens=7)
    picks: Any = SimpleNamespace(inclusion_S=np.ones(2))
    half_S = torch.tensor([0.5, 0.5], dtype=torch.float64)
    record = update.step_w(state, losses, picks, half_S)
    assert record["skipped"] == told and record["train_loss_w"] == 1.5
    assert state.cost.trained == record["tokens"] == 7


def test_a_bound_is_kept_within_half_a_percent() -> None:
    sets: list[dict] = [{"name": "a", "loss": 9.0}, {"name": "b", "loss": None, "max_loss": 1.0}]
    assert broken_bound([*sets, {"name": "c", "loss": 2.0099, "max_loss": 2.0}]) == ""
    said = broken_bound([*sets, {"name": "c", "loss": 2.0101, "max_loss": 2.0}])
    assert said.startswith("the loss of c is 2.0101, above its bound of 2.0000")


def test_a_prior_of_nothing_is_a_ten_thousandth_of_an_equal_weight() -> None:
    config: Any = SimpleNamespace(
        bilevel=SimpleNamespace(prior="initial"), data=SimpleNamespace(sources=[])
    )
    data: Any = SimpleNamespace(initial_weights=lambda: [3.0, 0.0, 1.0, 0.0])
    assert prior_of(config, data) == pytest.approx([3.0, 1e-4, 1.0, 1e-4], rel=1e-12)


def test_a_weight_is_held_by_a_bound_that_was_given() -> None:
    """Neither 0 nor 1 is one."""
    kept = Constraints([0.5, 0.1, 0, 0, 0, 0.1], [0.5, 1, 0.3, 1, 1, 0.6])
    held = at_bounds(kept, [0.5, 0.1, 0.3, 0.0, 1.0, 0.2])
    assert held == ["fixed", "min", "max", None, None, None]
    assert at_bounds(None, [1.0]) is None


# ---- its data ------------------------------------------------------------------------------------


@pytest.fixture
def problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list, list]:
    """Three sources of 30 examples and a validation set; this is rank 2 of 5, and 1 of 3 in CP."""
    for name, value in {
        "on_main": lambda work: work(), "is_main": lambda: True,
        "dp_rank": lambda: 2, "dp_size": lambda: 5, "cp_rank": lambda: 1, "cp_size": lambda: 3,
    }.items():  # fmt: skip
        monkeypatch.setattr(module.runtime, name, value)
    return write_problem(
        tmp_path / "data", [0.6, 0.4, 0.0], 0, length=34, examples=30, validation=20
    )


def open_data(problem: tuple[list, list], parallel: ParallelConfig, **options: Any) -> Data:
    sources = [SourceConfig(**entry) for entry in problem[0]]
    for source, weight in zip(sources, options.pop("initial", [None] * 3), strict=True):
        source.initial_weight = weight
    [validation] = problem[1]
    sets = [ValidationConfig(f"v{weight}", validation["path"], weight) for weight in (1.0, 4.0)]
    data = DataConfig(sources=sources, validation=sets, **DATA, **options)
    train = TrainConfig(**TRAIN, micro_batch_size=3)
    cache = Path(validation["path"]).parent / "cache"
    return Data(config_of(data=data, train=train, parallel=parallel), cache)


def test_samplers_are_as_configured(problem: tuple[list, list]) -> None:
    data = open_data(problem, ParallelConfig())
    samplers = (data.sampler, data.validation_sampler)
    assert [s.sizes_S.tolist() for s in samplers] == [[30, 30, 30], [20, 20]]
    assert [s.batch_size for s in samplers] == [24, 12]
    assert [s.seed for s in samplers] == [77, 78], "two orders, not one twice"
    assert [s.floor_share for s in samplers] == [0.4, 0.5]
    assert data.shares_V.tolist() == [0.2, 0.8]
    assert data.initial_weights() == [1.0, 1.0, 1.0]


def test_a_models_own_vocabulary_may_be_larger_than_its_tokenizers() -> None:
    tokenizer = {"fingerprint": "x", "vocab_size": 32}
    source: Any = SimpleNamespace(tokenizer=tokenizer, largest_id=31)
    assert [shared_vocab_size([source], size) for size in (None, 32, 40)] == [32, 32, 40]
    source.name, source.prefix, source.largest_id = "s1", "data/s1/tokens", 32
    held = r"'s1' holds token 32, the vocabulary ends at 31 "
    with pytest.raises(UserError, match=held + r"\(the file is damaged, or was made with another"):
        shared_vocab_size([source], 32)
    source.tokenizer = None  # of a packed prefix, which does not tell
    with pytest.raises(UserError, match=held + r"\(set model.vocab_size"):
        shared_vocab_size([source], 32)


CP5_TP3 = {"context_parallel_size": 5, "tensor_model_parallel_size": 3}
VPP = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}


@pytest.mark.parametrize(
    ("parallel", "multiple", "fixed"),
    [
        ({}, 8, False),
        # 2 · 5 chunks of CP, times TP with sequence parallelism; and eights, or sixteens a rank
        (CP5_TP3, 40, False),
        ({**CP5_TP3, "sequence_parallel": True}, 120, False),
        (
            {**CP5_TP3, "context_parallel_size": 4, "bf16": True, "fp8_format": "hybrid"},
            192, False,
        ),
        (VPP, 8, True),
    ],
)  # fmt: skip
def test_batches_are_cut_for_this_rank_and_padded_for_its_layout(
    problem: tuple[list, list], parallel: dict[str, Any], multiple: int, fixed: bool
) -> None:
    layout = open_data(problem, ParallelConfig(**parallel)).layout
    stages = 2 if fixed else 1  # an interleaved pipeline takes rows by its stages
    assert vars(layout) == {
        "micro_batch_size": 3, "dp_rank": 2, "dp_size": 5, "pad_multiple": multiple,
        "seq_length": 33, "fixed_length": fixed, "cp_rank": 1, "cp_size": 3,
        "packed": False, "rows_multiple": 5 * stages,
    }  # fmt: skip


def test_initial_weights_are_those_given(problem: tuple[list, list], tmp_path: Path) -> None:
    data = open_data(problem, ParallelConfig(), initial=[1.0, 3.0, 0.5])
    assert data.initial_weights() == [1.0, 3.0, 0.5]
    learned = [{"name": n, "path": "x", "weight": w} for n, w in (("s2", 0.2), ("s0", 0.7))]
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"sources": [*learned, {**learned[0], "name": "s1"}]}))
    data = open_data(problem, ParallelConfig(), weights=str(file))
    assert data.initial_weights() == pytest.approx([7 / 11, 2 / 11, 2 / 11]), "by name"
    assert data.former is not None and data.former.known == [True] * 3


def former(folder: Path, **weights: float) -> Path:
    sources = [{"name": n, "path": "x", "weight": w} for n, w in weights.items()]
    (folder / "weights.json").write_text(json.dumps({"sources": sources}))
    return folder


def test_known_sources_keep_their_ratios_and_new_ones_enter_at_their_share(tmp_path: Path) -> None:
    path = former(tmp_path, a=0.6, b=0.2, gone=0.2)
    found = reused(path, ["new", "b", "a", "other"], 0.1)
    assert found.weights == pytest.approx([0.05, 0.225, 0.675, 0.05])
    assert (found.known, found.gone) == ([False, True, True, False], ["gone"])
    assert found.described() == (
        "2 sources; 2 new; left out, as they are no sources any more: gone"
    )
    assert reused(path / "weights.json", ["b", "a"], None).weights == pytest.approx([0.25, 0.75])
    prior = reused(path, ["new", "b", "a"], None, [0.4, 0.3, 0.3])
    assert prior.weights == pytest.approx([0.4, 0.15, 0.45])


def test_the_parts_of_a_former_source_share_its_weight_by_their_examples(tmp_path: Path) -> None:
    path = former(tmp_path, a=0.6, b=0.2, gone=0.2)
    names, examples = ["a/x", "b", "a/y/z", "b/x"], [10.0, 7.0, 30.0, 5.0]
    found = reused(path, names, 0.2, examples_S=examples)
    assert found.weights == pytest.approx([0.15, 0.2, 0.45, 0.2]), "b/x is new: b is still there"
    assert (found.known, found.gone) == ([True, True, True, False], ["gone"])
    assert found.split == {"a": ["a/x", "a/y/z"]}
    assert found.described().endswith("; a is split into a/x, a/y/z, by their examples")
    prior = reused(path, ["a/x", "b", "a/y"], None, [0.6, 0.2, 0.2])
    assert prior.weights == pytest.approx([0.5625, 0.25, 0.1875])
    nested = {"a": 0.5, "a/x": 0.3, "b": 0.2}
    found = reused(former(tmp_path, **nested), ["a/x/1", "a/x/2", "a/y", "b"], None)
    assert found.weights == pytest.approx([0.15, 0.15, 0.5, 0.2]), "the nearest one is split"


def test_sources_that_keep_their_ratios_meet_their_caps_together(
    problem: tuple[list, list], tmp_path: Path
) -> None:
    """Two passes over any of them are 0.6 of the final training: with three of s0, one of s1."""
    options: dict[str, Any] = {"new_share": 0.2, "keep_ratios": True, "target_examples": 100}
    weights = str(former(tmp_path, s0=0.6, s1=0.2))
    data = open_data(problem, ParallelConfig(), weights=weights, max_epochs=2.0, **options)
    assert data.former is not None
    low_S, high_S, _ = bounds_of(data.config, data, data.former.known)
    assert (low_S, high_S) == ([0.0] * 3, pytest.approx([0.6, 0.2, 0.6]))
    assert bounds_of(data.config, data, None)[1] == pytest.approx([0.6] * 3)


@pytest.mark.parametrize(
    ("names", "share", "words"),
    [
        (["x", "y"], 0.1, "has a weight of none of the sources x, y; its own are a, b"),
        (["a", "x"], None, "has no weight of x (give new_share"),
        (["a", "b"], 0.1, "new_share: 0.1 is for sources that"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, names: list[str], share: float | None, words: str
) -> None:
    with pytest.raises(UserError) as refused:
        reused(former(tmp_path, a=0.6, b=0.4), names, share)
    assert words in str(refused.value)
