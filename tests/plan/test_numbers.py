"""A plan's arithmetic by hand: layout, bytes, verdict, and the tables shown."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from megatron_scalebio.config import Config
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.plan import table
from megatron_scalebio.plan.cost import StepCost, step_cost
from megatron_scalebio.plan.estimate import _data_parallel_bytes, _in_flight
from megatron_scalebio.plan.hardware import GPUS, Gpu, gpu_named
from megatron_scalebio.plan.holdings import copy_bytes
from megatron_scalebio.plan.kernels import kernels_of
from megatron_scalebio.plan.layout import Layout, draws, ever_active, stage_layers, worst_draw
from megatron_scalebio.plan.planner import Plan, _u_at_worst, low_bits_bytes
from megatron_scalebio.plan.rehearsal import StageMemory

DOCS = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
# All different, and round in none of what is asked of them.
GPU = Gpu("toy", 7_000_000_000, 100e12, 20e12, 2e12, 400e9, 40e9, node_gpus=8)


def config(**sections: dict[str, Any]) -> Config:
    entries = [{"name": name, "path": name} for name in ("a", "b")]
    tree: dict[str, dict[str, Any]] = {
        "data": {"sources": entries, "validation": entries[:1], "seq_length": 48},
        "model": {"num_layers": 8, "hidden_size": 64, "vocab_size": 256},
        "parallel": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
                     "context_parallel_size": 3},
        "train": {"train_iters": 70, "micro_batch_size": 2, "global_batch_size": 24,
                  "validation_batch_size": 8},
    }  # fmt: skip
    for name, section in sections.items():
        tree.setdefault(name, {}).update(section)
    return load_config(None, tree)


def stage(number: int, **changes: Any) -> StageMemory:
    held = {
        "weights w": 1_000_000_000, "weights u": 200_000_000, "gradients": 300_000_000,
        "fp32 masters": 50_000_000, "Adam state": 100_000_000, "FP8 copies": 7_000_000,
    }  # fmt: skip
    memory = StageMemory(
        stage=number, active_layers=(0, 1, 2), layers=(0, 1, 2, 3), parameters=500_000_000,
        trainable=75_000_000, layer_parameters=25_000_000, held_bytes=held,
        activation_bytes={"u train": 400_000_000, "logits": 60_000_000}, workspace_bytes=70_000_000,
        communication_bytes=3_000_000, flops_per_pass=4e12,
        sent_per_pass_bytes={"TP": 8_000_000_000, "CP": 2_000_000_000, "EP": 0, "PP": 500_000_000},
        sent_per_step_bytes={"DP": 6_000_000_000, "other": 1_000_000_000}, messages=(),
    )  # fmt: skip
    return replace(memory, **changes)


STAGE_BYTES = 1_657_000_000 + 460_000_000 + 70_000_000 + 3_000_000


def test_layout_of_a_configuration() -> None:
    layout = Layout.of(config(), 24, GPU)
    assert (layout.tp, layout.cp, layout.pp, layout.dp, layout.virtual) == (2, 3, 2, 2, 1)
    # Micro-batches of two on each of two replicas: 24 / 4 and 8 / 4.
    assert (layout.train, layout.validation, layout.world) == (6, 2, 24)
    assert layout.passes == 6 + 6 + 2
    assert layout.bubble == pytest.approx(1 / 15)
    assert str(layout) == "TP 2 x CP 3 x PP 2 x VPP 1 x DP 2"
    virtual = {"num_layers_per_virtual_pipeline_stage": 1}
    layout = Layout.of(config(parallel=virtual), 12, GPU)
    assert (layout.virtual, layout.dp, layout.passes) == (4, 1, 28)
    assert layout.bubble == pytest.approx(1 / (4 * 28 + 1))


def test_layers_of_a_stage_and_its_worst_draw() -> None:
    layout = Layout(1, 2, 2, 1, 4, 2, GPU)
    assert stage_layers(config(), layout, 0) == {0, 1, 4, 5}
    assert stage_layers(config(), layout, 1) == {2, 3, 6, 7}
    # Most layers of its own, and of draws with as many the one that reaches lowest.
    drawn: list[list[int] | None] = [[2, 6, 7], [0, 3, 7], [1, 3, 6], [2, 3, 4]]
    assert worst_draw(config(), layout, 1, drawn) == [2, 6, 7]
    assert worst_draw(config(), layout, 0, drawn) == [0, 3, 7]
    assert ever_active({0, 1, 4, 5}, drawn) == {0, 1, 4}
    assert ever_active({0, 1}, [None]) == {0, 1}
    lisa = {"lisa_layers": 2, "lisa_interval": 20}
    assert len(draws(config(lisa=lisa), layout)) == 4  # 70 steps
    assert len(draws(config(lisa=lisa), layout, most=3)) == 3
    assert draws(config(), layout) == [None]


def test_shortest_flush_fills_the_pipeline() -> None:
    long = {"train": 40, "validation": 20}
    for pp, virtual, expected in ((1, 1, (1, 1)), (2, 1, (1, 1)), (4, 1, (2, 1)), (4, 2, (3, 2))):
        assert Layout(1, pp, virtual, 1, gpu=GPU, **long).shortest_flush() == expected
    assert Layout(1, 4, 1, 1, 2, 1, GPU).shortest_flush() == (2, 1)


def test_low_bits_are_those_of_all_that_lisa_ever_trains() -> None:
    """16 bits: of 75 million weights of three layers (and ends), and 25 million of the fourth."""
    bf16 = {"bf16": True}
    lisa, dist = (
        {"lisa_layers": 3, "lisa_interval": 20},
        {**bf16, "use_distributed_optimizer": True},
    )
    drawn: list[list[int] | None] = [[0, 1, 2], [1, 2, 3]]

    sizes: list[int] = []  # of the same, where every other rank has the same experts

    def size(parallel: dict, lisa: dict, **sections: dict) -> int:
        of_run = config(parallel=parallel, lisa=lisa, **sections)
        layout = Layout.of(of_run, 24, GPU)
        sizes.append(low_bits_bytes(of_run, replace(layout, ep=2), stage(0), drawn))
        return low_bits_bytes(of_run, layout, stage(0), drawn)

    assert size(bf16, lisa) == 200_000_000
    assert size(bf16, lisa, bilevel={"resync_interval": None}) == 400_000_000, "u's own, too"
    assert size(dist, lisa) == 200_000_000 // 6, "DP 2 x CP 3"
    assert size({}, lisa) == size(bf16, {}) == 0
    assert sizes == [200_000_000, 400_000_000, 200_000_000 // 3, 0, 0]


def test_a_stage_keeps_as_many_micro_batches_as_are_under_way() -> None:
    """Those ahead of it and its own, of a flush that has so many; in chunks where interleaved."""
    for virtual, train, kept in (
        (1, 4, [4, 3, 2, 1]), (1, 1, [3, 3, 2, 1]), (2, 1, [3, 3, 3, 2.5]),
        (2, 4, [5.5, 4.5, 3.5, 2.5]),
    ):  # fmt: skip
        layout = Layout(1, 4, virtual, 1, train, 1, GPU)
        assert [_in_flight(layout, number) for number in range(4)] == kept


def test_gradients_go_round_all_replicas_and_shards_come_back_as_weights() -> None:
    """100 trainable parameters each of w and u, over CP x DP ranks."""
    for cp, dp, bf16, shards, sent in (
        (1, 1, True, False, 0),
        (1, 4, True, False, 2 * 0.75 * 800),  # reduced and spread in four bytes
        (2, 2, True, False, 2 * 0.75 * 800),
        (2, 2, True, True, 0.75 * (800 + 400)),  # reduced to shards, back in two bytes
        (1, 4, False, True, 0.75 * (800 + 800)),
    ):
        of_run = config(parallel={"bf16": bf16, "use_distributed_optimizer": shards})
        layout = Layout(1, 1, 1, dp, 4, 2, GPU, cp)
        assert _data_parallel_bytes(of_run, layout, {"gradients": 800}, 100) == sent


def test_u_keeps_the_layers_of_all_periods_only_where_it_is_never_reset() -> None:
    lisa, memory = {"lisa_layers": 3, "lisa_interval": 20}, stage(0, active_layers=(0, 1))
    drawn: list[list[int] | None] = [[0, 1, 6], [1, 2, 7], [2, 3, 7]]
    for reset, more in ((None, 2 * 25_000_000 * 2), (10, 0)):
        of_run = config(lisa=lisa, bilevel={"resync_interval": reset})
        assert _u_at_worst(of_run, memory, drawn, {0, 1, 2, 3}) == 200_000_000 + more


@pytest.mark.parametrize(
    ("recipe", "bytes_"),
    [
        ("tensorwise", 2 * 300 * 520 + 4),
        ("delayed", 2 * 300 * 520 + 4),
        ("blockwise", 2 * 300 * 520 + 4 * (3 * 8 + 5 * 4)),  # 3 x 5 tiles, rows of fours
        ("mxfp8", 2 * 300 * 520 + 384 * 20 + 640 * 12),  # 17 and 10 blocks, rows of 128
        ("nvfp4", 300 * 520 + 8 + 384 * 36 + 640 * 20),  # 33 and 19 blocks
    ],
)
def test_casts_of_a_matrix_are_held_both_ways_with_padded_scales(recipe: str, bytes_: int) -> None:
    assert copy_bytes(300, 520, recipe) == bytes_


def test_figures_of_devices_are_those_of_the_documentation() -> None:
    rows = re.findall(r"^\| ([a-z0-9-]+) \| (.*) \|$", DOCS.read_text(), re.M)
    told = {
        name: [float(cell.replace(",", "")) for cell in cells.split(" | ")]
        for name, cells in rows if name in GPUS
    }  # fmt: skip
    assert set(told) == set(GPUS)
    for name, gpu in GPUS.items():
        rates = [gpu.memory_bandwidth, gpu.node_bandwidth, gpu.network_bandwidth]
        found = [gpu.memory_bytes / 1e9, gpu.peak_flops / 1e12, gpu.fp32_flops / 1e12]
        assert [*found, *(rate / 1e9 for rate in rates)] == pytest.approx(told[name]), name
        assert gpu.reserved_bytes == (0 if name == "cpu" else 2.5e9)
        assert gpu.node_gpus == (64 if name == "cpu" else 8)
    assert gpu_named("H100-80G") is GPUS["h100-80g"]


def a_plan(gpu: Gpu = GPU) -> Plan:
    """Two stages; u grows on the second by 300 MB beyond its period's."""
    layout = Layout.of(config(parallel={"bf16": True}), 24, gpu)
    stages = (stage(0, workspace_bytes=90_000_000), stage(1))
    cost = step_cost(config(parallel={"bf16": True}), layout, list(stages), 0.5)
    return Plan(layout, stages, (200_000_000, 500_000_000), (30_000_000, 0), cost)


def test_bytes_and_headroom_of_a_plan() -> None:
    plan = a_plan()
    totals = [STAGE_BYTES + 20_000_000 + 2_500_000_000, STAGE_BYTES + 300_000_000 + 2_500_000_000]
    assert [plan.total_bytes(n) for n in (0, 1)] == totals
    assert plan.worst_bytes == totals[1] == 4_990_000_000
    assert plan.headroom == pytest.approx(1 - 4.99 / 7)
    assert plan.fits and not plan.fits_narrowly
    for memory, fits, narrowly in (
        (4_989_999_999, False, False), (4_990_000_000, True, True), (5_420_000_000, True, True),
        (5_430_000_000, True, False),
    ):  # fmt: skip
        tight = a_plan(replace(GPU, memory_bytes=memory))
        assert (tight.fits, tight.fits_narrowly) == (fits, narrowly), memory


def test_a_plan_as_json() -> None:
    plan = a_plan()
    found = json.loads(json.dumps(plan.as_json()))
    assert found["layout"] == {
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 1, "context_parallel_size": 3,
        "data_parallel_size": 2, "expert_model_parallel_size": 1, "micro_batches_train": 6,
        "micro_batches_validation": 2,
    }  # fmt: skip
    assert (found["gpus"], found["gpu"]["memory_bytes"]) == (24, 7_000_000_000)
    assert [s["total_bytes"] for s in found["stages"]] == [4_710_000_000, 4_990_000_000]
    assert [s["weights_u_worst_bytes"] for s in found["stages"]] == [200_000_000, 500_000_000]
    assert [s["low_bits_host_bytes"] for s in found["stages"]] == [30_000_000, 0]
    assert [s["weights_u_first_bytes"] for s in found["stages"]] == [0, 0]
    assert found["stages"][1]["held_bytes"]["gradients"] == 300_000_000
    for name in ("step_s", "run_s", "tokens_per_s", "flops", "bubble"):
        assert found["cost"][name] == pytest.approx(getattr(plan.cost, name))
    assert (found["fits"], found["fits_narrowly"]) == (True, False)
    assert found["headroom"] == pytest.approx(2.01 / 7)


def shown(plan: Plan) -> dict[str, list[str]]:
    """The rows printed, by their first cell; and the verdict's lines."""
    out = io.StringIO()
    table.show(Console(file=out, width=120, highlight=False), plan)
    rows = {}
    for line in out.getvalue().splitlines():
        cells = [cell.strip() for cell in re.split(r"[│┃]", line) if cell.strip()]
        rows[cells[0] if cells else ""] = cells[1:]
    return rows


def test_the_tables_show_gigabytes_and_seconds() -> None:
    rows = shown(a_plan())
    expected = {
        "layers": ["4", "4"],
        "active (LISA)": ["3", "3"],
        "parameters, millions": ["500", "500"],
        "w": ["1.00", "1.00"],
        "u, at the start": ["0", "0"],
        "u, at worst": ["0.200", "0.500"],
        "gradients of w and u": ["0.300", "0.300"],
        "fp32 masters": ["0.050", "0.050"],
        "Adam state": ["0.100", "0.100"],
        "FP8 copies": ["0.007", "0.007"],
        "activations: u train": ["0.400", "0.400"],
        "logits": ["0.060", "0.060"],
        "workspace of a pass": ["0.090", "0.070"],
        "communication buffers": ["0.003", "0.003"],
        "reserved (CUDA, NCCL)": ["2.50", "2.50"],
        "total": ["4.71", "4.99"],
        "host: low bits of bf16": ["0.030", "0.00"],
        # 2 · 4e12 a pass of both stages, 14 passes on 12 ranks of each
        "arithmetic": ["1.12", "1.3 PFLOP; 14 micro-batches a rank: 6 u, 6 w, 2 validation"],
        "TP traffic": ["0.28", "112.00 GB a rank"],
        "CP traffic": ["0.07", "28.00 GB a rank"],
        "pipeline bubble": ["0.11", "6.7% of the flush; 7.00 GB a rank sent"],
        "DP traffic": ["0.17", "7.00 GB a rank"],
        "optimizers": ["0.00075", "w and u, by memory bandwidth"],
        "step": ["1.75", "1,535 tokens/s through u and w"],
        "70 steps": ["2 min", "without loading, saving, tests"],
    }
    for name, cells in expected.items():
        assert rows[name] == cells, name
    assert "A step, at 50% MFU (stated)" in rows
    assert "TP 2 x CP 3 x PP 2 x VPP 1 x DP 2 on 24 x toy: fits, headroom 28.7%" in rows
    assert any(row.startswith("computed, not measured") for row in rows)
    assert "fullest: stage 1, 4.99 of 7.00 GB" in rows


def test_each_stage_has_its_own_column() -> None:
    plan = a_plan()
    first, second = plan.stages
    doubled = {kind: 2 * size for kind, size in second.held_bytes.items()}
    rows = shown(replace(plan, stages=(first, replace(second, held_bytes=doubled))))
    found = [rows[name] for name in ("w", "gradients of w and u", "fp32 masters", "Adam state")]
    assert found == [["1.00", "2.00"], ["0.300", "0.600"], ["0.050", "0.100"], ["0.100", "0.200"]]


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0.00"), (5e6, "0.005"), (9.94e8, "0.994"), (9.96e8, "1.00"), (45.678e9, "45.68")],
)
def test_gigabytes_are_decimal(value: float, words: str) -> None:
    assert table.gb(value) == words


@pytest.mark.parametrize(("value", "words"), [(0, "0.00"), (0.0123, "0.012"), (0.1, "0.10")])
def test_seconds_in_words(value: float, words: str) -> None:
    assert table.seconds(value) == words


def test_search_tries_every_layout_that_divides_the_devices() -> None:
    from megatron_scalebio.plan.search import candidates

    plain = config(parallel={"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
                             "context_parallel_size": 1})  # fmt: skip
    small = replace(GPU, node_gpus=2)
    found = [c.parallel for c in candidates(plain, 8, small)]
    layouts = {
        (p.tensor_model_parallel_size, p.pipeline_model_parallel_size,
         p.num_layers_per_virtual_pipeline_stage) for p in found
    }  # fmt: skip
    # TP stays in a node; chunks are halves and quarters of a stage.
    assert layouts == {
        *((tp, 1, None) for tp in (1, 2)),
        *((tp, 2, n) for tp in (1, 2) for n in (None, 2, 1)),
        *((tp, 4, n) for tp in (1, 2) for n in (None, 1)),
        (1, 8, None),
    }
    assert len(found) == 2 * len(layouts)
    for p in found:
        tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
        assert p.sequence_parallel == (tp > 1)
        assert p.use_distributed_optimizer == (tp * pp < 8)
        full = p.recompute_granularity == "full"
        assert (p.recompute_method, p.recompute_num_layers) == (
            ("uniform", 1) if full else (None, None)
        )
    long = config(data={"seq_length": 16384})
    split = [c.parallel for c in candidates(long, 4, small)]
    assert {p.context_parallel_size for p in split} == {1, 2, 4}
    for p in split:  # the ranks of a sequence share the optimizer's state, too
        ranks = 4 // (p.tensor_model_parallel_size * p.pipeline_model_parallel_size)
        assert p.use_distributed_optimizer == (ranks > 1)


def test_search_gives_what_it_changed_as_sections() -> None:
    from megatron_scalebio.plan.search import sections

    chosen = config(lisa={"lisa_layers": 4}, parallel={"bf16": True})
    assert sections(chosen) == {
        "parallel": {
            "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
            "context_parallel_size": 3, "bf16": True,
        },
        "lisa": {"lisa_layers": 4},
    }  # fmt: skip


@pytest.mark.parametrize(("needed", "fewest"), [(1, 1), (3, 4), (9, 16), (500, 512), (600, None)])
def test_fewest_devices_are_powers_of_two_then_whole_nodes(
    monkeypatch: pytest.MonkeyPatch, needed: int, fewest: int | None
) -> None:
    from types import SimpleNamespace

    from megatron_scalebio.plan import search

    def estimates(config: Any, count: int, *rest: Any) -> list[Any]:
        left = 0.09 if count >= needed else 0.07
        return [SimpleNamespace(fits=lambda headroom: left >= headroom)]

    monkeypatch.setattr(search, "_estimates", estimates)
    assert search._fewest(config(), 8, GPU, None) == fewest  # type: ignore[arg-type]


def test_a_ranking_shows_what_was_estimated() -> None:
    from megatron_scalebio.plan.estimate import Estimate
    from megatron_scalebio.plan.search import Found, ranking

    searched = config(lisa={"lisa_layers": 4}, parallel={"recompute_granularity": "full"})
    out = io.StringIO()
    found = Found([Estimate(searched, a_plan())], None, searched, None)
    Console(file=out, width=120).print(ranking(found))
    cells = [c.strip() for c in re.split(r"[│┃]", out.getvalue().splitlines()[3]) if c.strip()]
    assert cells == ["2", "3", "2", "1", "2", "1", "full", "4", "5.0", "28.7%", "1.75"]


def test_costs_are_no_part_of_memory() -> None:
    assert isinstance(a_plan().cost, StepCost)
    assert stage(0).total_bytes == STAGE_BYTES


def test_a_fused_norm_gives_the_type_of_its_input_and_keeps_a_number_a_row() -> None:
    x, weight = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((6, 64), (64,)))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with kernels_of(config(), cuda=True), hooks:
        out = F.rms_norm(x.requires_grad_(), (64,), weight)
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    assert sum(tensor.nbytes for tensor in kept) == x.nbytes + weight.nbytes + 6 * 4


@pytest.mark.parametrize("width", [24, 16], ids=["as wide as keys", "narrower"])
def test_attention_of_a_rehearsal_on_a_cpu_is_attention(width: int) -> None:
    """Latent attention has values narrower than its queries and keys."""
    shapes = [(2, 3, 8, 24), (2, 3, 8, 24), (2, 3, 8, width)]
    given = [torch.randn(shape, generator=torch.Generator().manual_seed(7)) for shape in shapes]
    expected = F.scaled_dot_product_attention(*given, is_causal=True)
    with kernels_of(config(), cuda=False):
        found = F.scaled_dot_product_attention(*given, is_causal=True)
    torch.testing.assert_close(found, expected)
