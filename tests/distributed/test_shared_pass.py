"""Where u equals w, one pass on the training data serves both: the same step, a third cheaper."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.commands import MODEL
from tests.distributed.harness import next_layout, run_distributed
from tests.markov import write_problem

pytestmark = pytest.mark.distributed
STEPS = 9
EXPERTS = {
    "num_experts": 4, "moe_router_score_function": "sigmoid", "moe_aux_loss_coeff": 0.1,
    "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.05,
}  # fmt: skip
CASES: dict[str, tuple[int, dict, dict]] = {
    "one": (1, {}, {}),
    "one-lisa": (1, {}, {"lisa_layers": 1, "lisa_interval": 3}),
    "dp2-distributed-optimizer": (2, {"use_distributed_optimizer": True}, {}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}, {}),
    "experts-replay": (1, {}, {}),
    "experts-ep2": (2, {"expert_model_parallel_size": 2}, {}),
}


def on_ranks(folder: str, sources: list, validation: list, names: list[str]) -> None:
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.scalebio import TrainState, train_step

    for name in names:
        _, parallel, lisa = CASES[name]
        config = load_config(None, {
            "data": {"seq_length": 16, "sources": sources, "validation": validation},
            "model": {
                **MODEL, **(EXPERTS if "experts" in name else {}),
                "moe_enable_routing_replay": "replay" in name,
            },
            "parallel": parallel, "lisa": lisa,
            # An eps that rounding noise does not reach, as in test_exact_step.
            "optimizer": {"lr": 3e-3, "adam_eps": 1e-5},
            "bilevel": {"resync_interval": 3},
            "train": {"train_iters": 50, "micro_batch_size": 2, "global_batch_size": 8},
        })  # fmt: skip
        runtime.start(config)
        traces = {}
        for kind in ("shared", "apart"):
            state = TrainState(config, Path(folder) / "cache")
            if kind == "apart":
                state.training.flush_takes = lambda passes: False  # type: ignore[method-assign]
            trace, tokens = [], []
            for _ in range(STEPS):
                result = train_step(state)
                losses = result.losses
                tokens.append(losses.tokens)
                trace.append(torch.cat([losses.w_S, losses.u_S, losses.validation_V]))
            traces[kind] = {"trace": torch.stack(trace), "tokens": tokens}
            traces[kind]["weights"] = state.training.mixture.probs_S
            state.training.leave_period()
        if dist.get_rank() == 0:
            torch.save(traces, Path(folder) / f"{name}.pt")
        next_layout()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared-pass")
    sources, validation = write_problem(
        folder / "data", [0.6, 0.4], 0, length=17, examples=50, validation=40
    )
    for ranks in (1, 2):
        names = [name for name, case in CASES.items() if case[0] == ranks]
        run_distributed(on_ranks, ranks, str(folder), sources, validation, names)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_one_pass_for_both_gives_the_same_steps(results: Path, name: str) -> None:
    runs = torch.load(results / f"{name}.pt", weights_only=True)
    shared, apart = runs["shared"], runs["apart"]
    torch.testing.assert_close(shared["trace"], apart["trace"], rtol=0, atol=1e-5)
    torch.testing.assert_close(shared["weights"], apart["weights"], rtol=0, atol=1e-4)
    fewer = [a < b for a, b in zip(shared["tokens"], apart["tokens"], strict=True)]
    assert fewer == [step % 3 == 0 for step in range(STEPS)], "every step after a reset"
