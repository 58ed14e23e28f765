"""The mixture p = softmax(λ): its state, its two ways to step, and the weights it reports.

`eg`, exponentiated gradient (mirror descent on the simplex, Kivinen & Warmuth 1997), moves the
logits by the hypergradient in units of its own usual size:

    v ← β v + (1 − β) Σ_i p_i g_i²        (g less its mean under p)
    λ_i −= lr · g_i / √(v / (1 − βᵗ))             (at most 15 lr, either way)

A step moves p a Fisher distance of about lr, whatever α, the loss or the models' learning rate. v
is one number for all sources: unlike Adam's, it does not blow the vanishing gradient of a small
source up to full-size moves, and noise around the answer stays noise.

Once u remembers longer (`BilevelOptions.memory_growth`), g sees further, and sees λ's own moves
later. Then λ goes slower the longer the memory m (in resets), in units of what lasts of g, and from
the average of the second half of the way so far:

    λ_i −= lr · 0.5 / (m + 9) · g_i / √(ṽ / (1 − βᵗ))
    ṽ ← β ṽ + (1 − β) Σ_i p_i g_i ḡ_i     ḡ: mean of about the 10 g before; v / min(m, 25) ≤ ṽ ≤ v

Where sources hold different contexts, 98 % of v is which of them a batch happens to hold, new in
each step: in units of √v λ would hardly move.

`adamw` reproduces the published setting, AdamW on λ with gradient Jᵀ g. It does blow it up, so the
schedule and not convergence decides where it ends.
"""

import math
from typing import Any

import torch

from megatron_scalebio.mixture.confidence import TrajectoryBlocks
from megatron_scalebio.mixture.constraints import Constraints
from megatron_scalebio.mixture.levels import Levels
from megatron_scalebio.mixture.lookalikes import Lookalikes
from megatron_scalebio.mixture.objective import logits_gradient, mixture_probs

# A source never falls below this share of a uniform weight: it can still come back.
LEAST_SHARE = 1e-4
SIZE_DECAY = 0.99  # β: the hypergradient's size is known from about its last 100 steps
LARGEST_STEP = 6.0  # in units of that size; noise almost never gets there
# Of one source, in the same units. Where a batch has fewer places than there are sources, each that
# is in it stands for 1 / inclusion of its like: uncut, one example of a heavy tail makes its source
# the mixture, and no other comes back.
LARGEST_OF_ONE = 15.0
SIZE_WARMUP = 30  # steps before anything is cut
# Once u's memory is m resets long, above 1: λ's rate is DAMPED / (m + DELAYED) of what it was.
DAMPED, DELAYED = 0.5, 9.0
RECENT = 10  # steps; what of g is still there after about so many lasts
MOST_PASSING = 25.0  # times what lasts: a smaller share of g's square is not measured well
BLOCKS_OF_ALL = 2**18  # of the trajectory, of all sources together


class Mixture:
    """The weights of S sources while they are learned. Same on every rank, float64 on the CPU.

    Args:
        initial_S: starting weights, normalised here.
        optimizer: "eg" or "adamw".
        constraints: what the weights have to keep to; None: nothing.
        levels: groups of the sources, each level of which eg steps by itself; None: there are none.
    """

    def __init__(
        self,
        initial_S: list[float],
        optimizer: str,
        constraints: Constraints | None = None,
        levels: Levels | None = None,
    ) -> None:
        weights_S = torch.tensor(initial_S, dtype=torch.float64)
        self.constraints, self.levels = constraints, levels
        self.squares = [0.0] * (1 + (len(levels) if levels else 0))  # v, and of each level
        self.lasting = list(self.squares)  # ṽ
        self.initial_S = weights_S / weights_S.sum()
        if constraints is not None:
            least = LEAST_SHARE / len(initial_S)
            self.initial_S = constraints.project(self.initial_S.clamp_min(least))
        self.logits_S = self.initial_S.log()
        # 512 blocks, or with many sources fewer: a kilobyte of each would be the run's memory.
        capacity = max(32, min(512, BLOCKS_OF_ALL // len(initial_S) // 2 * 2))
        self.trajectory = TrajectoryBlocks(len(initial_S), capacity)
        self.lookalikes = Lookalikes(len(initial_S))
        self.steps = 0
        self.recent_S = torch.zeros_like(self.initial_S)  # ḡ
        self.is_slow = False
        self._adamw = None
        if optimizer == "adamw":
            self.logits_S.requires_grad_()
            self._adamw = torch.optim.AdamW([self.logits_S], weight_decay=0.0)

    @property
    def probs_S(self) -> torch.Tensor:
        return mixture_probs(self.logits_S.detach())

    def step(self, hypergradient_S: torch.Tensor, lr: float, memory: float = 1.0) -> float:
        """Moves λ by one hypergradient and returns the norm of Jᵀ g.

        Args:
            memory: as of `Training`; where it is above 1, g tells more of what λ leads to, and
                later: eg goes slower, in units of what lasts of it.
        """
        self.lookalikes.append(hypergradient_S)
        kept = self.constraints
        if kept is not None:
            if self._adamw is not None:
                hypergradient_S = hypergradient_S + kept.pull_gradient(self.probs_S)
            hypergradient_S = kept.tie(hypergradient_S, self.probs_S)
        gradient_S = logits_gradient(hypergradient_S, self.probs_S)
        with torch.no_grad():
            self.steps += 1
            if self._adamw is None:
                step_S, size = self._eg_step(hypergradient_S, lr, memory)
                if memory > 1.0 and not self.is_slow:
                    # The fast steps leave λ somewhere around the answer, and slow ones would take
                    # long from there.
                    self.is_slow = True
                    if self.trajectory.num_blocks:
                        self.logits_S.copy_(self.trajectory.tail().mean(0).log())
                if kept is not None:
                    # Sources that move as one may be of several groups.
                    step_S = kept.tie(step_S, self.probs_S)
                    self.logits_S.copy_(kept.pull(self.logits_S - step_S, size))
                else:
                    self.logits_S -= step_S
                least = LEAST_SHARE / len(self.logits_S)
                self.logits_S.copy_(self.probs_S.clamp_min(least).log())
            else:
                self.logits_S.grad = gradient_S
                self._adamw.param_groups[0]["lr"] = lr
                self._adamw.step()
            if kept is not None:
                self.logits_S.copy_(kept.project(self.probs_S).log())
        self.trajectory.append(self.probs_S)
        return float(gradient_S.norm())

    def lookalike_groups(self, tail_BS: torch.Tensor) -> list[list[int]]:
        """Sources of which only the sum is known, in the mixtures that the weights average."""
        return self.lookalikes.groups(tail_BS.mean(0) / self.initial_S)

    def _eg_step(
        self, hypergradient_S: torch.Tensor, lr: float, memory: float
    ) -> tuple[torch.Tensor, float]:
        """The step of λ; its size, by which g was multiplied."""
        cut_S, probs_S = self._cut(hypergradient_S), self.probs_S
        share = 1.0
        if memory > 1.0:
            lr, share = lr * DAMPED / (memory + DELAYED), 1.0 / min(memory, MOST_PASSING)
        steps, sizes = [], []
        for number, (part_S, before_S) in enumerate(
            zip(self._parts(cut_S), self._parts(self.recent_S), strict=True)
        ):
            for held, other_S in ((self.squares, part_S), (self.lasting, before_S)):
                product = float((probs_S * part_S * other_S).sum())
                held[number] = SIZE_DECAY * held[number] + (1 - SIZE_DECAY) * product
            square = self.squares[number]
            # Zero while u is still equal to w: then the hypergradient is zero too.
            usual = math.sqrt(square / (1 - SIZE_DECAY**self.steps)) or 1.0
            lasts = min(max(self.lasting[number] / square, share), 1.0) if square else 1.0
            sizes.append(lr / (usual * math.sqrt(lasts)))
            steps.append(sizes[-1] * part_S.clamp(-LARGEST_OF_ONE * usual, LARGEST_OF_ONE * usual))
        self.recent_S += (cut_S - self.recent_S) / min(RECENT, self.steps)
        return torch.stack(steps[1:] or steps).sum(0), sizes[0]

    def _parts(self, values_S: torch.Tensor) -> list[torch.Tensor]:
        """Values of the sources, then what each level has of them."""
        of_levels = self.levels.parts(values_S, self.probs_S) if self.levels else []
        return [values_S, *of_levels]

    def _cut(self, hypergradient_S: torch.Tensor) -> torch.Tensor:
        """g, cut to LARGEST_STEP times √v, with v the running mean of Σ_i p_i g_i² (cut alike).

        Uncut, one spike of the models' gradients would throw the mixture, and then hold it still
        for as long as v remembers it, which would look like convergence.
        """
        square = float((self.probs_S * hypergradient_S.square()).sum())
        usual = self.squares[0] / (1 - SIZE_DECAY ** (self.steps - 1)) if self.steps > 1 else 0.0
        if self.steps > SIZE_WARMUP and square > LARGEST_STEP**2 * usual > 0:
            return hypergradient_S * (LARGEST_STEP * math.sqrt(usual / square))
        return hypergradient_S

    def state_dict(self) -> dict[str, Any]:
        return {
            "logits": self.logits_S.detach().clone(),
            "initial": self.initial_S,
            "steps": self.steps,
            "squares": list(self.squares),
            "lasting": list(self.lasting),
            "recent": self.recent_S.clone(),
            "is_slow": self.is_slow,
            "trajectory": self.trajectory.state_dict(),
            "lookalikes": self.lookalikes.state_dict(),
            "adamw": self._adamw.state_dict()["state"] if self._adamw else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.logits_S.copy_(state["logits"])
        self.initial_S = state["initial"]
        self.steps = state["steps"]
        # Checkpoints of earlier versions have no `lasting`, and of levels perhaps nothing.
        squares = [state.get("mean_square", 0.0), *state.get("level_squares", self.squares[1:])]
        self.squares = list(state.get("squares", squares))
        self.lasting = list(state.get("lasting", self.squares))
        recent_S = state.get("recent")
        self.recent_S = torch.zeros_like(self.initial_S) if recent_S is None else recent_S.clone()
        self.is_slow = state.get("is_slow", False)
        blocks = len(state["trajectory"]["block_sums"])  # earlier versions had others
        self.trajectory = TrajectoryBlocks(len(self.initial_S), blocks)
        self.trajectory.load_state_dict(state["trajectory"])
        if "lookalikes" in state:  # checkpoints of earlier versions have none
            self.lookalikes.load_state_dict(state["lookalikes"])
        if self._adamw and state["adamw"]:
            groups = self._adamw.state_dict()["param_groups"]
            self._adamw.load_state_dict({"state": state["adamw"], "param_groups": groups})
        self._begin_within_bounds()

    def _begin_within_bounds(self) -> None:
        """After a resume: weights outside of bounds that are new go to the nearest within them.

        The trajectory begins anew then, as its average would be outside of them as well.
        """
        kept, path = self.constraints, self.trajectory
        if kept is None or all(map(kept.holds, [self.probs_S, *path.whole()])):
            return
        with torch.no_grad():
            self.logits_S.copy_(kept.project(self.probs_S).log())
        self.trajectory = TrajectoryBlocks(len(self.initial_S), path.capacity)
        self.trajectory.append(self.probs_S)
