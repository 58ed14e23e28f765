"""A check after the last step: how far could, and should, the weights move?

Each source i in use stands in for the validation set for some steps, from u = w on, while the
mixture keeps the weights found. w then leans to source i and u does not, and what another example x
has of more of source i, in place of the mixture, is read from both:

    k_i(x) = ℓ_x(u) − ℓ_x(w)         K_ij: its mean over examples of source j
    F_i = mean of k_i over the validation set − Σ_j p_j K_ij

Where the weights are right, F is equal for all sources in use; p moves F by −K, and so

    p̂ − p ≈ Z F                      Z: upper left of the inverse of [[K, 1], [1ᵀ, 0]]
    cov(p̂) ≈ Z cov(F) Zᵀ             over draws of examples

which is the sandwich of an estimating equation (Huber 1967; White, Econometrica 50, 1982). It asks
nothing of the directions in which w leans, so that few steps and noisy ones do. Flat directions are
felt little in few steps: a check that sees no change is no proof, and where u remembered more steps
than the check has, one that sees a change is none either. Two sources to which w leans alike,

    D_ij = K_ii + K_jj − K_ij − K_ji         far below that of the median pair,

can't be told from each other; nor can two that seem so, D being noisy, if another validation set of
the same size might split their weights in any way, their sum being known. Measured in
docs/experiments.md.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.core.collectives import summed
from megatron_scalebio.core.scalebio import ScaleBiO
from megatron_scalebio.core.spikes import SpikeGuard
from megatron_scalebio.data.batch import micro_batches
from megatron_scalebio.data.sources import Source
from megatron_scalebio.engine.evaluate import example_losses_of
from megatron_scalebio.engine.state import RunState
from megatron_scalebio.methods.interactions import steps_between_resets
from megatron_scalebio.mixture.confidence import RESOLUTION
from megatron_scalebio.mixture.goals import Goals
from megatron_scalebio.mixture.lookalikes import ALIKE, joined
from megatron_scalebio.mixture.lookalikes import SURE as SURELY_ALIKE
from megatron_scalebio.mixture.mixture import Mixture
from megatron_scalebio.mixture.sampler import BlendSampler, Ints

COST = 0.05  # of the run's steps, at most
STEPS_WITH_LOSSES = 2.0  # a step of the check costs with its losses: 1.7 to 2.0 were measured
FEWEST_STEPS = 4  # for each source
ALPHA = 1.0  # w leans to a source with half its gradient
# In bf16, whose own steps are up to 0.8 % of a weight, by this share of a usual weight or more:
# a tenth of that is lost in rounding (docs/experiments.md).
LEAN_IN_BF16 = 0.02
SURE = 3.0  # standard errors, of the change that one of several sources has most
# Of the standard error of a split: all of a sum is within as many, or at least this share of 1;
# that of the sum is at most this part of that of the difference.
ANY_SPLIT, WIDE_SPLIT, KNOWN_SUM = 2.0, 0.25, 1 / 3
MOST_SOURCES = 256  # of a run: the covariance is S × S


@dataclass(frozen=True)
class EndCheck:
    """Of the weights of S sources, in shares of 1; float64.

    Attributes:
        draw_SS: covariance of the best weights over draws of the validation set.
        change_S: from the weights found to those of least validation loss, as seen from there.
        error_S: standard error of that.
        lookalikes: numbers of sources in use that can't be told from each other, each group
            ascending.
    """

    draw_SS: torch.Tensor
    change_S: torch.Tensor
    error_S: torch.Tensor
    lookalikes: list[list[int]]

    def told(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """For weights.json, by source."""
        of_names = {
            "change": self.change_S,
            "standard_error": self.error_S,
            "draw": self.draw_SS.diagonal().clamp_min(0).sqrt(),
        }
        return {key: dict(zip(names, x.tolist(), strict=True)) for key, x in of_names.items()}

    def objection(self, names: Sequence[str], tolerance: float) -> str:
        """What speaks against weights that stand still, "" if nothing does."""
        sure_S = self.change_S.abs() - SURE * self.error_S
        most = int(sure_S.argmax())
        if sure_S[most] <= 0 or self.change_S[most].abs() <= tolerance:
            return ""
        return (
            "a check after the last step sees the validation loss fall if the weight of "
            f"{names[most]} changes by {self.change_S[most]:+.3f} ± {self.error_S[most]:.3f} "
            "(train longer)"
        )


def check_steps(config: Config, sources_in_use: int) -> int:
    """Steps for each source, 0 where the check would cost too much or can tell nothing."""
    window = steps_between_resets(config)
    if not config.bilevel.final_check or config.parallel.low_precision:
        return 0
    if window is None or sources_in_use < 2:
        return 0
    share = COST / STEPS_WITH_LOSSES * config.train.train_iters
    steps = min(window, int(share / sources_in_use))
    return steps if steps >= FEWEST_STEPS else 0


def end_check(
    state: RunState,
    bio: ScaleBiO,
    weight_S: torch.Tensor,
    share_V: Sequence[float],
    say: Callable[[str], None] = lambda line: None,
    signalled: Callable[[], int] = lambda: 0,
) -> EndCheck | None:
    """Checks the weights of a run that has made its last step; w and u move on. A collective.

    Args:
        state: whose models `bio` trains.
        weight_S: the weights found.
        share_V: weight of each validation set in the goal.
        say: is told what takes so long.
        signalled: whether to give up.

    Returns:
        None where it is switched off or would cost too much, in FP8 and FP4 (the difference would
        be rounding), where bounds or a prior hold the weights, where a source has one example,
        where a step is not finite, and after a signal.
    """
    config, data = state.config, state.data
    in_use = [i for i, weight in enumerate(weight_S.tolist()) if weight >= RESOLUTION]
    used = runtime.on_main(lambda: in_use)
    steps = check_steps(config, len(used))
    looked_at = [*data.validation, *(data.sources[i] for i in used)]
    if not steps or bio.mixture.constraints is not None or len(weight_S) > MOST_SOURCES:
        return None
    sizes = [*map(len, data.validation), *(int(data.sampler.sizes_S[i]) for i in used)]
    if min(sizes) < 2:
        return None
    say(f"check of the weights: {steps} steps for each of {len(used)} sources in use")
    examples = steps * config.train.global_batch_size
    draw = np.random.default_rng((config.train.seed, 5))
    shares = [len(data.validation)] * len(data.validation) + [len(used)] * len(used)
    index = [
        draw.permutation(size)[: max(examples // share, 2)]
        for size, share in zip(sizes, shares, strict=True)
    ]
    for place, i in enumerate(used, len(data.validation)):
        index[place] = data.rows(np.full(len(index[place]), i), index[place])
    gains = []
    with _set_aside(bio, weight_S):
        for i in used:
            if not _lean(state, bio, i, steps) or any(runtime.any_rank(signalled())):
                return None
            gains.append([_gains(state, bio, *each) for each in zip(looked_at, index, strict=True)])
    sizes_V = [len(each) for each in data.validation]
    each = [torch.stack(rows) for rows in zip(*gains, strict=True)]  # [A, examples] of each
    sets = len(data.validation)
    return solved(each[:sets], share_V, sizes_V, each[sets:], weight_S, used)


def solved(
    validation: Sequence[torch.Tensor],
    share_V: Sequence[float],
    sizes_V: Sequence[int],
    sources: Sequence[torch.Tensor],
    weight_S: torch.Tensor,
    used: Sequence[int],
) -> EndCheck:
    """The module's formula.

    Args:
        validation, sources: of each validation set, and each source in use, k of some examples,
            [A, examples].
        share_V, sizes_V: weight of each validation set, and all of its examples.
        used: the A numbers of the sources in use.
    """
    S, used = len(weight_S), list(used)
    p_A = weight_S[used] / weight_S[used].sum()
    K_AA = torch.stack([k.mean(1) for k in sources], 1)
    noise_AAA = torch.stack([torch.cov(k) / k.shape[1] for k in sources])  # of K's columns
    F_A = -K_AA @ p_A
    draw_AA, error_AA = torch.zeros_like(K_AA), (p_A.square()[:, None, None] * noise_AAA).sum(0)
    for k, share, size in zip(validation, share_V, sizes_V, strict=True):
        F_A += share * k.mean(1)
        draw_AA += share**2 / size * torch.cov(k)
        error_AA += share**2 * (1 / k.shape[1] - 1 / size) * torch.cov(k)
    alike_AA, seem_AA = _lookalikes(K_AA, noise_AAA)
    Z_AA = _response(K_AA, p_A, joined(alike_AA))
    unsplit_AA = seem_AA & _any_split(Z_AA @ draw_AA @ Z_AA.T, p_A)
    groups = joined(alike_AA | unsplit_AA)
    Z_SA = torch.zeros(S, len(used), dtype=torch.float64)
    Z_SA[used] = _response(K_AA, p_A, groups)
    error_S = (Z_SA @ error_AA @ Z_SA.T).diagonal().clamp_min(0).sqrt()
    named = [[used[i] for i in group] for group in groups]
    return EndCheck(Z_SA @ draw_AA @ Z_SA.T, Z_SA @ F_A, error_S, named)


def _response(K_AA: torch.Tensor, p_A: torch.Tensor, alike: list[list[int]]) -> torch.Tensor:
    """Z. Sources that are alike make K singular: they count as one, in which each has its share."""
    ones = [[i] for i in range(len(p_A)) if not any(i in group for group in alike)] + alike
    share_AG = torch.zeros(len(p_A), len(ones), dtype=torch.float64)
    for g, group in enumerate(ones):
        share_AG[group, g] = p_A[group] / p_A[group].sum()
    G, border_G1 = len(ones), torch.ones(len(ones), 1, dtype=torch.float64)
    bordered = torch.cat([share_AG.T @ K_AA @ share_AG, border_G1], 1)
    bordered = torch.cat([bordered, torch.cat([border_G1.T, torch.zeros(1, 1)], 1)])
    return share_AG @ torch.linalg.pinv(bordered)[:G, :G] @ share_AG.T


def _any_split(draw_AA: torch.Tensor, p_A: torch.Tensor) -> torch.Tensor:
    """Pairs of which another validation set might give either all, their sum being known."""
    own_AA = draw_AA.diagonal()[:, None] + draw_AA.diagonal()
    difference_AA, sum_AA = (
        (own_AA + sign * 2 * draw_AA).clamp_min(0).sqrt() for sign in (-1.0, 1.0)
    )
    whole_AA = (p_A[:, None] + p_A).clamp_min(WIDE_SPLIT)
    return (ANY_SPLIT * difference_AA / 2 > whole_AA) & (sum_AA < KNOWN_SUM * difference_AA)


def _lookalikes(K_AA: torch.Tensor, noise_AAA: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of the A sources in use whose D is small beside the median pair's: surely, seemingly.

    Args:
        noise_AAA: covariance of each column of K, [column, A, A].
    """
    D_AA = K_AA.diagonal()[:, None] + K_AA.diagonal() - K_AA - K_AA.T
    # Of mean k_i − k_j over examples of source i; D_ij has that over those of source j, too.
    own_AA = torch.stack(
        [each.diagonal() + each[i, i] - 2 * each[i] for i, each in enumerate(noise_AAA)]
    )
    error_AA = (own_AA + own_AA.T).clamp_min(0).sqrt()
    pairs = tuple(torch.triu_indices(len(K_AA), len(K_AA), 1))
    usual, place = D_AA[pairs].median(0)
    if usual <= SURELY_ALIKE * error_AA[pairs][place]:
        nothing_AA = torch.zeros_like(D_AA, dtype=torch.bool)
        return nothing_AA, nothing_AA  # there is no measure
    most = ALIKE * usual
    return most > D_AA + SURELY_ALIKE * error_AA, most > D_AA


@contextmanager
def _set_aside(bio: ScaleBiO, weight_S: torch.Tensor) -> Iterator[None]:
    """What the run has learned; the block's steps have a mixture, goal and guard of their own."""
    kept = bio.mixture, bio.goals, bio.spikes, bio.steps
    bio.mixture, bio.goals = Mixture(weight_S.clamp_min(1e-6).tolist(), "eg"), Goals([1.0])
    try:
        yield
    finally:
        bio.mixture, bio.goals, bio.spikes, bio.steps = kept


def _lean(state: RunState, bio: ScaleBiO, source: int, steps: int) -> bool:
    """Trains w towards a source for some steps, from u = w on. False if one was not finite."""
    config, data = state.config, state.data
    window = steps_between_resets(config)
    assert window is not None
    bio.steps = (bio.steps // window + 1) * window
    bio.spikes = SpikeGuard()  # it has not seen losses of this source
    period = bio.enter_period()
    if bio.lisa is None:
        period.resync(1.0)  # by then, the run's own resets may leave a part
    batch, seed = config.train.global_batch_size, config.train.seed + 2 + source
    sampler = BlendSampler(data.sampler.sizes_S.tolist(), batch, seed, config.bilevel.floor_share)
    stand_in = BlendSampler([int(data.sampler.sizes_S[source])], batch, seed)
    rates = state.schedule.at(config.train.train_iters // 2)
    least = _least_rate(bio, steps) if config.parallel.bf16 else 0.0
    for _ in range(steps):
        picks, lean_to = data.kept(sampler.next(bio.weights)), stand_in.next(np.ones(1))
        rows_B = data.rows(np.full(batch, source), lean_to.index_B)
        with runtime.refused_together():
            train = micro_batches(data.sources, picks, data.layout)
            lean = micro_batches(
                [data.sources[source]], replace(lean_to, index_B=rows_B), data.layout
            )
        report = bio.step(
            train, lean, max(rates.lr_w, least), lr_u=max(rates.lr_u, least), lr_lambda=0.0,
            alpha=ALPHA, inclusion=picks.inclusion_S,
        )  # fmt: skip
        state.cost.trained += report.losses.tokens
        if report.skipped is not None:
            return False
    return True


def _least_rate(bio: ScaleBiO, steps: int) -> float:
    """The learning rate at which w can lean by LEAN_IN_BF16 in so many steps. A collective."""
    trained = [p for chunk in bio.w for p in chunk.parameters() if p.requires_grad]
    square = sum(float(p.detach().float().square().sum()) for p in trained)
    square, count = summed(
        torch.tensor([square, sum(p.numel() for p in trained)]).double()
    ).tolist()
    return LEAN_IN_BF16 * math.sqrt(square / count) * (1 + ALPHA) / steps


def _gains(state: RunState, bio: ScaleBiO, source: Source, index_N: Ints) -> torch.Tensor:
    """k of examples, [N]: where losses are means over tokens, each one's part in that mean."""
    config = state.config
    assert bio.u is not None
    u, w = example_losses_of([bio.u, bio.w], source, index_N, config, state.data.layout)
    state.cost.scored += u.tokens + w.tokens
    if config.data.loss_mean == "sample":
        return u.mean_N - w.mean_N
    gain_N, targets = u.sum_N - w.sum_N, u.targets_N
    mean = gain_N.sum() / targets.sum()
    return mean + (gain_N - mean * targets) / targets.double().mean()
