"""What patches Megatron acts when it is called, once, and refuses another Megatron in one line."""

from __future__ import annotations

import gc
import io
import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms

from megatron_scalebio import runtime
from megatron_scalebio.cli import _unraisable
from megatron_scalebio.compat import WRITTEN_FOR, cpu, require
from megatron_scalebio.compat.megatron import make_fit, rotated_at_once
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.errors import UserError
from tests.commands import ROOT
from tests.distributed.harness import found_on_a_rank, run_distributed

CODE = """
import sys
import warnings; warnings.simplefilter("ignore")
import torch
import torch.distributed as dist
from megatron.core.datasets import utils
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
import megatron.core.tensor_parallel.random as random

def patched():
    return (
        torch.cuda.current_device, torch.zeros, torch.Tensor.type, random._get_cuda_rng_state,
        DistributedOptimizer._set_main_param_and_optimizer_states,
        torch.cuda.device_count, torch.cuda.set_device, utils.compile_helpers,
        rope_utils._apply_rotary_pos_emb_thd, dist.ProcessGroupGloo.__init__, torch.compile,
    )

before = patched()
from megatron_scalebio import runtime
from megatron_scalebio.compat import cpu, megatron, megatron_lm
from megatron_scalebio.methods import scalebio
assert patched() == before, "acts on import"
assert "scipy" not in sys.modules, "takes a second of every run"
# As where Transformer Engine is installed, whose kernels need a GPU.
from megatron.core import optimizer
from megatron.core.optimizer import clip_grads, optimizer as parts
optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = "of a GPU", False
clip_grads.l2_norm_impl = clip_grads.multi_tensor_applier = "of a GPU"
parts.multi_tensor_applier = "of a GPU"
from megatron.core.transformer.moe import moe_utils
moe_utils.te_general_gemm = "of a GPU"
for _ in range(2):
    cpu.adapt()
    megatron.adapt()
    megatron_lm.adapt()
    once = patched() if _ == 0 else once
assert optimizer.Adam is torch.optim.AdamW and optimizer.USING_PYTORCH_OPTIMIZER
assert callable(clip_grads.l2_norm_impl) and callable(clip_grads.multi_tensor_applier)
assert parts.multi_tensor_applier is clip_grads.multi_tensor_applier
assert moe_utils.te_general_gemm is None
assert all(a is not b for a, b in zip(patched(), before)), "does not act"
assert patched() == once, "acts twice"
del DistributedOptimizer._get_model_param_range_map
megatron.adapt.cache_clear()
try:
    megatron.adapt()
except Exception as error:
    print(error)
"""


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="for machines without CUDA")
def test_nothing_is_patched_until_a_run_begins() -> None:
    said = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert said.returncode == 0, said.stderr
    lacking = (
        "has no DistributedOptimizer._get_model_param_range_map, which megatron_scalebio builds"
    )
    assert lacking in said.stdout


LIGHT = """
import gc
import importlib.util
import sys
import warnings; warnings.simplefilter("ignore")
from megatron_scalebio.compat import adapt, light_imports
with light_imports():
    import megatron_scalebio.methods.run
adapt()
import torch
assert torch.compile(abs) is abs and torch.compile(dynamic=True)(abs) is abs
heavy = {"torch._dynamo", "torch._inductor", "wandb", "scipy", "transformers"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
assert gc.isenabled() and gc.get_freeze_count() > 100_000
frozen, more = gc.get_freeze_count(), [[] for _ in range(1000)]
with light_imports():
    assert gc.isenabled()
assert gc.get_freeze_count() == frozen
import wandb
"""


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="for machines without CUDA")
def test_a_run_imports_neither_torchs_compiler_nor_trackers() -> None:
    said = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert said.returncode == 0, said.stderr


def groups_of_gloo(folder: Path) -> None:
    """Two ranks with groups from before `adapt`, from Megatron and one of another time limit."""
    dist.init_process_group("gloo")
    runtime.start(load_config(None, {}))
    briefly = dist.new_group([0, 1], timeout=timedelta(seconds=7))
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    waiting = names.count("gloo_tcp_loop")
    one_S = torch.ones(3)
    dist.all_reduce(one_S, group=parallel_state.get_data_parallel_group())
    dist.all_reduce(one_S, group=briefly)
    assert briefly._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=7)
    (folder / str(dist.get_rank())).write_text(json.dumps([waiting, one_S.tolist()]))


PRODUCTS: list[tuple[str, list[tuple[int, ...]], dict[str, float]]] = [
    ("mm", [(70, 33), (33, 21)], {}),
    ("bmm", [(3, 7, 33), (3, 33, 5)], {}),
    ("addmm", [(21,), (70, 33), (33, 21)], {"beta": 0.5, "alpha": 2.0}),
    ("baddbmm", [(3, 7, 5), (3, 7, 33), (3, 33, 5)], {"beta": 0.25, "alpha": 0.5}),
]


def products_of_bf16() -> dict[str, list[float]]:
    """Of each product, how far it is from float64's; how far fp32's is from that before."""
    made = {
        name: [torch.randn(shape, requires_grad=True) for shape in shapes]
        for name, shapes, _ in PRODUCTS
    }
    factors = {name: named for name, _, named in PRODUCTS}

    def product(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        parts = [each.detach().bfloat16().to(dtype).requires_grad_() for each in made[name]]
        result = getattr(torch, name)(*parts, **factors[name])
        result.square().sum().backward()
        assert result.dtype is dtype
        return [result.detach().double(), *(part.grad.double() for part in parts)]

    made_in_fp32, calls = cpu._in_fp32, []

    def counted(kernel: Any) -> Any:
        multiply = made_in_fp32(kernel)
        return lambda *given, **named: calls.append(kernel) or multiply(*given, **named)

    cpu._in_fp32 = counted
    torch.backends.cpu.get_cpu_capability = lambda: "AVX2"
    runtime.start(load_config(None, {}))
    before = {name: product(name, torch.float32) for name in made}
    assert not calls, "a model in fp32 is left alone"
    runtime.start(load_config(None, {"parallel": {"bf16": True}}))
    gc.collect()
    found = {
        name: [
            max(float((a - b).norm() / b.norm()) for a, b in zip(*both, strict=True))
            for both in (
                (product(name, torch.bfloat16), product(name, torch.float64)),
                (product(name, torch.float32), before[name]),
            )
        ]
        for name in made
    }
    assert len(set(calls)) == len(PRODUCTS), "each goes by its own kernel"
    return found


@pytest.mark.distributed
def test_products_of_bf16_are_right_by_kernels_of_fp32() -> None:
    found = found_on_a_rank(products_of_bf16)
    assert len(found) == 4
    for of_bf16, of_fp32 in found.values():
        assert 1e-4 < of_bf16 < 2**-7, "results and gradients are rounded, once each"
        assert of_fp32 == 0.0


@pytest.mark.distributed
def test_groups_of_gloo_share_a_thread_that_waits(tmp_path: Path) -> None:
    """One for the group that was there before, one for Megatron's 20 and more."""
    run_distributed(groups_of_gloo, 2, tmp_path)
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == [2, [4.0] * 3]


def test_another_megatron_is_refused_by_the_name_that_it_lacks() -> None:
    owner = SimpleNamespace(__name__="some.module", here=1)
    require(owner, "here")
    with pytest.raises(UserError) as refusal:
        require(owner, "here", "_gone")
    said = str(refusal.value)
    assert "has no some.module._gone" in said and f"install megatron-core {WRITTEN_FOR}" in said
    assert said.startswith("megatron-core 0.19.")


class Refuses:
    def __del__(self) -> None:
        raise ValueError("of another kind")


def test_torch_s_closed_files_are_not_told_and_all_else_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", _unraisable)
    raw = io.BytesIO()
    writer, _ = _StorageWriterTransforms().transform_save_stream(None, raw)  # type: ignore[arg-type]
    raw.close()
    del writer
    assert capsys.readouterr().err == ""
    Refuses()
    assert "of another kind" in capsys.readouterr().err


class Fused(torch.optim.Optimizer):
    """Adam as Transformer Engine and Apex have it: `step` and `bias_correction` in the groups."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1.0, "bias_correction": True})


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_the_state_of_any_adam_fits(fused: bool, distributed: bool) -> None:
    """Megatron's DistributedOptimizer writes torch's step into the groups, the others apart."""
    of_torch: dict[str, Any] = {"state": {0: {}, "common_step": torch.tensor(5.0)}}
    of_torch["param_groups"] = [{"lr": 0.5, "max_lr": 0.5, "amsgrad": False}]
    of_fused: dict[str, Any] = {"state": {0: {}}}
    of_fused["param_groups"] = [{"lr": 0.5, "max_lr": 0.5, "bias_correction": False, "step": 5}]
    if distributed:
        del of_torch["state"], of_fused["state"]
        of_torch["param_groups"][0]["step"] = 5.0
    parameters = [torch.nn.Parameter(torch.ones(2))]
    adam = Fused(parameters) if fused else torch.optim.AdamW(parameters)
    part = SimpleNamespace(optimizer=adam, is_stub_optimizer=False)
    ours: Any = SimpleNamespace(
        chained_optimizers=[SimpleNamespace(is_stub_optimizer=True), part],
        param_groups=[{"max_lr": 0.25, "min_lr": 0.125}],
    )
    for saved in (of_torch, of_fused):
        make_fit({0: saved}, ours)
        [group] = saved["param_groups"]
        assert (group["lr"], group["max_lr"], group["min_lr"]) == (0.5, 0.25, 0.125)
        assert adam.defaults.keys() <= group.keys()
        saved_or_default = False if saved is of_fused else True if fused else None
        assert group.get("bias_correction") is saved_or_default
        in_groups = fused or distributed
        assert group.get("step") == (5 if in_groups else None)
        assert not in_groups or type(group["step"]) is int
        if not distributed:
            assert saved["state"].get("common_step") == (None if fused else 5.0)


@pytest.mark.parametrize("options", [{}, {"rotary_interleaved": True, "mscale": 1.3}])
def test_a_packed_row_is_rotated_as_megatron_rotates_each_sequence(options: dict[str, Any]) -> None:
    from megatron.core.models.common.embeddings import rope_utils

    one: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    ends = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
    row, frequencies = torch.randn(11, 2, 6), torch.randn(8, 1, 1, 4)
    megatrons = rope_utils._apply_rotary_pos_emb_thd
    if megatrons is rotated_at_once:
        pytest.skip("another test of this process has put it there already")
    want = megatrons(row, ends, frequencies, cp_group=one, **options)
    assert torch.equal(rotated_at_once(row, ends, frequencies, cp_group=one, **options), want)
