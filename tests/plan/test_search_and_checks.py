"""Which layout a search proposes, and what a dry run says of ranks that do not fit together."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from megatron_scalebio.commands import plan as command
from megatron_scalebio.errors import UserError
from megatron_scalebio.plan import checks, search
from megatron_scalebio.plan.checks import Built, problems
from megatron_scalebio.plan.planner import MIN_HEADROOM
from tests.plan.test_numbers import GPU, a_plan, config


def an_estimate(name: str, of_run: Any, headroom: float) -> Any:
    plan = SimpleNamespace(layout=name, headroom=headroom)
    return SimpleNamespace(plan=plan, config=of_run, fits=lambda least: headroom >= least)


def test_a_search_proposes_the_first_that_has_the_headroom_when_rehearsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rehearsed = {"a": -0.01, "b": MIN_HEADROOM - 0.001, "c": MIN_HEADROOM, "d": 0.5}
    estimates = [an_estimate(name, config(), 0.1) for name in rehearsed]
    monkeypatch.setattr(search, "_estimates", lambda *args: estimates)
    monkeypatch.setattr(search, "_fewest", lambda *args: 3)

    def make_plan(of_run: Any, name: Any, mfu: float) -> Any:
        return SimpleNamespace(name=name, headroom=rehearsed[name])

    monkeypatch.setattr(search, "make_plan", make_plan)
    found = search.search(config(), 8, GPU, 0.4, lambda layout: None)
    assert found.best is not None and found.best.name == "c"  # type: ignore[attr-defined]
    assert found.best_config is estimates[2].config and found.fewest == 3


def test_a_search_is_for_the_devices_and_the_mfu_that_are_stated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(of_run: Any, gpus: int, gpu: Any, mfu: float, on_layout: Any) -> None:
        raise UserError(f"{gpus} x {gpu.name} at {mfu}")

    monkeypatch.setattr(search, "search", look)
    for gpus, count in ((None, 8), (3, 3)):
        args: Any = SimpleNamespace(gpu="h200", gpus=gpus, mfu=0.3)
        with pytest.raises(UserError, match=f"^{count} x h200 at 0.3$"):
            command._search(args, config(), Console(quiet=True))


@pytest.mark.parametrize(("estimated", "rehearsed"), [(0.51, ["a", "b"]), (0.49, ["a"])])
def test_a_search_rehearses_what_may_have_the_headroom_after_all(
    monkeypatch: pytest.MonkeyPatch, estimated: float, rehearsed: list[str]
) -> None:
    shares = {"a": 1.0, "b": estimated}
    estimates = [an_estimate(name, config(), x * MIN_HEADROOM) for name, x in shares.items()]
    monkeypatch.setattr(search, "_estimates", lambda *args: estimates)
    monkeypatch.setattr(search, "_fewest", lambda *args: None)
    monkeypatch.setattr(search, "make_plan", lambda *args: SimpleNamespace(headroom=0.0))
    heard: list[str] = []
    assert search.search(config(), 8, GPU, 0.4, heard.append).best is None
    assert heard == [f"{name}, whole" for name in rehearsed]


def test_a_search_trains_as_many_layers_at_a_time_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def estimates(of_run: Any, *rest: Any) -> list[Any]:
        fits = of_run.lisa.lisa_layers is not None and of_run.lisa.lisa_layers <= 4
        return [an_estimate("x", of_run, 0.1 if fits else -0.1)]

    monkeypatch.setattr(search, "_estimates", estimates)
    monkeypatch.setattr(search, "make_plan", lambda *args: SimpleNamespace(headroom=0.1))
    found = search.search(config(), 8, GPU, 0.4, lambda layout: None)
    assert found.best_config.lisa.lisa_layers == 4
    given = config(lisa={"lisa_layers": 8})
    assert search.search(given, 8, GPU, 0.4, lambda layout: None).best is None, "as configured"


def test_a_search_goes_past_layouts_that_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first candidate has 8 replicas for a batch of 12."""
    plain = {f"{kind}_parallel_size": 1 for kind in (
        "tensor_model", "pipeline_model", "context",
    )}  # fmt: skip
    of_run = config(
        parallel=plain,
        train={"micro_batch_size": 1, "global_batch_size": 12, "validation_batch_size": 4},
    )
    monkeypatch.setattr(search, "in_order", lambda found: found)
    estimator: Any = SimpleNamespace(estimate=lambda candidate, layout: layout)
    found: list[Any] = search._estimates(of_run, 8, GPU, estimator)
    assert {layout.dp for layout in found} == {1, 2, 4}


def test_of_equally_fast_layouts_the_simplest_comes_first() -> None:
    def layout(name: str, time: float = 1.0, too_large_by: int = 0, **degrees: int) -> Any:
        given = {"virtual": 1, "pp": 1, "cp": 1, "tp": 1, "ep": 1, **degrees}
        plan = SimpleNamespace(
            layout=SimpleNamespace(**given), cost=SimpleNamespace(step_s=time),
            worst_bytes=too_large_by,
        )  # fmt: skip
        return SimpleNamespace(name=name, plan=plan, fits=lambda least: not too_large_by)

    given = [
        layout("too large", 0.5, 9), layout("too large by less", 0.9, 8),
        layout("virtual", virtual=2, pp=2), layout("pipeline", pp=2), layout("context", cp=2),
        layout("tensor", tp=2), layout("experts", ep=2), layout("slower", 1.04),
        layout("far slower", 1.06),
    ]  # fmt: skip
    assert [each.name for each in search.in_order(given)] == [
        "slower", "experts", "tensor", "context", "pipeline", "virtual", "far slower",
        "too large by less", "too large",
    ]  # fmt: skip


def test_a_dry_run_finds_ranks_that_do_not_fit_together() -> None:
    def built(stage: int, tp_rank: int) -> Built:
        name, layers = f"weight of stage {stage}", tuple(range(4 * stage, 4 * stage + 4))
        return Built(tp_rank, stage, layers, 100, {(name, (3 * tp_rank, 0)): 15}, {name: (6, 5)})

    ranks = [built(stage, tp_rank) for stage in (0, 1) for tp_rank in (0, 1)]

    def told(number: int, **changes: Any) -> list[str]:
        changed = [*ranks]
        changed[number] = replace(ranks[number], **changes)
        return problems(config(), a_plan(), changed)

    assert problems(config(), a_plan(), ranks) == []
    assert told(3, parameters=101) == ["stage 1: its ranks hold [100, 101] parameters"]
    assert told(1, global_shapes={"weight of stage 0": (5, 6)}) == [
        "weight of stage 0 is (5, 6) on one rank, (6, 5) on another"
    ]
    assert told(2, shards={("weight of stage 1", (0, 0)): 14}) == [
        "the shards of weight of stage 1 have 29 elements, (6, 5) has 30"
    ]
    assert told(3, shards={("weight of stage 1", (3, 0)): 16}) == [
        "the shards of weight of stage 1 have 31 elements, (6, 5) has 30"
    ]
    assert told(0, layers=(0, 1, 2, 3, 4)) == [
        "stage 0 holds layers (0, 1, 2, 3, 4), not (0, 1, 2, 3)",
        "layers are not on one stage each: {0: 1, 1: 1, 2: 1, 3: 1, 4: 2, 5: 1, 6: 1, 7: 1}",
    ]


@pytest.mark.parametrize(
    ("drawn", "counts"),
    [([0, 1, 4, 5], None), ([0, 1, 2, 4], [3, 1]), ([0, 1, 4], [2, 1]), ([0, 4], [1, 1])],
)
def test_a_dry_run_counts_the_layers_that_lisa_draws(
    monkeypatch: pytest.MonkeyPatch, drawn: list[int], counts: list[int] | None
) -> None:
    """Four of eight, on two stages of four."""
    monkeypatch.setattr(checks, "draws", lambda *args: [[2, 3, 6, 7], drawn])
    said = checks._lisa(config(lisa={"lisa_layers": 4}), a_plan().layout)
    expected = f"LISA period 1 has {counts} active layers on the stages"
    assert said == ([] if counts is None else [expected])
