"""One flush equals the naive step, packed or not, and 7 steps are the same, under every layout."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.distributed import naive
from tests.distributed.exact_layouts import (
    BIAS,
    CLIP,
    INTERVAL,
    LAYOUTS,
    PACKED,
    SAME,
    SEQ,
    STEPS,
    VOCAB,
    WARM_STEPS,
    settings,
)
from tests.distributed.gather import global_tensors, merged, relative
from tests.distributed.harness import next_layout, run_distributed
from tests.markov import write_source

pytestmark = pytest.mark.distributed


def write_problem(folder: Path) -> dict:
    """Three sources and two validation sets of uneven lengths and masks."""
    generator = np.random.default_rng(5)
    entries: dict[str, list] = {"sources": [], "validation": []}
    for kind, name, count in (
        ("sources", "a", 17), ("sources", "b", 9), ("sources", "c", 30),
        ("validation", "v", 20), ("validation", "x", 7),
    ):  # fmt: skip
        lengths = generator.integers(4, SEQ + 1, size=count)
        rows = [generator.integers(0, VOCAB, size=n + 1) for n in lengths]
        masks = [generator.random(n + 1) < 0.6 for n in lengths]
        for mask in masks:
            mask[-1] = True
        path = write_source(folder, name, rows, masks, vocab_size=VOCAB)
        entries[kind].append({"name": name, "path": path})
    entries["validation"][0]["weight"] = 3.0
    return entries


def start_of(name: str) -> str:
    """The start point that fits a layout's model and optimizer."""
    if "untied" in name:
        return "one-untied-token"
    if "on-input" in name:
        return "one-experts-on-input"
    kind = "-experts" if "experts" in name else ""
    return ("one-distributed-optimizer" if "distributed" in name else "one") + kind


def on_ranks(problem: dict, names: list[str], folder: str) -> None:
    """For each layout: the gradients of one flush from a shared start, and 7 steps."""
    from megatron_scalebio import runtime

    for name in names:
        runtime.start(load(problem, name))
        one_flush(problem, name, Path(folder))
        if name in SAME or any(name in others for others in SAME.values()):
            seven_steps(load(problem, name, INTERVAL), name, Path(folder))
        next_layout()


def load(problem: dict, name: str, interval: int = WARM_STEPS + 1):
    from megatron_scalebio.config_loader import load_config

    config = load_config(None, settings(problem, name, interval))
    config.validate(LAYOUTS[name][0])
    return config


def start_point(problem: dict, folder: str) -> None:
    """One rank trains a few steps, so that w ≠ u and p is not uniform, and saves."""
    from megatron_scalebio import runtime
    from megatron_scalebio.checkpoint import saver
    from megatron_scalebio.methods.scalebio import TrainState, train_step

    for name in sorted({start_of(name) for name in LAYOUTS}):
        config = load(problem, name)
        runtime.start(config)
        state = TrainState(config, Path(folder) / "cache")
        state.training.mixture.logits_S += torch.tensor([0.4, -0.3, 0.1])
        for _ in range(WARM_STEPS):
            train_step(state)
        saver.save(state, Path(folder) / f"start-{name}")
        dump_naive(state, Path(folder) / f"naive-{name}.pt")
        next_layout()


def dump_naive(state, path: Path) -> None:
    """What the naive step needs: weights by Megatron name, the next batch by example."""
    picks = state.data.sampler.next(state.training.mixture.probs_S.numpy())
    valid = state.data.validation_sampler.next(state.data.shares_V)

    def examples(sources, chosen):
        groups: dict[int, list] = {}
        for place, (g, i) in enumerate(zip(chosen.group_B, chosen.index_B, strict=True)):
            tokens, targets = (torch.tensor(each) for each in sources[g].example(i))
            groups.setdefault(int(g), []).append((tokens, targets, place))
        return groups

    content = {
        "w": global_tensors(state.training.w, lambda p: p.data),
        "u": global_tensors(state.training.u, lambda p: p.data),
        "logits": state.training.mixture.logits_S.detach(),
        "train": examples(state.data.sources, picks),
        "valid": examples(state.data.validation, valid),
        "shares": state.data.shares_V.tolist(),
        "mean": state.config.data.loss_mean,
    }
    torch.save(content, path)


def one_flush(problem: dict, name: str, folder: Path) -> None:
    """From the start point, padded and, where there are two kinds of rows, packed."""
    from megatron_scalebio.checkpoint import saver
    from megatron_scalebio.core import experts
    from megatron_scalebio.methods.scalebio import TrainState

    state = TrainState(load(problem, name), folder / "cache")
    saver.load_latest(state, folder / f"start-{start_of(name)}")
    as_configured, drawn = state.data.layout, copy.deepcopy(state.common_state())
    buffers = [b for chunks in state.training.models.values() for c in chunks for b in c.buffers()]
    counted = [b.clone() for b in buffers]
    for kind in ("flush", "packed")[: 2 if name in PACKED else 1]:
        state.data.layout = replace(as_configured, packed=kind == "packed")
        state.load_common_state(copy.deepcopy(drawn))
        for buffer, value in zip(buffers, counted, strict=True):
            buffer.copy_(value)
        for chunks in state.training.models.values():
            experts.forget_load(chunks)
        flush_of(state, name, kind, folder)
    state.training.leave_period()


def flush_of(state, name: str, kind: str, folder: Path) -> None:
    from megatron_scalebio.core import experts
    from megatron_scalebio.core.flush import flush, reduce_losses
    from megatron_scalebio.core.period import prepare_gradients
    from megatron_scalebio.mixture.objective import hypergradient, logits_gradient

    config = state.config
    probs = state.training.mixture.probs_S
    train, valid, picks, valid_picks = state.data.next(probs)
    inclusion, inclusion_V = (torch.from_numpy(each.inclusion_S) for each in (picks, valid_picks))
    shares = torch.from_numpy(state.data.shares_V)
    alpha, groups = config.bilevel.alpha, state.training.groups
    period = state.training.enter_period()
    period.zero_grad()
    passes = state.training.passes(train, valid, probs / inclusion, shares / inclusion_V, alpha)
    # The distributed optimizer would leave each rank its shard of the sums: ask for all.
    records = flush(period.twins, passes, groups, force_all_reduce=True)
    losses = reduce_losses(records, passes, len(probs), len(shares), groups)
    g = hypergradient(losses.w_S - losses.u_S, probs, inclusion, alpha)

    def gradient(p):
        return p.main_grad.clone() if p.requires_grad else None

    for chunks in state.training.models.values():
        experts.move_biases(chunks, groups)
    content = {
        model: global_tensors(chunks, gradient) for model, chunks in state.training.models.items()
    }
    norms = {}
    for model, optimizer in period.optimizers.items():
        optimizer.config.clip_grad = CLIP
        norms[model] = [prepare_gradients(optimizer), float(optimizer.get_grad_norm())]
    rows = rows_of_all_ranks(train)
    if holds_what_others_do_not():
        content |= {
            "norms": norms,
            "lambda": logits_gradient(g, probs),
            "losses": {
                "w": losses.w_S.tolist(),
                "u": losses.u_S.tolist(),
                "validation": losses.validation_V.tolist(),
            },
            "active": state.training.active_layers,
            "rows": rows,
        }
        torch.save(content, folder / f"{kind}-{name}-{torch.distributed.get_rank()}.pt")


def rows_of_all_ranks(train: list) -> list[list[int]]:
    """The places in the global batch of each micro-batch's examples."""
    from megatron.core import parallel_state

    mine = [batch.member_B.tolist() for batch in train]
    group = parallel_state.get_data_parallel_group()
    everyone = [None] * group.size()
    torch.distributed.all_gather_object(everyone, mine, group=group)
    return [row for rows in everyone for row in rows]


def holds_what_others_do_not() -> bool:
    """True on the first data-parallel ranks, which together hold every expert."""
    from megatron.core import parallel_state

    replica = parallel_state.get_data_parallel_rank()
    return replica < parallel_state.get_expert_model_parallel_world_size()


def seven_steps(config, name: str, folder: Path) -> None:
    from megatron_scalebio.methods.scalebio import TrainState, train_step

    state = TrainState(config, folder / "cache")
    trace = []
    for _ in range(STEPS):
        result = train_step(state)
        assert result.skipped is None, (name, state.step, result.skipped)
        losses = result.losses
        trace.append(
            torch.cat([losses.w_S, losses.u_S, losses.validation_V, state.training.mixture.probs_S])
        )
    if holds_what_others_do_not():
        content = {
            "trace": torch.stack(trace),
            "w": global_tensors(state.training.w, lambda p: p.data),
        }
        torch.save(content, folder / f"steps-{name}-{torch.distributed.get_rank()}.pt")
    state.training.leave_period()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    problem = write_problem(folder / "data")
    run_distributed(start_point, 1, problem, str(folder))
    for world_size in (1, 2, 4):
        names = [n for n, layout in LAYOUTS.items() if layout[0] == world_size]
        run_distributed(on_ranks, world_size, problem, names, str(folder))
    return folder


def assembled(folder: Path, kind: str, name: str) -> list[dict]:
    paths = sorted(folder.glob(f"{kind}-{name}-[0-9].pt"))
    return [torch.load(path, weights_only=True) for path in paths]


def trim(tensor: torch.Tensor) -> torch.Tensor:
    """Cuts the padded vocabulary, whose size depends on TP."""
    return tensor[:VOCAB] if tensor.shape[0] in (64, 96, 128) else tensor


@functools.cache
def shape_of(name: str) -> dict:
    """What the naive step is told of a layout's model."""
    shape = {"layers": 4, "heads": 4, "groups": 2, "vocab": VOCAB, "micro_batch": 3}
    on_input = "on-input" in name
    experts = {"topk": 1 if on_input else 2, "on_input": on_input, "aux": 0.3, "z": 0.1}
    return shape | (experts if "experts" in name else {})


def routers_train(name: str) -> bool:
    """In layers that are frozen otherwise, too."""
    return LAYOUTS[name][3].get("lisa_train_routers", False)


def replays(name: str) -> bool:
    """u's tokens go to w's experts."""
    return LAYOUTS[name][2].get("moe_enable_routing_replay", False)


@functools.cache
def naive_step(
    folder: Path, start: str, mean: str, replays: bool, rows: tuple | None = None
) -> tuple:
    """Gradients and losses of the naive step, in float64."""
    inputs = torch.load(folder / f"naive-{start}.pt", weights_only=True)
    weights = ({k: v.double() for k, v in inputs[role].items()} for role in ("w", "u"))
    rest = (inputs[name] for name in ("logits", "train", "valid", "shares"))
    shape = shape_of(start) | {"replays": replays} | ({"rows": rows} if rows else {})
    return naive.bilevel_gradients(*weights, *rest, 7.0, shape, mean)


@functools.cache
def naive_loads(folder: Path, start: str, model: str) -> dict:
    """The load of each layer's experts."""
    inputs = torch.load(folder / f"naive-{start}.pt", weights_only=True)
    weights = {key: value.double() for key, value in inputs[model].items()}
    return naive.router_losses(weights, shape_of(start), inputs["train"])[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_flush_equals_naive_autograd(results: Path, name: str) -> None:
    mean = LAYOUTS[name][4].get("loss_mean", "sample")
    want_w, want_u, want_logits, want_losses = naive_step(
        results, start_of(name), mean, replays(name)
    )
    parts = assembled(results, "flush", name)
    assert parts
    for kind, want in (("w", want_w), ("u", want_u)):
        got = merged(parts, kind)
        got.pop(BIAS, None)  # has no gradient
        frozen = "lisa-frozen" in name
        expected = {k for k in want if k.startswith("decoder.layers.")} if frozen else set(want)
        assert set(got) == expected
        for key, value in got.items():
            reference = want[key]
            active = None if ".router." in key and routers_train(name) else parts[0]["active"]
            if key.startswith("decoder.layers.") and active is not None:
                assert all(value[n].eq(0).all() for n in range(4) if n not in active)
                value, reference = value[active], reference[active]
            assert relative(trim(value), trim(reference)) <= 1e-5, (kind, key)
    assert relative(parts[0]["lambda"], want_logits) <= 1e-5, (parts[0]["lambda"], want_logits)
    for kind, values in want_losses.items():
        np.testing.assert_allclose(parts[0]["losses"][kind], values, rtol=1e-6)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_all_parts_are_clipped_by_one_norm(results: Path, name: str) -> None:
    parts = assembled(results, "flush", name)
    for model in ("w", "u"):
        held = merged(parts, model)
        held.pop(BIAS, None)
        norm = math.sqrt(sum(float(each.double().square().sum()) for each in held.values()))
        assert parts[0]["norms"][model] == pytest.approx([norm, CLIP], rel=1e-5)


@pytest.mark.parametrize("name", PACKED)
def test_packed_rows_give_the_same_losses_and_gradients(results: Path, name: str) -> None:
    packed, flush = (assembled(results, kind, name) for kind in ("packed", "flush"))
    assert packed[0]["rows"] != flush[0]["rows"]
    for kind, values in flush[0]["losses"].items():
        np.testing.assert_allclose(packed[0]["losses"][kind], values, rtol=1e-6)
    want = {kind: merged(flush, kind) for kind in ("w", "u")}
    if "experts" in name:  # routers are balanced over what shares a micro-batch
        mean = LAYOUTS[name][4].get("loss_mean", "sample")
        rows = tuple(sorted(map(tuple, packed[0]["rows"])))  # whichever rank has which
        *both, _, _ = naive_step(results, start_of(name), mean, replays(name), rows)
        want = dict(zip("wu", both, strict=True))
    for kind, gradients in want.items():
        got = merged(packed, kind)
        for key, gradient in gradients.items():
            if key in got and key != BIAS:
                active = packed[0]["active"] if key.startswith("decoder.layers.") else None
                value, gradient = (x if active is None else x[active] for x in (got[key], gradient))
                most = 1e-5 if "experts" in name else 1e-6
                assert relative(trim(value), trim(gradient)) <= most, (kind, key)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "experts" in name])
def test_biases_of_experts_move_against_the_load_of_training(results: Path, name: str) -> None:
    inputs = torch.load(results / f"naive-{start_of(name)}.pt", weights_only=True)
    parts = assembled(results, "flush", name)
    active = (not routers_train(name) and parts[0]["active"]) or range(4)
    for model in ("w", "u"):
        start, routed = inputs[model][BIAS].double(), "w" if replays(name) else model
        loads = naive_loads(results, start_of(name), routed)
        want = start.clone()
        for layer in active:
            load = loads[layer].double()
            want[layer] += 0.02 * torch.sign(load.mean() - load)
        assert not torch.equal(want, start)
        torch.testing.assert_close(merged(parts, model)[BIAS].double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("one", "other"), [(a, b) for a, bs in SAME.items() for b in bs])
def test_seven_steps_do_not_depend_on_the_layout(results: Path, one: str, other: str) -> None:
    a, b = assembled(results, "steps", one), assembled(results, "steps", other)
    torch.testing.assert_close(a[0]["trace"], b[0]["trace"], rtol=0, atol=2e-5)
    weights_a, weights_b = merged(a, "w"), merged(b, "w")
    for key, value in weights_a.items():
        torch.testing.assert_close(
            trim(weights_b[key]),
            trim(value),
            rtol=0,
            atol=2e-5,
            msg=lambda m, key=key: f"{key}: {m}",
        )
