"""A run of a mixture of experts goes on under another expert parallelism, and refuses another's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.commands import command, metrics, note, noted, the_only_line, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_problem

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
EP2 = ["--expert-model-parallel-size", 2]
EP4 = ["--expert-model-parallel-size", 4]
ZERO = ["--use-distributed-optimizer"]
RESTING = [*ZERO, "--bf16", "--lisa-layers", 1, "--lisa-interval", 4]
STEPS = 9
# output: (ranks, flags, whose checkpoint it goes on from, and which)
RUNS: dict[str, tuple[int, list, str | None, int]] = {
    "ep2": (2, [*ZERO, *EP2], None, 0),
    "ep2 resumed": (2, [*ZERO, *EP2, "--async-save"], "ep2", 3),
    "resting": (2, [*RESTING, *EP2], None, 0),
    "resting resumed": (2, [*RESTING, *EP2], "resting", 6),
    "then ep1": (1, ZERO, "ep2", 3),
    "then ep4": (4, [*ZERO, *EP4], "then ep1", 6),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    sources, validation = write_problem(
        folder / "data", [0.5, 0.3, 0.2], 0, length=17, examples=30, validation=40, even=False
    )
    write_config(
        folder / "x.yaml", sources, validation,
        model={
            "num_experts": 4, "moe_layer_freq": [0, 1], "moe_ffn_hidden_size": 24,
            "moe_shared_expert_intermediate_size": 24, "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.01,
            "moe_aux_loss_coeff": 0.05, "moe_z_loss_coeff": 0.01,
        },
        bilevel={"resync_interval": 5},
        # Adam divides by the gradient's size: an eps that rounding noise does not reach.
        optimizer={"adam_eps": 1e-5},
        checkpoint={"save_interval": 3, "keep_last": 9},
    )  # fmt: skip
    for ranks in (2, 1, 4):
        run_distributed(on_ranks, ranks, str(folder))
    return folder


def on_ranks(folder_name: str) -> None:
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    for name, (ranks, flags, source, step) in RUNS.items():
        if ranks != dist.get_world_size():
            continue
        words = ["reweight", "--config", folder / "x.yaml", "--output", folder / name, *flags]
        if source is not None:
            load = folder / f"{name} from"
            if dist.get_rank() == 0:
                checkpoint = f"iter_{step:07d}"
                shutil.copytree(folder / source / "checkpoints" / checkpoint, load / checkpoint)
            dist.barrier()
            words += ["--load", load]
        note(folder / "noted", name, command(*words, "--train-iters", STEPS))
    if dist.get_world_size() == 2:
        for flag in ("--load", "--pretrained-checkpoint"):
            words = ["reweight", "--config", folder / "x.yaml", "--output", folder / "other", *EP2]
            words += ["--num-experts", 8, flag, folder / "ep2" / "checkpoints"]
            note(folder / "noted", flag, command(*words))


@pytest.mark.parametrize("name", RUNS)
def test_ends_well(runs: Path, name: str) -> None:
    code, said = noted(runs / "noted", name)
    assert code == 0, said
    source, step = RUNS[name][2:]
    assert source is None or f"from step {step}" in said


@pytest.mark.parametrize("name", ["ep2", "resting"])
def test_resumed_equals_never_stopping(runs: Path, name: str) -> None:
    resumed = metrics(runs / f"{name} resumed")
    assert resumed == metrics(runs / name)[RUNS[f"{name} resumed"][3] :]


@pytest.mark.parametrize(("name", "first"), [("then ep1", 3), ("then ep4", 6)])
def test_goes_on_under_another_expert_parallelism(runs: Path, name: str, first: int) -> None:
    pairs = list(zip(metrics(runs / name), metrics(runs / "ep2")[first:], strict=True))
    for got, want in pairs:
        for field in ("weights", "loss_w", "loss_u", "validation_losses"):
            assert got[field] == pytest.approx(want[field], abs=1e-4), (got["step"], field)


@pytest.mark.parametrize("flag", ["--load", "--pretrained-checkpoint"])
def test_a_checkpoint_of_another_number_of_experts_is_refused(runs: Path, flag: str) -> None:
    code, said = noted(runs / "noted", flag)
    router = "decoder.layers.1.mlp.router.weight"
    wanted = f"holds shape (4, 32) for {router}, the model needs (8, 32) (make the model section"
    assert code == 2 and wanted in the_only_line(said), said
