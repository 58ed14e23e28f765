"""The periods of a training on one rank, and how it goes on from what it has saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_scalebio.core.lisa import active_layers
from megatron_scalebio.core.low_bits import dither, join, kept
from megatron_scalebio.core.options import LisaOptions
from tests.core.regression import (
    ADAM,
    LAYERS,
    SEED,
    alone,
    batches,
    bilevel,
    parts,
    set_trainable,
    unwrapped,
    weights_of,
)
from tests.core.test_step import agree, means, told
from tests.described import differing, models, same
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed
LISA = LisaOptions(2, interval=2)


def layers_of(bio: Any, name: str) -> list[torch.nn.Parameter]:
    return [layer.weight for layer in unwrapped(bio, name).layers]


def draws(bf16: bool, resync: int | None) -> None:
    """A period for each draw: its layers, masters and resets; and what rests keeps low bits."""
    seen: list[tuple] = []

    def noting(chunks: Any, layers: Any, lisa: Any) -> None:
        seen.append((chunks, layers, lisa))
        set_trainable(chunks, layers, lisa)

    bio = bilevel({"resync_interval": resync}, bf16, lisa=LISA, set_trainable=noting)
    counted = unwrapped(bio, "w").router.expert_bias
    counted.fill_(0.5)  # as if w had been loaded
    trained: set[int] = set()
    for step in range(6):
        layers = active_layers(LISA, LAYERS, 1, 1, step // 2, SEED) or []
        begins, before = step % 2 == 0, bio.period
        values = {name: [p.detach().clone() for p in layers_of(bio, name)] for name in "wu"}
        if begins and step:
            counted.fill_(9.0)
        bio.enter_period()
        assert (bio.period is not before) == begins and bio.period_number == step // 2
        assert bio.active_layers == layers
        assert bio.u_is_w == (begins and resync is not None)
        if begins:
            assert seen == [(bio.w, layers, LISA), (bio.u, layers, LISA)]
            seen.clear()
            is_reset = resync is not None or step == 0
            assert torch.equal(unwrapped(bio, "u").router.expert_bias, counted) == is_reset
            assert all(map(torch.equal, values["w"], weights_of(bio, "w")))
            of_u = values["w" if resync else "u"]
            assert all(map(torch.equal, of_u, weights_of(bio, "u")))
            for number in layers if bf16 else ():
                begun(bio, number, number not in trained)
        bio.step(*batches(step), lr=0.01)
        trained |= set(layers)
        for name in "wu":
            for number, parameter in enumerate(layers_of(bio, name)):
                rests = bf16 and number in trained - set(layers)
                if name == "u" and resync:  # it goes on from w's
                    rests = False
                assert (kept(parameter) is not None) == rests, (name, number, step)
    assert len(trained) > 2
    bio.leave_period()
    if not bf16:
        assert not any(map(kept, layers_of(bio, "w")))


def begun(bio: Any, number: int, first: bool) -> None:
    """A layer's masters: at first random ones that round to its weights, the same in w and u."""
    of_w, of_u = (layers_of(bio, name)[number] for name in "wu")
    assert of_w.data_ptr() != of_u.data_ptr()
    if first:
        copy = torch.nn.Parameter(of_w.detach().clone())
        dither(copy, SEED, None)
        held = kept(copy)
        assert held is not None and held.bits.any()
        master = join(copy.detach().flatten(), held.bits)
        for each in (of_w, of_u):
            assert torch.equal(each.main_param.flatten(), master)  # type: ignore[attr-defined]
    else:
        assert not torch.equal(of_w.main_param, of_w.float())  # type: ignore[attr-defined]


# options and more; steps before the checkpoint
SAVED: dict[str, tuple[dict, int]] = {
    "fp32": ({}, 4),
    "in a period": ({"bf16": True, "lisa": LISA}, 3),
    "between periods": ({"bf16": True, "lisa": LISA}, 4),
    "never reset": ({"bf16": True, "lisa": LISA, "options": {"resync_interval": None}}, 3),
    "never reset, between": ({"bf16": True, "lisa": LISA, "options": {"resync_interval": None}}, 4),
}  # fmt: skip


def goes_on(folder: Path, name: str) -> None:
    from megatron.core import dist_checkpointing

    given, steps = SAVED[name]
    whole, again = bilevel(**given), bilevel(**given)
    for number in range(steps):
        whole.step(*batches(number), lr=0.05)
    again.step(*batches(50), lr=0.05)  # it has a period of its own, which ends
    whole.skipped_in_a_row = 2
    state = whole.sharded_state_dict()
    common = state["scalebio"]
    assert {f"u.layers.{n}.weight" for n in apart(whole)} == {
        k for k in common["u"] if "layers" in k
    }
    assert {f"layers.{n}.weight" for n in range(LAYERS)} == {
        k for k in common["w"] if "layers" in k
    }
    assert bool(common["low_bits"]) == ("lisa" in given)
    target = folder / name
    target.mkdir()
    dist_checkpointing.save(state, str(target), async_strategy="mcore")
    held = models(SimpleNamespace(training=whole))
    kept_common = whole.common_state()
    rest = [told(whole.step(*batches(n), lr=0.05)) for n in range(steps, steps + 4)]
    load(again, target)
    assert not differing(models(SimpleNamespace(training=again)), held)
    agree(again.common_state(), kept_common, name)
    for number, want in enumerate(rest):
        got = told(again.step(*batches(steps + number), lr=0.05))
        assert all(same(got[key], value) for key, value in want.items()), (name, number)
    if name == "fp32":
        from_before(target, rest[0])


def apart(bio: Any) -> list[int]:
    """The layers in which u has storage of its own."""
    pairs = zip(layers_of(bio, "w"), layers_of(bio, "u"), strict=True)
    return [n for n, (p_w, p_u) in enumerate(pairs) if p_w.data_ptr() != p_u.data_ptr()]


def load(bio: Any, folder: Path, without: tuple[str, ...] = ()) -> None:
    from megatron.core import dist_checkpointing

    common = dist_checkpointing.load_common_state_dict(str(folder))
    for key in without:
        del common["scalebio"][key]
    wanted = bio.sharded_state_dict(loading=common)
    bio.load_state_dict(dist_checkpointing.load(wanted, str(folder)))


def from_before(folder: Path, want: dict) -> None:
    """A checkpoint without what earlier versions did not write."""
    bio = bilevel()
    load(bio, folder, ("w", "low_bits", "spikes", "goals"))
    assert not any(bio.spikes.applied.values()) and not bio.goals.sums_2V.any()
    got = told(bio.step(*batches(4), lr=0.05))
    assert all(same(got[key], value) for key, value in want.items())


def w_alone(folder: Path) -> None:
    """Plain training: AdamW on the weighted losses."""
    from megatron.core import dist_checkpointing

    from megatron_scalebio.core.flush import passes_of
    from megatron_scalebio.core.training import Training
    from megatron_scalebio.mixture.objective import Role

    p_S = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)

    def step(training: Any, number: int) -> Any:
        training.enter_period().zero_grad()
        passes = passes_of({Role.TRAIN_W: 1.0}, batches(number)[0], p_S, "sample", training.groups)
        losses = training.flush(passes, 3)
        assert len(losses.validation_V) == 0
        return training.update(losses, {}, {"w": 0.05})

    training = Training(**parts())
    assert training.models == {"w": training.w} and training.u is None
    weights = [w.double().requires_grad_() for w in weights_of(training, "w")]
    adam = torch.optim.AdamW(
        weights, lr=0.05, betas=(0.8, 0.9), eps=ADAM["adam_eps"], weight_decay=ADAM["weight_decay"]
    )
    for number in range(4):
        update = step(training, number)
        assert update.skipped is None and update.norms.keys() == {"w"}
        adam.zero_grad()
        (p_S * means(weights, batches(number)[0], 3)).sum().backward()
        adam.step()
    agree(
        dict(enumerate(weights_of(training, "w"))), dict(enumerate(w.detach() for w in weights)), 4
    )
    state = training.sharded_state_dict()
    assert "u" not in state and "u" not in state["scalebio"]
    dist_checkpointing.save(state, str(folder), async_strategy="mcore")
    again = Training(**parts())
    load(again, folder)
    for number in (4, 5):
        assert step(again, number).norms == step(training, number).norms
    assert all(map(torch.equal, weights_of(again, "w"), weights_of(training, "w")))
    # Without a period: what is left to save is w.
    training.leave_period()
    assert training.sharded_state_dict()["scalebio"]["period"] is None
    # In bf16 its masters begin as its weights, and without LISA they end with their period.
    half = Training(**parts(bf16=True))
    half.enter_period()
    for parameter in layers_of(half, "w"):
        assert torch.equal(parameter.main_param, parameter.float())  # type: ignore[attr-defined]
    step(half, 0)
    half.leave_period()
    assert not any(map(kept, layers_of(half, "w")))


def as_it_was_made() -> None:
    from megatron_scalebio.core.training import Training

    with pytest.raises(ValueError, match=f"lisa.layers is 5 of {LAYERS}"):
        Training(**parts(), lisa=LisaOptions(5))
    with pytest.raises(ValueError, match="check_for_nan_in_grad"):
        Training(**parts(ddp={"check_for_nan_in_grad": True}))
    whole = Training(**parts(), lisa=LisaOptions(LAYERS))
    assert (whole.steps, whole.skipped_in_a_row, whole.u_is_w) == (0, 0, False)
    usual = Training(**parts(), with_u=True, lisa=LISA)
    usual.enter_period()
    drawn = [active_layers(LISA, LAYERS, 1, 1, 0, seed) for seed in (1234, 1235)]
    assert usual.active_layers == drawn[0] != drawn[1]
    usual.lisa, usual._resync_interval, usual.steps = None, 2, 1000
    assert usual.memory == 1.0 and usual.whole_resets_end == 0


def on_rank(folder_name: str) -> None:
    alone()
    as_it_was_made()
    for bf16, resync in ((True, 3), (True, None), (False, 3)):
        draws(bf16, resync)
    for name in SAVED:
        goes_on(Path(folder_name), name)
    (Path(folder_name) / "w").mkdir()
    w_alone(Path(folder_name) / "w")


def test_periods_begin_end_and_are_resumed(tmp_path: Path) -> None:
    run_distributed(on_rank, 1, str(tmp_path))
