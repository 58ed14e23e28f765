"""Inner products of whole gradients: naive autograd's, whatever the layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed import naive
from tests.distributed.gather import global_tensors
from tests.distributed.harness import next_layout, run_distributed
from tests.markov import VOCAB, write_problem

pytestmark = pytest.mark.distributed

MODEL = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2,
    "ffn_hidden_size": 48, "make_vocab_size_divisible_by": 16, "init_method_std": 0.1,
}  # fmt: skip
SHAPE = {"layers": 2, "heads": 4, "groups": 2, "vocab": VOCAB}
DIST = {"use_distributed_optimizer": True}
LAYOUTS: dict[str, tuple[int, dict, dict]] = {
    "one": (1, {}, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, {}),
    "dp2": (2, {}, {}),
    "dp2-distributed-optimizer": (2, DIST, {}),
    "cp2": (2, {"context_parallel_size": 2}, {}),
    "one-lisa": (1, {}, {"lisa_layers": 1}),
    "dp2-distributed-optimizer-lisa": (2, DIST, {"lisa_layers": 1}),
}


def config_of(problem: dict, name: str):
    from megatron_scalebio.config_loader import load_config

    ranks, parallel, lisa = LAYOUTS[name]
    tree = {
        "data": {"seq_length": 16, **problem}, "model": MODEL, "parallel": parallel, "lisa": lisa,
        "train": {"micro_batch_size": 2, "global_batch_size": 8},
    }  # fmt: skip
    config = load_config(None, tree)
    config.validate(ranks)
    return config


def on_ranks(problem: dict, names: list[str], folder: str) -> None:
    """Of every layout: ⟨a, a⟩, ⟨a, b⟩, ⟨b, b⟩ with a of a training and b of a validation batch."""
    from megatron_scalebio import runtime
    from megatron_scalebio.core.flush import flush, passes_of
    from megatron_scalebio.engine.outputs import parameter_count
    from megatron_scalebio.engine.state import RunState
    from megatron_scalebio.methods.gradients import counted_gradients, dot
    from megatron_scalebio.mixture.objective import Role

    for name in names:
        config = config_of(problem, name)
        runtime.start(config)
        state = RunState(config, "test", Path(folder) / "cache")
        train, valid, *_ = state.data.next(torch.tensor([0.5, 0.5], dtype=torch.float64))
        period = state.training.enter_period()
        found, coefficients, groups = [], [], state.training.groups
        for batches in (train, valid):
            period.zero_grad()
            weight_G = torch.ones(2, dtype=torch.float64)
            passes = passes_of({Role.TRAIN_W: 1.0}, batches, weight_G, "sample", groups)
            flush(period.twins, passes, groups)
            coefficients.append([each.coefficient_B for each in passes])
            found.append([part.clone() for part in counted_gradients(period.ddp["w"])])
        a, b = found
        products = [dot(a, a), dot(a, b), dot(b, b)]
        content = {"products": products, "parameters": parameter_count(state)}
        if name == "one":
            content["naive"] = naive_products(state, train, valid, coefficients)
        (Path(folder) / f"{name}-{runtime.rank()}.json").write_text(json.dumps(content))
        state.training.leave_period()
        next_layout()


def naive_products(state, train: list, valid: list, coefficients: list) -> list[float]:
    weights = {k: v.double() for k, v in global_tensors(state.training.w, lambda p: p.data).items()}
    found = []
    for batches, of_batches in zip((train, valid), coefficients, strict=True):
        leaves = {k: v.clone().requires_grad_() for k, v in weights.items()}
        loss = torch.zeros((), dtype=torch.float64)
        for batch, coefficient_B in zip(batches, of_batches, strict=True):
            rows = zip(batch.tokens_BS, batch.labels_BS, coefficient_B, strict=True)
            for inputs, labels, coefficient in rows:
                tokens = torch.cat([inputs[:1], labels])
                targets = torch.ones_like(tokens)
                loss = loss + coefficient * naive.example_loss(leaves, SHAPE, tokens, targets)
        loss.backward()
        found.append(torch.cat([leaf.grad.flatten() for leaf in leaves.values()]))
    a, b = found
    return [float(a @ a), float(a @ b), float(b @ b)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    sources, validation = write_problem(
        folder / "data", [0.7, 0.3], 0, length=17, examples=30, validation=20
    )
    problem = {"sources": sources, "validation": validation}
    for ranks in (1, 2):
        names = [name for name, layout in LAYOUTS.items() if layout[0] == ranks]
        run_distributed(on_ranks, ranks, problem, names, str(folder))
    return folder


def products(folder: Path, name: str, rank: int = 0) -> list[float]:
    return json.loads((folder / f"{name}-{rank}.json").read_text())["products"]


def test_one_rank_equals_naive_autograd(results: Path) -> None:
    want = json.loads((results / "one-0.json").read_text())["naive"]
    assert products(results, "one") == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    ("one", "other"),
    [("one", name) for name in ("tp2", "pp2", "dp2", "dp2-distributed-optimizer", "cp2")]
    + [("one-lisa", "dp2-distributed-optimizer-lisa")],
)
def test_every_layout_counts_every_parameter_once(results: Path, one: str, other: str) -> None:
    want = products(results, one)
    for rank in (0, 1):
        assert products(results, other, rank) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_parameters_are_those_of_one_model(results: Path, name: str) -> None:
    """The embedding is the output layer too, and lies on both ends of a pipeline."""
    layer = 64 * 32 + 32 * 32 + 3 * 48 * 32 + 2 * 32  # attention, gated MLP, norms
    rows = VOCAB + -VOCAB % (32 if name == "tp2" else 16)
    for rank in range(LAYOUTS[name][0]):
        found = json.loads((results / f"{name}-{rank}.json").read_text())["parameters"]
        assert found == rows * 32 + 2 * layer + 32


def test_frozen_layers_are_left_out(results: Path) -> None:
    assert products(results, "one-lisa")[0] < 0.999 * products(results, "one")[0]
