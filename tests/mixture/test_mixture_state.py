"""The mixture's state: saved, resumed exactly, and read from checkpoints of earlier versions."""

import io

import pytest
import torch

from megatron_scalebio.mixture.confidence import TrajectoryBlocks
from megatron_scalebio.mixture.levels import Levels
from megatron_scalebio.mixture.mixture import Mixture
from tests.mixture.test_mixture import KINDS, noise


@pytest.mark.parametrize(("one", "other"), [KINDS, KINDS[::-1]])
def test_a_mixture_goes_on_from_the_state_of_the_other_kind(one: str, other: str) -> None:
    before, after = Mixture([1.0, 3.0], one), Mixture([1.0, 1.0], other)
    for g_S in noise(5, 2):
        before.step(g_S, 0.05)
    after.load_state_dict(before.state_dict())
    assert torch.equal(after.probs_S, before.probs_S) and after.steps == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_does_not_change_with_later_steps(kind: str) -> None:
    path, memory = noise(40, 3), 2.5  # above 1 the last ten or so hypergradients count as well
    mixture = Mixture([1.0, 2.0, 3.0], kind)
    for g_S in path[:20]:
        mixture.step(g_S, 0.05, memory)
    state, loaded = mixture.state_dict(), Mixture([1.0] * 3, kind)
    expected = mixture.probs_S
    assert not state["logits"].requires_grad
    loaded.load_state_dict(state)
    for g_S in path[20:]:
        mixture.step(g_S, 0.05, memory)
    again = Mixture([1.0] * 3, kind)
    again.load_state_dict(state)
    for restored in (loaded, again):
        assert torch.equal(restored.probs_S, expected)
        assert restored.steps == restored.trajectory.steps == 20
    if kind == "eg":
        for g_S in path[20:]:
            loaded.step(g_S, 0.05, memory)
        assert torch.equal(loaded.probs_S, mixture.probs_S)
        assert loaded.squares[0] == mixture.squares[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 1, 17])
def test_resume_is_exact(kind: str, cut: int) -> None:
    path = noise(40, 3)
    whole = Mixture([1.0, 2.0, 3.0], kind)
    resumed = Mixture([1.0, 1.0, 1.0], kind)
    for number, g_S in enumerate(path):
        if number == cut:
            # As a checkpoint holds it: torch.load of plain types only.
            file = io.BytesIO()
            torch.save(whole.state_dict(), file)
            file.seek(0)
            resumed.load_state_dict(torch.load(file, weights_only=True))
        whole.step(g_S, 0.05, memory=2.5)
        if number >= cut:
            resumed.step(g_S, 0.05, memory=2.5)
    assert torch.equal(whole.probs_S, resumed.probs_S)
    assert torch.equal(whole.initial_S, resumed.initial_S)
    assert torch.equal(whole.trajectory.tail(1.0), resumed.trajectory.tail(1.0))
    assert (resumed.steps, resumed.squares[0]) == (whole.steps, whole.squares[0])


def test_the_trajectory_of_many_sources_is_short_and_earlier_ones_are_read() -> None:
    assert [Mixture([1.0] * n, "eg").trajectory.capacity for n in (3, 512, 1000, 10**5)] == [
        512, 512, 262, 32,
    ]  # fmt: skip
    mixture = Mixture([1.0] * 1000, "eg")
    mixture.trajectory = TrajectoryBlocks(1000)
    for g_S in noise(5, 1000):
        mixture.step(g_S, 0.1)
    again = Mixture([1.0] * 1000, "eg")
    again.load_state_dict(mixture.state_dict())
    assert torch.equal(again.trajectory.tail(1.0), mixture.trajectory.tail(1.0))


def test_states_of_earlier_versions_are_read() -> None:
    def made() -> Mixture:
        return Mixture([1.0, 1.0, 2.0], "eg", levels=Levels([[0, 0, 1]]))

    mixture, other = made(), made()
    for g_S in noise(12, 3):
        mixture.step(g_S, lr=0.1)
    state = mixture.state_dict()
    square, *of_levels = state["squares"]
    for later in ("squares", "lasting", "recent", "is_slow", "lookalikes"):
        del state[later]
    other.load_state_dict({**state, "mean_square": square})
    assert other.squares == other.lasting == [square, 0.0, 0.0]
    assert not other.recent_S.any() and other.is_slow is False
    other.load_state_dict({**state, "mean_square": square, "level_squares": of_levels})
    assert other.squares == mixture.squares
    assert other.lookalike_groups(other.trajectory.tail()) == []


def test_a_state_is_no_part_of_who_gave_or_took_it() -> None:
    mixture, other = Mixture([1.0, 1.0], "eg"), Mixture([1.0, 1.0], "eg")
    for g_S in noise(3, 2):
        mixture.step(g_S, lr=0.1)
    state = mixture.state_dict()
    recent_S = state["recent"].clone()
    other.load_state_dict(state)
    for each in (mixture, other):
        each.step(torch.tensor([5.0, -5.0], dtype=torch.float64), lr=0.1)
        assert torch.equal(state["recent"], recent_S)


def test_the_trajectory_of_many_sources_is_taken_as_it_is() -> None:
    mixture, other = Mixture([1.0] * 3000, "eg"), Mixture([1.0] * 3000, "eg")
    mixture.step(noise(1, 3000)[0], lr=0.1)
    other.load_state_dict(mixture.state_dict())
    assert other.trajectory.capacity == mixture.trajectory.capacity < 512
    assert torch.equal(other.trajectory.tail(), mixture.trajectory.tail())
