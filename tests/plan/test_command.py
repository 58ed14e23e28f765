"""The command `plan`: shipped configurations, mistakes, a search, and a dry run that finds faults.

Plans are made in spawned processes: a rehearsal adapts torch to Megatron on CPU.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.commands import command, note, noted, the_only_line
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed
CONFIGS = Path(__file__).resolve().parents[2] / "launch" / "configs"

# name: (GPUs, model)
SHIPPED = {
    "gpt2-denoise": (8, "gpt2"),
    "llama-3-8b": (8, "llama-3-8b"),
    "qwen2.5-32b-4xh100": (4, "qwen2.5-32b"),
    "llama-3-70b-8xh100": (8, "llama-3-70b"),
}
SHIPPED_SLOW = {
    "qwen2-7b": (8, "qwen2-7b"),
    "gemma-2-9b": (8, "gemma-2-9b"),
    "gpt-neox-20b": (8, "gpt-neox-20b"),
    "yi-34b": (8, "yi-34b"),
    "qwen2.5-32b-8xh100": (8, "qwen2.5-32b"),
    "qwen2.5-32b-long-8xh100": (8, "qwen2.5-32b"),
    "llama-3-70b-16xh100": (16, "llama-3-70b"),
    "qwen3-30b-a3b-8xh100": (8, "qwen3-30b-a3b"),
    "gpt-oss-20b-4xh100": (4, "gpt-oss-20b"),
}
HEADROOM = 0.08


def plan_shipped(folder: str, name: str, gpus: int) -> None:
    words = ["plan", "--config", CONFIGS / f"{name}.yaml", "--gpus", gpus, "--gpu", "h100-80g"]
    outcome = command(*words, "--dry-run", "--json", Path(folder) / f"{name}.json")
    note(Path(folder), name, outcome)


def is_planned_to_fit(folder: Path, name: str, gpus: int) -> None:
    run_distributed(plan_shipped, 1, str(folder), name, gpus)
    assert noted(folder, name) == (0, "")
    plan = json.loads((folder / f"{name}.json").read_text())
    assert plan["fits"] and plan["headroom"] >= HEADROOM, plan["headroom"]
    assert plan["gpus"] == gpus and plan["dry_run"]["problems"] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configuration_fits(tmp_path: Path, name: str) -> None:
    is_planned_to_fit(tmp_path, name, SHIPPED[name][0])


@pytest.mark.long
@pytest.mark.parametrize("name", SHIPPED_SLOW)
def test_larger_shipped_configuration_fits(tmp_path: Path, name: str) -> None:
    is_planned_to_fit(tmp_path, name, SHIPPED_SLOW[name][0])


def test_every_shipped_configuration_is_tested_and_has_the_published_model() -> None:
    names = {**SHIPPED, **SHIPPED_SLOW}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(names)
    for name, (_, model) in names.items():
        shipped = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
        checkpoint = shipped["model"].pop("pretrained_checkpoint")
        assert shipped["model"] == {"file": f"models/{model}.yaml"}
        assert checkpoint.startswith("/path/to/")
        for entry in shipped["data"]["sources"] + shipped["data"]["validation"]:
            assert entry["path"].startswith("/path/to/")


# name: (words of the command line beside the small configuration, words of the answer)
MISTAKES = {
    "gpu": (["--gpu", "h1000"], "--gpu: 'h1000' is not known (one of h100-80g"),
    "gpus": (["--gpus", "3", "--tensor-model-parallel-size", "2"], "world size: 3 is not"),
    "no-gpus": (["--gpus", "0"], "--gpus: 0 is below 1"),
    "mfu": (["--mfu", "2"], "--mfu: 2 is outside (0, 1]"),
    "json": (["--json", "/nowhere/plan.json"], "--json: /nowhere/plan.json: no such folder"),
    "heads": (["--tensor-model-parallel-size", "8"], "tensor_model_parallel_size: 8 does not"),
    "method": (["--method", "doge"], "baseline.method: 'doge' can't be planned"),
    "search": (["--search", "--gpus", "7"], "--gpus: no layout of 7 devices divides"),
    "fp8": (
        ["--gpu", "a100-80g", "--fp8-format", "hybrid"],
        "--gpu: a100-80g can't compute in parallel.fp8_format with recipe tensorwise (drop it, or "
        "plan for h100-80g or h200 or b200)",
    ),
    "fp4": (
        ["--search", "--fp4-format", "e2m1"],
        "--gpu: h100-80g can't compute in parallel.fp4_format with recipe nvfp4 (drop it, or plan "
        "for b200)",
    ),
}


def small_config(folder: Path, **sections: dict) -> Path:
    entries = [{"name": name, "path": f"/nowhere/{name}"} for name in ("a", "b")]
    tree: dict[str, dict] = {
        "data": {"sources": entries, "validation": entries[:1], "seq_length": 64},
        "model": {
            "num_layers": 8, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 256,
            "untie_embeddings_and_output_weights": True,
        },
        "parallel": {"bf16": True},
        "lisa": {"lisa_layers": 4, "lisa_interval": 2},
        "train": {
            "train_iters": 20, "micro_batch_size": 1, "global_batch_size": 16, "output": "nowhere",
        },
    }  # fmt: skip
    for name, section in sections.items():
        tree.setdefault(name, {}).update(section)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def make_mistakes(folder: str) -> None:
    path = small_config(Path(folder))
    for name, (words, _) in MISTAKES.items():
        note(Path(folder), name, command("plan", "--config", path, *words))
    nameless = small_config(Path(folder), model={"vocab_size": None})
    note(Path(folder), "vocab", command("plan", "--config", nameless))


def test_mistakes_are_refused_in_one_line(tmp_path: Path) -> None:
    run_distributed(make_mistakes, 1, str(tmp_path))
    expected = {**{name: words for name, (_, words) in MISTAKES.items()}}
    expected["vocab"] = "model.vocab_size: is not set (a plan does not open the data"
    for name, words in expected.items():
        code, said = noted(tmp_path, name)
        assert code == 2, said
        assert words in the_only_line(said)


def search_and_compare(folder: str) -> None:
    """A search; and the estimates that it goes by, against rehearsals of the same layouts."""
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.errors import UserError
    from megatron_scalebio.plan.estimate import Estimator
    from megatron_scalebio.plan.hardware import gpu_named
    from megatron_scalebio.plan.layout import Layout
    from megatron_scalebio.plan.planner import make_plan
    from megatron_scalebio.plan.search import candidates

    path, gpu = small_config(Path(folder)), gpu_named("h100-80g")
    said = command(
        "plan", "--config", path, "--search", "--gpus", 4, "--json", Path(folder) / "best.json"
    )
    note(Path(folder), "search", said)
    tree = yaml.safe_load(path.read_text())
    tree.update(json.loads((Path(folder) / "best.json").read_text())["sections"])
    adopted = Path(folder) / "adopted.yaml"
    adopted.write_text(yaml.safe_dump(tree))
    again = Path(folder) / "again.json"
    said = command("plan", "--config", adopted, "--gpus", 4, "--json", again)
    note(Path(folder), "adopted", said)
    estimator, pairs = Estimator(0.4), []
    for candidate in list(candidates(load_config(str(path)), 4, gpu))[::3]:
        try:
            layout = Layout.of(candidate, 4, gpu)
        except UserError:
            continue
        estimate = estimator.estimate(candidate, layout).plan
        plan = make_plan(candidate, layout, 0.4)
        totals = [[p.total_bytes(s) for s in range(layout.pp)] for p in (estimate, plan)]
        pairs.append((str(layout), totals, [p.cost.step_s for p in (estimate, plan)]))
    (Path(folder) / "pairs.json").write_text(json.dumps(pairs))


def plan_without_data(folder: str) -> None:
    """bf16, fp32 and a device that is nearly full; no source is named."""
    path = small_config(Path(folder), data={"sources": [], "validation": []})
    for name, words in (("bf16", ["--mfu", 0.3]), ("fp32", ["--no-bf16"])):
        out = Path(folder) / f"{name}.json"
        note(Path(folder), name, command("plan", "--config", path, *words, "--json", out))


def test_a_plan_needs_no_data_and_knows_fp32(tmp_path: Path) -> None:
    run_distributed(plan_without_data, 1, str(tmp_path))
    costs = {}
    for name in ("bf16", "fp32"):
        assert noted(tmp_path, name) == (0, "")
        costs[name] = json.loads((tmp_path / f"{name}.json").read_text())["cost"]
    slower = costs["fp32"]["compute_s"] / costs["bf16"]["compute_s"]
    assert slower == pytest.approx(989 / 67 * 0.3 / 0.4, rel=1e-6), "0.4 where none is stated"
    assert costs["bf16"]["run_s"] == pytest.approx(20 * costs["bf16"]["step_s"])


def test_a_narrow_terminal_does_not_narrow_a_plan_and_a_wide_one_widens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_scalebio.commands import plan

    widths: list[int] = []
    monkeypatch.setattr(plan, "_plan", lambda _, __, console: widths.append(console.width))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as a plan sets it: put back afterwards
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert command("plan", "--config", small_config(tmp_path)) == (0, "")
    assert widths == [80, 200]


def test_of_equally_fast_layouts_the_simplest_is_first_and_none_that_does_not_fit() -> None:
    from types import SimpleNamespace

    from megatron_scalebio.plan.search import in_order

    # name: (virtual chunks, stages, TP, EP, seconds, bytes, fits)
    layouts = {
        "small": (1, 1, 1, 1, 0.5, 5, False), "interleaved": (4, 2, 1, 1, 1.0, 1, True),
        "plain": (1, 1, 2, 1, 1.04, 1, True), "slow": (1, 1, 1, 1, 1.06, 1, True),
        "pipeline": (1, 2, 1, 1, 1.01, 1, True), "large": (1, 1, 1, 1, 0.4, 9, False),
        "experts": (1, 1, 2, 2, 1.0, 1, True), "long pipeline": (1, 4, 1, 1, 1.02, 1, True),
    }  # fmt: skip
    estimates = []
    for name, (virtual, pp, tp, ep, step_s, size, fits) in layouts.items():
        layout = SimpleNamespace(virtual=virtual, pp=pp, tp=tp, cp=1, ep=ep)
        plan = SimpleNamespace(layout=layout, cost=SimpleNamespace(step_s=step_s), worst_bytes=size)
        estimates.append(
            SimpleNamespace(name=name, plan=plan, fits=lambda headroom, fits=fits: fits)
        )
    names = [estimate.name for estimate in in_order(estimates)]  # type: ignore
    assert names == [
        "plain", "experts", "pipeline", "long pipeline", "interleaved", "slow", "small", "large"
    ]  # fmt: skip


@pytest.mark.parametrize("left, words", [(0.2, "fits, "), (0.05, "narrowly"), (-0.1, "not fit")])
def test_the_verdict_tells_a_narrow_fit(left: float, words: str) -> None:
    from types import SimpleNamespace

    from megatron_scalebio.plan import planner, table

    used = int(1e9 * (1 - left))
    stage = SimpleNamespace(stage=0, total_bytes=used, held_bytes={"weights u": 0})
    gpu = SimpleNamespace(memory_bytes=10**9, reserved_bytes=0, name="x")
    layout = SimpleNamespace(gpu=gpu, world=1)
    plan = planner.Plan(layout, (stage,), (0,), (0,), None)  # type: ignore[arg-type]
    assert words in table.verdict(plan).replace("[/]", "")


@pytest.mark.long
def test_a_search_proposes_a_layout_and_its_estimates_hold(tmp_path: Path) -> None:
    run_distributed(search_and_compare, 1, str(tmp_path))
    assert noted(tmp_path, "search") == (0, "")
    best = json.loads((tmp_path / "best.json").read_text())
    assert best["fits"] and best["gpus"] == 4 and best["fewest_gpus"] == 1
    assert noted(tmp_path, "adopted") == (0, "")
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == {name: best[name] for name in again}
    pairs = json.loads((tmp_path / "pairs.json").read_text())
    assert len(pairs) >= 4
    for layout, (estimated, planned), (estimated_s, planned_s) in pairs:
        assert abs(max(estimated) / max(planned) - 1) < 0.05, (layout, estimated, planned)
        assert abs(estimated_s / planned_s - 1) < 0.1, (layout, estimated_s, planned_s)


def test_only_long_sequences_are_split_over_ranks(tmp_path: Path) -> None:
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.plan.hardware import gpu_named
    from megatron_scalebio.plan.search import candidates

    for length, sizes in ((4096, {1}), (16384, {1, 2, 4})):
        config = load_config(str(small_config(tmp_path, data={"seq_length": length})))
        found = list(candidates(config, 8, gpu_named("h100-80g")))
        assert {candidate.parallel.context_parallel_size for candidate in found} == sizes


def try_faults(folder: str) -> None:
    """What a dry run says of a sound layout, and of three that were tampered with."""
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.plan import checks
    from megatron_scalebio.plan.hardware import gpu_named
    from megatron_scalebio.plan.layout import Layout
    from megatron_scalebio.plan.planner import make_plan

    parallel = {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}
    path = small_config(
        Path(folder),
        parallel={**parallel, "num_layers_per_virtual_pipeline_stage": 2},
        bilevel={"resync_interval": None},
    )
    config = load_config(str(path))
    layout = Layout.of(config, 4, gpu_named("h100-80g"))
    plan = make_plan(config, layout, 0.4)
    ranks = checks.build_ranks(config, layout)
    found = {"sound": checks.problems(config, plan, ranks)}
    lost = [replace(ranks[0], layers=ranks[0].layers[1:]), *ranks[1:]]
    found["lost layer"] = checks.problems(config, plan, lost)
    key = next(iter(ranks[0].shards))
    fewer = {shard: size for shard, size in ranks[0].shards.items() if shard != key}
    found["lost shard"] = checks.problems(
        config, plan, [replace(ranks[0], shards=fewer), *ranks[1:]]
    )
    silent = replace(plan.stages[0], messages=plan.stages[0].messages[1:])
    mute = replace(plan, stages=(silent, *plan.stages[1:]))
    found["lost message"] = checks.problems(config, mute, ranks)
    found["u"] = [[s.held_bytes["weights u"] for s in plan.stages], list(plan.u_worst_bytes)]
    found["w"] = [s.held_bytes["weights w"] for s in plan.stages]
    long = small_config(Path(folder), parallel={**parallel, "context_parallel_size": 2})
    config_of_half = load_config(str(long))
    half = Layout.of(config_of_half, 8, gpu_named("h100-80g"))
    plan_of_half = make_plan(config_of_half, half, 0.4)
    ranks_of_half = checks.build_ranks(config_of_half, half)
    found["context parallel"] = checks.problems(config_of_half, plan_of_half, ranks_of_half)
    config_of_half.parallel.context_parallel_size = 1
    whole = make_plan(config_of_half, replace(half, cp=1), 0.4)
    found["kept"] = [
        [p.stages[0].activation_bytes["u train"], p.stages[0].flops_per_pass]
        for p in (whole, plan_of_half)
    ]
    config.parallel.fp8_format = "hybrid"
    for config.parallel.fp8_recipe in ("tensorwise", "delayed"):
        stages = make_plan(config, layout, 0.4).stages
        found[config.parallel.fp8_recipe] = [s.held_bytes["FP8 copies"] for s in stages]
    (Path(folder) / "found.json").write_text(json.dumps(found))


def test_a_dry_run_finds_faults(tmp_path: Path) -> None:
    run_distributed(try_faults, 1, str(tmp_path))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["sound"] == []
    assert "stage 0 holds layers" in found["lost layer"][0]
    assert "the shards of" in found["lost shard"][0]
    assert "stages 0 and 1" in " ".join(found["lost message"])
    assert found["context parallel"] == []
    # Half of each sequence, and the keys and values of all of it.
    (whole, whole_flops), (half, half_flops) = found["kept"]
    assert whole / 2 < half < 0.6 * whole
    assert half_flops == pytest.approx(whole_flops / 2, rel=1e-3)
    # Never reset, u keeps every layer it trained: in the end all.
    in_period, at_worst = found["u"]
    assert all(a < b for a, b in zip(in_period, at_worst, strict=True))
    assert at_worst == found["w"]
    # Of 4 layers on a stage and half of each: QKV and projection, a gated MLP of 192; as stored and
    # transposed. u has its own of the two that train, with delayed scales of all.
    matrices = 4 * (64 * 192 + 64 * 64 + 3 * 64 * 192) // 2
    scales = 4 * 4 * 4 // 2  # four bytes for each of four matrices
    assert found["delayed"] == [4 * (matrices + scales)] * 2
    assert found["tensorwise"] == [3 * (matrices + scales)] * 2
