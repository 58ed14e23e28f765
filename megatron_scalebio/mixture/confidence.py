"""How sure the learned weights are: the mixture's trajectory, confidence intervals, convergence.

The reported weights are a Polyak-Ruppert average, p̄ = mean of p_t over the last half of the
steps (``TAIL_FRACTION``), with the mixture's learning rate held constant. Noise in the
hypergradient shows as the wandering of p_t, which is correlated over many steps. Random scaling
turns that wandering into an interval without choosing a batch length or inverting a Hessian
(Lee, Liao, Seo, Shin, "Fast and robust online inference with stochastic gradient descent via
random scaling", AAAI 2022, arXiv:2106.03156):

    V_i = (1/n²) Σ_{r=1..n} ( Σ_{k≤r} (p_{k,i} − p̄_i) )²         i: source, k: block of the tail
    interval_i = p̄_i ± c · sqrt(V_i / n)                           c = 6.747 for 95 %

(p̄_i − E p_i) / sqrt(V_i / n) tends to B(1) / sqrt(∫ (B(r) − r B(1))² dr), B Brownian motion,
whose quantiles c were tabulated by Abadir and Paruolo (Econometrica 65, 1997, table II). The
ratio is the same for steps and for blocks of steps, so the trajectory is kept as block means.

Symbols: p_k → ``blocks_BS`` (B blocks, S sources), p̄ → ``weight_S``, V_i / n → ``variance_S``.

To it are added, as independent errors, what the weights have still to go, seen from how far they
went within the tail (``drift_left``); the draw of the validation set: had each of its n examples
come from one of the sources, its own mixture would be off by sqrt(p (1 − p) / n), and others are
known no better (``draw_SS``, where measured); and RESOLUTION, what a finite α and a finite memory
leave where weights stand still. Of near-duplicates (``lookalikes``) only the sum is known, so their
intervals reach from 0 to it.

Not in it: more than that of either (under LISA u's memory is as short as a period; sources that
hold different contexts need a long one), and a final training much shorter than the search. If the
mixture's rate decayed to zero it says nothing. Measured in docs/experiments.md, "Right where
validation is not made of the sources".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

TAIL_FRACTION = 0.5  # share of the steps, from the end, that the reported weights average over
MIN_TAIL_STEPS = 200  # a shorter tail cannot show convergence
# Of an error b / t, t from T/2 to T: its mean, in units of what it loses from half to half of that.
LEFT_OF_DRIFT = 2 * math.log(2) / (4 * math.log(9 / 8))
MANY_SOURCES = 20  # with more, the tolerance is that share of an equal weight
RESOLUTION = 0.01  # a weight nearer than this to 0, 1 or another value can't be told from it

# Two-sided confidence → critical value of the random-scaling ratio (Abadir and Paruolo 1997).
CRITICAL_VALUES = {0.80: 3.875, 0.90: 5.323, 0.95: 6.747, 0.98: 8.613}


class TrajectoryBlocks:
    """The trajectory of the mixture as at most ``capacity`` block means of equal length.

    Every step enters one block. When ``capacity`` blocks are complete, neighbours are merged and
    the block length doubles, so memory is bounded and the past is never thrown away:

        length 1: [p1][p2][p3][p4]  →  length 2: [p1 p2][p3 p4][p5 ·

    Sums are kept in float64 and divided when read, hence a merged mean is that of its steps up to
    the rounding of a float64 sum.

    Args:
        num_sources: S.
        capacity: largest number of complete blocks, even.
    """

    def __init__(self, num_sources: int, capacity: int = 512) -> None:
        if num_sources < 1 or capacity < 2 or capacity % 2:
            raise ValueError(
                f"need num_sources >= 1 and an even capacity, not {num_sources} and {capacity}"
            )
        self.capacity = capacity
        self.block_length = 1  # in steps
        self.num_blocks = 0  # complete ones
        self._sums_BS = torch.zeros(capacity, num_sources, dtype=torch.float64)
        self._open_sum_S = torch.zeros(num_sources, dtype=torch.float64)
        self._open_steps = 0

    @property
    def steps(self) -> int:
        """Steps appended so far, the open block's included."""
        return self.num_blocks * self.block_length + self._open_steps

    def append(self, probs_S: Tensor) -> None:
        """Adds the mixture of one step, shape ``[S]``, of any float type or device."""
        assert probs_S.shape == self._open_sum_S.shape, (probs_S.shape, self._open_sum_S.shape)
        self._open_sum_S += probs_S.detach().to("cpu", torch.float64)
        self._open_steps += 1
        if self._open_steps < self.block_length:
            return
        self._sums_BS[self.num_blocks] = self._open_sum_S
        self.num_blocks += 1
        self._open_sum_S.zero_()
        self._open_steps = 0
        if self.num_blocks == self.capacity:
            self._merge_neighbours()

    def _merge_neighbours(self) -> None:
        half = self.capacity // 2
        merged_BS = self._sums_BS[0::2] + self._sums_BS[1::2]
        self._sums_BS.zero_()
        self._sums_BS[:half] = merged_BS
        self.num_blocks = half
        self.block_length *= 2

    def tail(self, fraction: float = TAIL_FRACTION) -> Tensor:
        """Means of the complete blocks which lie wholly in the last ``fraction`` of the steps.

        The open block (under 1 % of the steps) is left out, so that all blocks weigh alike.
        Returns a float64 copy of shape ``[B, S]``, oldest first; B = 0 before the first step and
        B >= 1 after it.
        """
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"fraction must lie in (0, 1], not {fraction}")
        complete_steps = self.num_blocks * self.block_length
        count = max(1, math.floor(fraction * complete_steps / self.block_length + 1e-9))
        first = max(0, self.num_blocks - count)
        return self._sums_BS[first : self.num_blocks] / self.block_length

    def whole(self) -> Tensor:
        """Means of all blocks, the open one's too, [B, S]."""
        blocks_BS = self._sums_BS[: self.num_blocks] / self.block_length
        open_1S = self._open_sum_S[None] / max(1, self._open_steps)
        return torch.cat([blocks_BS, open_1S]) if self._open_steps else blocks_BS

    def state_dict(self) -> dict[str, Any]:
        """Tensors (shapes depend only on ``num_sources`` and ``capacity``) and integers."""
        return {
            "block_sums": self._sums_BS.clone(),
            "open_sum": self._open_sum_S.clone(),
            "num_blocks": self.num_blocks,
            "block_length": self.block_length,
            "open_steps": self._open_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores ``state_dict`` exactly. ValueError if it is of another number of sources."""
        if state["block_sums"].shape != self._sums_BS.shape:
            raise ValueError(
                f"trajectory of shape {tuple(state['block_sums'].shape)} cannot be loaded into one "
                f"of shape {tuple(self._sums_BS.shape)} (blocks, sources)"
            )
        self._sums_BS.copy_(state["block_sums"])
        self._open_sum_S.copy_(state["open_sum"])
        self.num_blocks = int(state["num_blocks"])
        self.block_length = int(state["block_length"])
        self._open_steps = int(state["open_steps"])


@dataclass(frozen=True)
class WeightIntervals:
    """Weights with confidence intervals; float64 tensors of shape ``[S]``, in shares of 1."""

    weight_S: Tensor  # tail average, sums to 1
    low_S: Tensor  # clipped to [0, 1]
    high_S: Tensor  # clipped to [0, 1]
    half_width_S: Tensor  # before clipping: root of the squares of RESOLUTION and the next three
    wandering_S: Tensor  # noise of the steps
    drift_S: Tensor  # of what the weights have still to go
    sampling_S: Tensor  # of the validation set's own draw
    confidence: float
    lookalikes: list[list[int]]  # sources of which only the sum is known, and within its interval


def random_scaling_half_width(blocks_BS: Tensor, confidence: float = 0.95) -> Tensor:
    """Half-widths c · sqrt(V_i / n) of the module's formula, ``[B, S]`` → ``[S]``, float64.

    One block says nothing about its own error: infinite. ValueError for a confidence without a
    tabulated critical value.
    """
    if confidence not in CRITICAL_VALUES:
        raise ValueError(f"confidence must be one of {sorted(CRITICAL_VALUES)}, not {confidence}")
    num_blocks, num_sources = blocks_BS.shape
    if num_blocks < 2:
        return torch.full((num_sources,), math.inf, dtype=torch.float64)
    deviation_BS = blocks_BS.double() - blocks_BS.double().mean(0)
    variance_S = deviation_BS.cumsum(0).square().sum(0) / num_blocks**3
    return CRITICAL_VALUES[confidence] * variance_S.sqrt()


def drift_left(blocks_BS: Tensor) -> Tensor:
    """What the average may be off by because the weights still travel, ``[B, S]`` → ``[S]``.

    Seen from how far they went from the first half of the tail to the second, if what is left falls
    like 1 / t (LEFT_OF_DRIFT). Noise shows in it too.
    """
    half = len(blocks_BS) // 2
    if half == 0:
        return torch.zeros(blocks_BS.shape[1], dtype=torch.float64)
    halves = blocks_BS.double().tensor_split([half])
    return LEFT_OF_DRIFT * (halves[1].mean(0) - halves[0].mean(0)).abs()


def weight_intervals(
    blocks_BS: Tensor,
    confidence: float = 0.95,
    validation_examples: float | None = None,
    lookalikes: Sequence[list[int]] = (),
    draw_SS: Tensor | None = None,
) -> WeightIntervals:
    """Confidence intervals of the tail-averaged weights.

    Args:
        blocks_BS: tail of the trajectory, shape ``[B, S]``, B >= 1.
        confidence: two-sided, per source (not simultaneous); a key of ``CRITICAL_VALUES``.
        validation_examples: in the validation set; None: its own draw is left out.
        lookalikes: sources that can't be told from each other (`Lookalikes.groups`): each one's
            weight may be all of their sum, or nothing.
        draw_SS: covariance of the best weights over draws of the validation set, where measured.

    A weight whose truth is 0 is approached from above and never reached, so the lower end of an
    estimate below ``RESOLUTION`` is 0; and the upper end of one as near to 1 is 1.
    """
    weight_S = blocks_BS.double().mean(0).clamp_max(1.0)  # sums may be above it, by rounding
    wandering_S = random_scaling_half_width(blocks_BS, confidence)
    drift_S = drift_left(blocks_BS)
    drawn_S = (weight_S * (1 - weight_S)).clamp_min(0) / (validation_examples or math.inf)
    if draw_SS is not None:
        drawn_S = drawn_S.maximum(draw_SS.diagonal())
    sampling_S = _normal(confidence) * drawn_S.sqrt()
    squares_S = torch.stack([wandering_S, drift_S, sampling_S]).square().sum(0)
    resolution = RESOLUTION * min(1.0, MANY_SOURCES / len(weight_S))
    half_width_S = (squares_S + resolution**2).sqrt()
    low_S = (weight_S - half_width_S).clamp_min(0.0)
    low_S = torch.where(weight_S < RESOLUTION, torch.zeros_like(low_S), low_S)
    high_S = (weight_S + half_width_S).clamp_max(1.0)
    high_S = torch.where(weight_S > 1 - RESOLUTION, torch.ones_like(high_S), high_S)
    groups = [g for g in lookalikes if len(g) > 1 and weight_S[g].sum() >= RESOLUTION]
    for group in groups:
        sum_B1 = blocks_BS[:, group].sum(1, keepdim=True)
        low_S[group] = 0.0
        draw_11 = covariance_of_sums(draw_SS, [group])
        high_S[group] = weight_intervals(
            sum_B1, confidence, validation_examples, (), draw_11
        ).high_S
    return WeightIntervals(
        weight_S, low_S, high_S, half_width_S, wandering_S, drift_S, sampling_S, confidence, groups
    )


def covariance_of_sums(of_SS: Tensor | None, groups: Sequence[Sequence[int]]) -> Tensor | None:
    """That of the sum of each group of numbers, [S, S] → [groups, groups]."""
    if of_SS is None:
        return None
    sum_GS = torch.stack([torch.eye(len(of_SS)).double()[list(g)].sum(0) for g in groups])
    return sum_GS @ of_SS @ sum_GS.T


def _normal(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


@dataclass(frozen=True)
class Verdict:
    """Whether the weights may be called converged, and why, in one plain sentence."""

    converged: bool
    reason: str


def judge_convergence(
    blocks_BS: Tensor,
    names: list[str] | None = None,
    *,
    block_length: int = 1,
    tolerance: float = 0.05,
    confidence: float = 0.95,
    constant_rate: bool = True,
    validation_examples: float | None = None,
    lookalikes: Sequence[list[int]] = (),
    unless: str = "",
    draw_SS: Tensor | None = None,
) -> Verdict:
    """Converged only if the tail is long enough and every interval is within the tolerance.

    The rule may be evaluated after every step to stop early; as with any repeated look, the chance
    of one false "converged" is then larger than that of a single look at the end.

    Args:
        blocks_BS: tail of the trajectory, shape ``[B, S]``.
        names: of the sources, for the reason.
        block_length: steps in a block (``TrajectoryBlocks.block_length``).
        tolerance: largest acceptable half-width, a share of 1; with more than ``MANY_SOURCES`` it
            shrinks as an equal weight does.
        confidence, validation_examples, draw_SS: of the intervals.
        lookalikes: sources of which the sum alone has to be known.
        constant_rate: whether the mixture's learning rate was constant over the tail; if it
            decayed, weights that no longer move prove nothing and the verdict is never "converged".
        unless: why weights that no longer move may be wrong all the same; "": nothing says so.
    """
    num_blocks, num_sources = blocks_BS.shape
    names = names or [f"source {i}" for i in range(num_sources)]
    if not constant_rate:
        return Verdict(
            False,
            "the mixture's learning rate decays over the averaged steps, so weights that no longer "
            "move prove nothing",
        )
    tail_steps = num_blocks * block_length
    if tail_steps < MIN_TAIL_STEPS:
        few = "1 step is" if tail_steps == 1 else f"{tail_steps} steps are"
        return Verdict(False, f"only {few} averaged, at least {MIN_TAIL_STEPS} are needed")
    found = weight_intervals(blocks_BS, confidence, validation_examples, lookalikes, draw_SS)
    if num_sources > 1 and not found.wandering_S.any():
        return Verdict(False, "no weight has moved over the averaged steps")
    groups, alike = found.lookalikes, ""
    if groups:  # judged by their sums, each as one source
        alike = "".join(
            f"; only the sum of {', '.join(names[i] for i in group)} is known, which look alike"
            for group in groups
        )
        members = [[i] for i in range(num_sources) if not any(i in g for g in groups)] + groups
        names = [" + ".join(names[i] for i in group) for group in members]
        blocks_BS = torch.stack([blocks_BS[:, group].sum(1) for group in members], 1)
        draw_SS = covariance_of_sums(draw_SS, members)
        found = weight_intervals(blocks_BS, confidence, validation_examples, (), draw_SS)
    tolerance *= min(1.0, MANY_SOURCES / num_sources)
    widest = int(found.half_width_S.argmax())
    half_width = float(found.half_width_S[widest])
    if half_width > tolerance:
        why = _why(found, widest, tolerance, validation_examples)
        return Verdict(
            False,
            f"the weight of {names[widest]} is known to ±{half_width:.3f} only, "
            f"the tolerance is ±{tolerance:g}: {why}{alike}",
        )
    if unless:
        return Verdict(False, unless)
    return Verdict(
        True,
        f"every weight is known to ±{half_width:.3f} or better "
        f"({confidence:.0%} confidence, tolerance ±{tolerance:g}), drift included{alike}",
    )


def _why(
    found: WeightIntervals, source: int, tolerance: float, validation_examples: float | None
) -> str:
    """What makes an interval as wide as it is, for the most part."""
    wandering, drift, sampling = (
        float(part[source]) for part in (found.wandering_S, found.drift_S, found.sampling_S)
    )
    if RESOLUTION * min(1.0, MANY_SOURCES / len(found.weight_S)) >= tolerance:
        return "no number of steps tells weights apart so finely (set a larger tolerance)"
    if sampling > max(wandering, drift):
        enough = 2 * (validation_examples or math.nan) * (sampling / tolerance) ** 2
        return f"the validation set is too small to tell; {enough:,.0f} examples would be enough"
    if drift > wandering:
        return (
            f"it is still drifting, by {drift / LEFT_OF_DRIFT:.3f} between the halves of the "
            "averaged steps"
        )
    return "it wanders from step to step, more steps or larger batches would narrow it"
