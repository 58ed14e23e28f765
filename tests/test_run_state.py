"""A run's state from its configuration: which settings it is known by, its samplers and layout."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

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
from megatron_scalebio.data.sources import shared_vocab_size
from megatron_scalebio.engine import state as module
from megatron_scalebio.engine.state import Data, RunState, weights_by_name
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods.scalebio import TrainState
from tests.markov import write_problem

# Each of another value than its default.
OPTIMIZER = {
    "lr": 0.01, "lr_u": 0.02, "min_lr": 0.003, "lr_decay_style": "linear",
    "lr_warmup_fraction": 0.4, "weight_decay": 0.5, "adam_beta1": 0.6, "adam_beta2": 0.7,
    "adam_eps": 0.8, "clip_grad": 0.9,
}  # fmt: skip
LISA = {
    "lisa_layers": 3, "lisa_interval": 7, "lisa_train_embedding": False, "lisa_train_norm": False,
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
    "blend_floor": 0.01,
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
    assert bare(TrainState, config_of()).settings() == {**common, **learned}


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
    with pytest.raises(UserError, match="'s1' holds token 32, the vocabulary ends at 31"):
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
    assert vars(layout) == {
        "micro_batch_size": 3, "dp_rank": 2, "dp_size": 5, "pad_multiple": multiple,
        "seq_length": 33, "fixed_length": fixed, "cp_rank": 1, "cp_size": 3,
    }  # fmt: skip


def test_initial_weights_are_those_given(problem: tuple[list, list], tmp_path: Path) -> None:
    data = open_data(problem, ParallelConfig(), initial=[1.0, 3.0, 0.5])
    assert data.initial_weights() == [1.0, 3.0, 0.5]
    learned = [{"name": n, "path": "x", "weight": w} for n, w in (("s2", 0.2), ("s0", 0.7))]
    file = tmp_path / "weights.json"
    file.write_text(json.dumps({"sources": [*learned, {**learned[0], "name": "s1"}]}))
    data = open_data(problem, ParallelConfig(), weights=str(file))
    assert data.initial_weights() == [0.7, 0.2, 0.2], "by name"
    assert weights_by_name(tmp_path, ["s1", "s2", "s0"]) == [0.2, 0.2, 0.7], "a run's folder"
    with pytest.raises(UserError, match=r"holds weights of .'s0', 's1', 's2'., data.sources are"):
        weights_by_name(file, ["s0", "s1"])
