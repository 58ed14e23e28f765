"""How a rank joins its run, how long it waits there, and how it is told to stop."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_scalebio import errors, launcher, runtime
from megatron_scalebio.cli import main
from megatron_scalebio.config import Config, ModelConfig, ParallelConfig, TrainConfig
from megatron_scalebio.config.training import CheckpointConfig
from megatron_scalebio.engine import start
from megatron_scalebio.errors import UserError

PARALLEL = ParallelConfig(
    tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=5,
    num_layers_per_virtual_pipeline_stage=1, distributed_timeout_minutes=7,
)  # fmt: skip


def test_exit_codes_are_the_documented_ones() -> None:
    codes = errors.EXIT_OK, errors.EXIT_USER_ERROR, errors.EXIT_SIGNALLED, errors.EXIT_LOST
    assert codes == (0, 2, 3, 4)


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What torch and Megatron are asked for, and an environment of its own."""
    asked: list[tuple[Any, dict[str, Any]]] = []

    def note(*words: Any, **options: Any) -> None:
        asked.append((words, options))

    monkeypatch.setattr(runtime.os, "environ", {})
    monkeypatch.setattr(runtime, "adapt", lambda: None)
    monkeypatch.setattr(runtime.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime.dist, "init_process_group", note)
    monkeypatch.setattr(runtime.parallel_state, "initialize_model_parallel", note)
    return asked


def test_groups_are_those_of_the_layout_and_outwait_the_watchdog(joined: list) -> None:
    """Its limit is the configured one; a collective that fails first could name no rank."""
    os.environ.update(RANK="0", WORLD_SIZE="30")
    runtime.start(Config(parallel=PARALLEL, model=ModelConfig(num_layers=6)))
    assert joined == [
        (("gloo",), {"timeout": datetime.timedelta(minutes=8)}),
        (
            (),
            {
                "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3,
                "virtual_pipeline_model_parallel_size": 2, "context_parallel_size": 5,
                "expert_model_parallel_size": 1, "expert_tensor_parallel_size": None,
                "distributed_timeout_minutes": 8,
            },
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("old_name", [False, True])
def test_cuda_is_told_before_anything_asks_it(
    monkeypatch: pytest.MonkeyPatch, old_name: bool
) -> None:
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
                 "OMP_WAIT_POLICY"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    if old_name:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert main(["reweight"]) == 2  # whatever becomes of the command
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
    theirs = None if old_name else "expandable_segments:True"
    assert os.environ.get("PYTORCH_ALLOC_CONF") == theirs


def test_a_bare_process_is_the_only_rank(joined: list) -> None:
    runtime.start(Config())
    [(words, options), _] = joined
    assert words == ("gloo",) and (options["rank"], options["world_size"]) == (0, 1)


SRUN = {"SLURM_STEP_ID": "7", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "123456"}


def test_ranks_of_srun_meet_where_its_variables_say(joined: list) -> None:
    os.environ.update(SRUN, MASTER_ADDR="node1")
    runtime.start(Config(parallel=PARALLEL, model=ModelConfig(num_layers=6)))
    assert joined[0] == (("gloo",), {"timeout": datetime.timedelta(minutes=8)})
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    # 10000 + (123456 + 7) mod 20000: one for each step of a job
    assert [os.environ[name] for name in names] == ["3", "4", "node1", "13463"]


def test_ranks_of_srun_meet_on_its_first_node(
    joined: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: list[Any] = []

    def scontrol(command: list[str], **_: Any) -> SimpleNamespace:
        words.append(command)
        return SimpleNamespace(stdout="node4\nnode5\n")

    monkeypatch.setattr(launcher.subprocess, "run", scontrol)
    os.environ.update(SRUN, SLURM_NODELIST="node[1-9]", SLURM_STEP_NODELIST="node[4-5]")
    runtime.start(Config())
    assert words == [["scontrol", "show", "hostnames", "node[4-5]"]]
    assert os.environ["MASTER_ADDR"] == "node4"


def test_what_srun_has_not_set_is_named(joined: list) -> None:
    os.environ.update(SRUN)
    del os.environ["SLURM_PROCID"]
    with pytest.raises(UserError, match=r"^SLURM_PROCID: is not set \(start with srun"):
        runtime.start(Config())


# ---- limits of a run -----------------------------------------------------------------------------


def limits(monkeypatch: pytest.MonkeyPatch, folder: Path, minutes: int, ranks: int) -> dict:
    """What `begin` watches and holds, and for how long."""
    seen: dict[str, Any] = {}

    @contextlib.contextmanager
    def held(*folders: Path, patience_s: float) -> Iterator[None]:
        seen["held"], seen["patience_s"] = folders, patience_s
        yield

    @contextlib.contextmanager
    def watch(timeout_s: float, before_end: Any, board: Any) -> Iterator[None]:
        seen["timeout_s"] = timeout_s
        yield

    @contextlib.contextmanager
    def named(config: Config, folder: Path) -> Iterator[None]:
        yield

    monkeypatch.setattr(start, "held", held)
    monkeypatch.setattr(start, "Watchdog", watch)
    monkeypatch.setattr(start, "out_of_memory_named", named)
    for name, double in {
        "start": lambda config: None, "StopSignals": lambda: "signals",
        "on_main": lambda work: work(), "world_size": lambda: ranks,
    }.items():  # fmt: skip
        monkeypatch.setattr(start.runtime, name, double)
    config = Config(
        parallel=ParallelConfig(distributed_timeout_minutes=minutes),
        train=TrainConfig(output=str(folder / "out")),
        checkpoint=CheckpointConfig(save=str(folder / "saves"), async_save=True),
    )
    with start.start_job(config) as begun:
        assert begun.signals == "signals"
        seen["begun"] = begun.folder, begun.save_to
        seen["in_background"] = begun.saves._in_background
    return seen


@pytest.mark.parametrize(
    ("minutes", "ranks", "timeout_s", "patience_s"), [(10, 2, 600.0, 60.0), (1, 2, 60.0, 30.0)]
)
def test_a_collective_waits_for_the_configured_time_and_a_lock_for_less(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    minutes: int, ranks: int, timeout_s: float, patience_s: float,
) -> None:  # fmt: skip
    seen = limits(monkeypatch, tmp_path, minutes, ranks)
    assert (seen["timeout_s"], seen["patience_s"]) == (timeout_s, patience_s)
    both = tmp_path / "out", tmp_path / "saves"
    assert seen["held"] == seen["begun"] == both and all(path.is_dir() for path in both)
    assert seen["in_background"]


def test_a_rank_alone_is_not_watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "timeout_s" not in limits(monkeypatch, tmp_path, 10, 1)


# ---- signals, memory -----------------------------------------------------------------------------


def test_signals_are_remembered_and_a_second_ctrl_c_ends_at_once() -> None:
    before = {number: signal.getsignal(number) for number in runtime.STOP_SIGNALS}
    assert set(before) == {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
    try:
        for number in before:
            signals = runtime.StopSignals()
            assert signals.received == 0
            signal.raise_signal(number)
            assert signals.received == number
            if number == signal.SIGINT:
                with pytest.raises(KeyboardInterrupt):
                    signal.raise_signal(number)
            else:
                signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def peak_bytes() -> int:
    """The most memory that was resident, as Linux counts it."""
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    ]  # fmt: skip
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells it there")
def test_memory_is_the_peak_of_the_process_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "on_cuda", lambda: False)
    held = bytearray(b"x") * 50_000_000
    before, told, after = peak_bytes(), runtime.allocated_bytes(), peak_bytes()
    # Linux counts in batches of pages per thread.
    assert 0.97 * before <= told <= 1.03 * after
    del held
    assert runtime.allocated_bytes() >= told, "of all the time, not of now"
