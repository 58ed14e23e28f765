"""The check after a run's last step: what it asks of models, and measures on them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_scalebio.methods.end_check import end_check
from tests import described
from tests.distributed.harness import run_distributed
from tests.distributed.small_runs import BATCH, begun, write_problem

LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "one": (1, {}),
    "tp2": (2, {"parallel": {"tensor_model_parallel_size": 2}}),
    "pp2": (2, {"parallel": {"pipeline_model_parallel_size": 2}}),
    "dp2": (2, {"parallel": {"use_distributed_optimizer": True}}),
    "lisa": (1, {"lisa": {"lisa_layers": 1, "lisa_interval": 4}}),
    "grown": (1, {"bilevel": {"memory_growth": 1.0}}),
    "tokens": (1, {"data": {"loss_mean": "token"}}),
    "as the first": (1, {}),
    "slow": (1, {"optimizer": {"lr": 1e-6}}),
    "slow in bf16": (1, {"optimizer": {"lr": 1e-6}, "parallel": {"bf16": True}}),
    "bounds": (1, {"bilevel": {"kl_to_prior": 0.1}}),
    "rare": (1, {"bilevel": {"floor_share": 0.05}, "optimizer": {"lr": 0.01, "lr_u": 0.004},
                 "train": {"micro_batch_size": 1, "global_batch_size": 2}}),
}  # fmt: skip
FOUND = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
RARE = torch.tensor([0.9, 0.08, 0.02], dtype=torch.float64)


def on_a_rank(folder_name: str, name: str) -> None:
    import torch.distributed as dist

    folder = Path(folder_name)
    sections = dict(LAYOUTS[name][1])
    if name == "as the first":
        sections["data"] = {"validation": [{"name": "same", "path": str(folder / "data" / "a")}]}
    train = {**BATCH, "train_iters": 500, **sections.pop("train", {})}
    state = begun(folder, "reweight", train=train, **sections)
    bio = state.training
    for _ in range(3):
        state.make_step()
    if name == "grown":  # resets leave a part, by now
        bio.steps = 500
    if name == "rare":  # the run's losses were small by then, those of one source are not
        calm = {"w: validation loss": [1e-3] * 40}
        bio.spikes.load_state_dict({"applied": calm, "last": {k: v[:8] for k, v in calm.items()}})
    before, said, asked, step = described.described(state), [], [], bio.step
    apart: list[float] = []

    def noted(train: Any, lean: Any, lr: float, **given: Any) -> Any:
        both = (bio.w[0].parameters(), bio.u[0].parameters())
        w, u = (torch.cat([p.detach().flatten() for p in each]) for each in both)
        apart.append(float((w - u).abs().max()))
        asked.append({"lr": lr, **given, "inclusion": given["inclusion"].tolist()})
        return step(train, lean, lr, **given)

    bio.step = noted
    share_V = [1 / len(state.data.validation)] * len(state.data.validation)
    cost, w = replace(state.cost), torch.cat([p.flatten() for p in bio.w[0].parameters()])
    check = end_check(state, bio, RARE if name == "rare" else FOUND, share_V, said.append)
    del bio.step
    result = {
        "asked": asked,
        "apart": apart,
        "usual": float(w.detach().float().square().mean().sqrt()),
        "trained": state.cost.trained - cost.trained,
        "scored": state.cost.scored - cost.scored,
        "lengths": [
            [each.length(i) for i in range(len(each))]
            for each in (*state.data.validation, *state.data.sources)
        ],
        "change": check and check.change_S.tolist(),
        "draw": check and check.draw_SS.tolist(),
        "said": said,
        "signalled": end_check(state, bio, FOUND, share_V, signalled=lambda: 15) is None,
        "moved": sorted(described.differing(described.described(state), before)),
        "alike": [],
    }
    for groups in ([], [[0, 1]]) if check else ():
        state.check = replace(check, lookalikes=groups)
        result["alike"].append(state.intervals().lookalikes)
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("check")
    (folder / "data").mkdir()
    write_problem(folder / "data")
    for name, (ranks, _) in LAYOUTS.items():
        run_distributed(on_a_rank, ranks, str(folder), name)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in LAYOUTS}


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tp2", "pp2", "dp2"])
def test_layouts_measure_the_same(measured: dict[str, Any], name: str) -> None:
    for key in ("change", "draw"):
        ours, theirs = measured[name][key], measured["one"][key]
        np.testing.assert_allclose(ours, theirs, rtol=0.01, atol=1e-4)
    told = "check of the weights: 4 steps for each of 3 sources in use"
    assert measured[name]["said"] == [told]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["one", "lisa", "grown", "tokens"])
def test_every_kind_of_run_is_measured(measured: dict[str, Any], name: str) -> None:
    draw = np.array(measured[name]["draw"])
    assert (np.linalg.eigvalsh(draw)[1:] > 1e-6).all() and np.abs(draw.sum(0)).max() < 1e-6
    alike = [
        other for other in ("one", "lisa", "grown", "tokens")
        if np.allclose(draw, measured[other]["draw"], rtol=0.02)
    ]  # fmt: skip
    # By then, resets leave a part of u's departure; the check's do not.
    assert alike == (["one", "grown"] if name in ("one", "grown") else [name])


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["one", "tp2", "lisa", "grown", "tokens"])
def test_each_source_is_leaned_to_from_u_equal_to_w(measured: dict[str, Any], name: str) -> None:
    apart_AT = np.reshape(measured[name]["apart"], (3, 4))
    assert not apart_AT[:, 0].any() and apart_AT[:, 1:].all()


@pytest.mark.distributed
def test_the_run_tells_which_sources_the_check_found_alike(measured: dict[str, Any]) -> None:
    assert measured["one"]["alike"] == [[], [[0, 1]]]


@pytest.mark.distributed
def test_more_is_asked_of_the_source_that_validation_is_made_of(measured: dict[str, Any]) -> None:
    first, *others = measured["as the first"]["change"]
    assert first > 0.05 and sum(others) == pytest.approx(-first, abs=1e-6)


@pytest.mark.distributed
def test_rounding_is_not_taken_for_what_examples_gain(measured: dict[str, Any]) -> None:
    spread = [np.diag(measured[name]["draw"]) ** 0.5 for name in ("slow in bf16", "slow")]
    np.testing.assert_allclose(*spread, rtol=0.4)


@pytest.mark.distributed
def test_the_run_keeps_what_it_has_learned(measured: dict[str, Any]) -> None:
    assert all(found["signalled"] for found in measured.values())
    # The cost, which tells of the check, too.
    moved = [[], [".cost.scored", ".cost.trained"]]
    assert [found["moved"] for found in measured.values()] == [
        moved[name != "bounds"] for name in LAYOUTS
    ]


@pytest.mark.distributed
def test_a_source_is_leaned_to_as_the_run_trains(measured: dict[str, Any]) -> None:
    """At the rates of its middle, by batches of the mixture found, of which nothing moves."""
    count_S = 2 * (0.95 * RARE + 0.05 / 3)
    decayed = (251 - 15) / (500 - 15)
    rate = 0.1 + 0.9 * (1 + math.cos(math.pi * decayed)) / 2
    assert len(measured["rare"]["asked"]) == 3 * 4
    for given in measured["rare"]["asked"]:
        assert given.pop("inclusion") == pytest.approx(count_S.clamp_max(1.0).tolist())
        wanted = {"lr": 0.01 * rate, "lr_u": 0.004 * rate, "alpha": 1.0, "lr_lambda": 0.0}
        assert given == pytest.approx(wanted)
    # In bf16 less would be lost in rounding: in 4 steps, half of each, to 2 % of a usual weight.
    wanted = 0.02 * measured["slow in bf16"]["usual"] / (4 * 0.5)
    for step in measured["slow in bf16"]["asked"]:
        assert step["lr"] == step["lr_u"] == pytest.approx(wanted, rel=0.02)


@pytest.mark.distributed
def test_it_costs_what_it_trains_and_scores(measured: dict[str, Any]) -> None:
    """Of each source's 32 examples a third is looked at, by w and by u, and so of each set's."""
    least, most = 0, 0
    for lengths in map(sorted, measured["one"]["lengths"]):
        filled = lengths[0] * (min(len(lengths), 10) % 2)  # micro-batches are of two
        least, most = least + sum(lengths[:10]) + filled, most + sum(lengths[-10:]) + filled
    assert least < most and 3 * 2 * least <= measured["one"]["scored"] <= 3 * 2 * most
    assert measured["one"]["trained"] > 3 * 4 * (2 * 8 + 8) * 4


@pytest.mark.distributed
def test_bounds_and_priors_are_not_checked(measured: dict[str, Any]) -> None:
    assert measured["bounds"]["change"] is None and not measured["bounds"]["said"]
