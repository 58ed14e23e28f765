"""The library in a training loop that is not ours: resumed, overlapped, and leaving no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed
from tests.distributed.library_user import steps, trace, user

pytestmark = pytest.mark.distributed
BF16: dict[str, Any] = {
    "bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16,
}  # fmt: skip
SHARDED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True}
# Process groups, and what `user` is called with.
RESUMED: dict[str, tuple[dict, dict]] = {
    "bf16": ({}, {"model": BF16}),
    "distributed optimizer": ({}, {"ddp": SHARDED, "model": BF16}),
    "lisa": ({}, {"lisa": 2, "ddp": SHARDED}),
    "lisa, never reset": ({}, {"lisa": 1, "options": {"resync_interval": None}}),
    "pipeline": (
        {"pipeline_model_parallel_size": 2},
        {"lisa": 2, "model": {"pipeline_model_parallel_size": 2,
                              "pipeline_dtype": torch.float32}},
    ),
    "adamw": ({}, {"options": {"mixture_optimizer": "adamw", "loss_mean": "token"}}),
}  # fmt: skip
OVERLAPPED: dict[str, tuple[dict, dict]] = {
    "all-reduce": ({}, {}),
    "reduce-scatter": ({}, {"ddp": SHARDED}),
    "lisa": ({}, {"lisa": 2, "ddp": SHARDED}),
    "token": ({}, {"options": {"loss_mean": "token"}}),
}


def start(groups: dict) -> None:
    from megatron.core import parallel_state

    from megatron_scalebio.compat import adapt

    adapt()
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(**groups)


def stop() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


def resume(folder: Path, name: str) -> None:
    from megatron.core import dist_checkpointing

    groups, given = RESUMED[name]
    start(groups)
    whole = user(**given)
    first = steps(whole, 0, 5)
    target = folder / name
    if dist.get_rank() == 0:
        target.mkdir()
    dist.barrier()
    dist_checkpointing.save(whole.sharded_state_dict(), str(target), async_strategy="mcore")
    rest = steps(whole, 5, 9)
    again = user(**given)
    common = dist_checkpointing.load_common_state_dict(str(target))
    wanted = again.sharded_state_dict(loading=common)
    again.load_state_dict(dist_checkpointing.load(wanted, str(target)))
    resumed = steps(again, 5, 9)
    again.sources = ["a", "c", "b"]
    with pytest.raises(ValueError, match=r"is of sources \['a', 'b', 'c'\], not \['a', 'c', 'b'\]"):
        again.sharded_state_dict(loading=common)
    if dist.get_rank() == 0:
        content = {"first": trace(first), "rest": trace(rest), "resumed": trace(resumed)}
        content["tails"] = [bio.mixture.trajectory.tail(1.0) for bio in (whole, again)]
        torch.save(content, folder / f"{name}.pt")
    stop()


def overlap(folder: Path, name: str) -> None:
    groups, given = OVERLAPPED[name]
    start(groups)
    found = {}
    for kind, more in (("plain", {}), ("overlap", OVERLAP)):
        bio = user(**{**given, "ddp": {**given.get("ddp", {}), **more}})
        with watched() as started:
            found[kind] = {"trace": trace(steps(bio, 0, 8)), "in backward": started}
    if dist.get_rank() == 0:
        torch.save(found, folder / f"overlap {name}.pt")
    stop()


@contextmanager
def watched() -> Iterator[list[bool]]:
    """Of every reduction whether it was started while gradients were still being computed."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    original, started = Group.start_grad_sync, []

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        started.append(torch._C._current_graph_task_id() != -1)
        return original(self, *args, **options)

    Group.start_grad_sync = noted
    yield started
    Group.start_grad_sync = original


def manners(folder: Path) -> None:
    """Hooks of the caller's stay as they are; groups that are handed over are the ones used."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    start({})
    bio = user()
    theirs = {
        "finalize_model_grads_func": lambda *args, **kwargs: None, "no_sync_func": None,
        "grad_sync_func": lambda *args: None, "param_sync_func": lambda *args: None,
    }  # fmt: skip
    for name, hook in theirs.items():
        setattr(bio.model_config, name, hook)
    usual = trace(steps(bio, 0, 6))
    kept = all(getattr(bio.model_config, name) is hook for name, hook in theirs.items())
    handed = user(pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    same = torch.equal(trace(steps(handed, 0, 6)), usual)
    others = ProcessGroupCollection.use_mpu_process_groups()
    others.dp = others.tp
    refusal = ""
    try:
        user(pg_collection=others)
    except ValueError as error:
        refusal = str(error)
    loaded = user(options={"resync_interval": None})
    for chunk, value in ((loaded.w[0], 5.0), (loaded.u[0], 1.0)):  # w was loaded, and has counted
        chunk.register_buffer("counted", torch.tensor(value), persistent=False)
    loaded.enter_period()
    counted = float(loaded.u[0].counted) == 5.0
    if dist.get_rank() == 0:
        found = {"kept": kept, "same": same, "counted": counted, "refusal": refusal}
        torch.save(found, folder / "manners.pt")
    stop()


def on_ranks(folder_name: str) -> None:
    folder = Path(folder_name)
    for name in RESUMED:
        resume(folder, name)
    for name in OVERLAPPED:
        overlap(folder, name)
    manners(folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    run_distributed(on_ranks, 2, str(folder))
    return folder


@pytest.mark.parametrize("name", RESUMED)
def test_a_loaded_training_goes_on_as_if_never_stopped(results: Path, name: str) -> None:
    found = torch.load(results / f"{name}.pt")
    assert torch.equal(found["resumed"], found["rest"])
    assert not torch.equal(found["rest"][0], found["first"][-1])
    assert torch.equal(*found["tails"])


@pytest.mark.parametrize("name", OVERLAPPED)
def test_overlapped_reduction_gives_the_same_steps(results: Path, name: str) -> None:
    found = torch.load(results / f"overlap {name}.pt")
    torch.testing.assert_close(
        found["overlap"]["trace"], found["plain"]["trace"], rtol=0, atol=1e-6
    )
    assert not any(found["plain"]["in backward"])
    # From a period's second step on (Megatron learns in the first what a bucket waits for).
    assert sum(found["overlap"]["in backward"]) >= len(found["overlap"]["in backward"]) / 2


def test_the_callers_hooks_and_groups_are_respected(results: Path) -> None:
    found = torch.load(results / "manners.pt")
    refusal = found.pop("refusal")
    assert found == {"kept": True, "same": True, "counted": True}
    assert refusal.startswith("pg_collection.dp has ranks [0], parallel_state's has [0, 1]")
