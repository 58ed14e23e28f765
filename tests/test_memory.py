"""What is told when memory runs out; when FP8 copies are made anew, and losses fetched."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.core.twin import forget_weight_copies
from megatron_scalebio.engine.evaluate import held_out_losses
from megatron_scalebio.engine.memory import out_of_memory_named, prediction
from megatron_scalebio.errors import UserError
from megatron_scalebio.methods.scalebio import TrainState, train_step
from tests.distributed.harness import run_distributed
from tests.markov import write_two_sources

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    write_two_sources(folder, validation=20, lisa={"lisa_layers": 1, "lisa_interval": 2})
    run_distributed(on_a_rank, 1, str(folder))
    return folder


def on_a_rank(folder_name: str) -> None:
    folder = Path(folder_name)
    config = load_config(str(folder / "x.yaml"))
    runtime.start(config)
    said = ""
    try:
        with out_of_memory_named(config, folder):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    except UserError as error:
        said = str(error)
    (folder / "said.txt").write_text(said)
    state = TrainState(config, folder)
    (folder / "made.json").write_text(json.dumps(weight_copies(state)))
    (folder / "order.json").write_text(json.dumps(order_of_an_evaluation(state)))


def order_of_an_evaluation(state: TrainState) -> list[str]:
    """Passes through the model, and tensors that are fetched to the host."""
    order: list[str] = []
    hook = state.training.w[0].register_forward_hook(lambda *_: order.append("pass"))
    real = torch.Tensor.cpu

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        order.append("fetch")
        return real(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", cpu)
        held_out_losses(state.training.w, state.data.validation, state.config, state.data.layout)
    hook.remove()
    return order


def weight_copies(state: TrainState) -> dict[str, list[list[str]]]:
    """Which layers of w and of u are told to renew their weights' FP8 copies, at each step.

    The layers of this machine have no FP8; they are given the mark that Transformer Engine's have,
    and the real schedule and loop do the rest.
    """
    renewed: dict[str, list[list[str]]] = {"w": [], "u": []}
    marked = {
        side: {
            f"layer {number}": layer.mlp.linear_fc1
            for number, layer in enumerate(chunks[0].decoder.layers)
        }
        for side, chunks in state.training.models.items()
    }
    for step in range(5):
        for layers in marked.values():
            for layer in layers.values():
                layer.is_first_microbatch = False
        state.megatron.fp8 = None
        state.training.enter_period()
        state.megatron.fp8 = "hybrid"  # as the schedule's question sees it
        for twin in state.training.period.twins:
            twin.set_is_first_microbatch()
        for side, layers in marked.items():
            renewed[side].append([name for name, m in layers.items() if m.is_first_microbatch])
        state.megatron.fp8 = None
        train_step(state)
        if step == 2:  # in the middle of a period
            held_out_losses(
                state.training.w, state.data.validation, state.config, state.data.layout
            )
    assert forget_weight_copies(state.training.w) is None
    return renewed


def test_only_memory_in_use_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """And only if asked: a history of what has been freed since costs more with every step."""
    asked = []
    taken = inspect.signature(torch.cuda.memory._record_memory_history)

    def record(*words: Any, **named: Any) -> None:
        asked.append(taken.bind(*words, **named).arguments)

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    asking = load_config(None, {"logging": {"record_memory_history": True}})
    for on_cuda, config in ((False, asking), (True, Config()), (True, asking)):
        monkeypatch.setattr(runtime, "on_cuda", lambda on_cuda=on_cuda: on_cuda)
        with out_of_memory_named(config, Path("nowhere")):
            pass
    assert asked == [{"enabled": "state", "context": "state", "stacks": "python"}]


def test_memory_that_runs_out_is_told_with_its_plan(folder: Path) -> None:
    said = (folder / "said.txt").read_text()
    assert said.startswith("train.micro_batch_size: rank 0 ran out of memory in start of step 0")
    assert "Tried to allocate 2.00 GiB." in said and "more" not in said
    assert re.search(r"the plan of it is \d+\.\d GB on the fullest rank", said), said


def test_the_plan_told_is_that_of_the_fullest_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(words: list[str], **_: Any) -> None:
        assert words[words.index("--gpus") + 1] == "3"
        sizes = [{"total_bytes": gigabytes * 1e9} for gigabytes in (3.0, 7.04, 5.0)]
        Path(words[words.index("--json") + 1]).write_text(json.dumps({"stages": sizes}))

    monkeypatch.setattr(subprocess, "run", plan)
    monkeypatch.setattr(runtime, "world_size", lambda: 3)
    told = prediction(load_config(None, {"model": {"vocab_size": 64}}), tmp_path)
    assert told == "the plan of it is 7.0 GB on the fullest rank"


def test_fp8_copies_of_frozen_layers_are_made_once_a_period(folder: Path) -> None:
    made = json.loads((folder / "made.json").read_text())
    both = ["layer 0", "layer 1"]
    for side, after_evaluation in (("w", both), ("u", None)):
        first, second, third, fourth, fifth = made[side]
        assert first == third == fifth == both  # periods begin at steps 1, 3 and 5
        assert len(second) == 1  # the layer that trains
        assert fourth == after_evaluation if after_evaluation else len(fourth) == 1
    assert made["w"][1] == made["u"][1]


def test_an_evaluation_fetches_losses_when_all_its_passes_are_queued(folder: Path) -> None:
    """On a GPU, a fetch between two passes would wait for the first of them."""
    order = json.loads((folder / "order.json").read_text())
    passes = order.count("pass")
    assert passes > 1 and order == ["pass"] * passes + ["fetch"] * (passes + 1)
