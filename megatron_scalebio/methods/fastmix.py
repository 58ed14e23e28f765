"""FastMix (Tan et al., ICLR 2026, arXiv 2606.14971): the mixture by gradient descent, one proxy.

To sample sources in proportions p is, in expectation, to sample them alike and weigh their losses
by p. So p can descend the validation loss that a step of the model leads to:

    w' = w − η Σ p_i ∇ℓ_i(w),  p = softmax(z)            every source has as many examples
    ∂L1(w') / ∂z = −η J a,     J = diag(p) − p pᵀ,  a_i = ⟨∇ℓ_i(w), ∇L1(w)⟩ in the output layer

The bilevel problem, loss weights under uniform sampling and alternating steps are the paper's, as
its abstract has them. The rest is its published code's (github.com/hrtan/fastmix,
`pretrain/train_fastmix_val.py`): that gradient, of the output layer's weight alone; z uniform at
first; Adam on z, betas 0.9 and 0.95, no weight decay, rate 0.01 (`scripts/run_val.sh`); a_i = 0 of
a source that is not in the batch; the weights are the last p. Departures from the code:

- z moves at every step, by the step's whole batch. There, by one micro-batch after every 20, where
  a step has 32: little over half the cost, and more noise.
- The model descends under the p from before z's move, because on a pipeline all micro-batches are
  under way by then. There, under the one after it.
- Validation sets count by their weights. There, alike.
- η is left out. Adam's direction does not see it, but at the rates of fine-tuning Adam's eps, 1e-8,
  would hold z still. An entropy term, whose coefficient is 0 there, is left out too.
- The rate of z is `domain_lr`, else 16 / train_iters, at most 0.1: 16 is 0.01 times the 1,600 moves
  of the published configuration. With 0.01, the weights of 100 steps stay where they are.

The model's gradients are not asked. With h, what the output layer takes, and δ, the objective's
gradient in its logits, for each label, both are seen as they pass the layer in two flushes:

    validation   ∇L1 = Σ δ hᵀ            summed over data- and context-parallel ranks
    training     p_i a_i = Σ δᵀ ∇L1 h    over the labels of source i, and over all ranks

So sources share micro-batches, however many they are; tensor ranks hold parts of the vocabulary;
an embedding tied to the layer takes no part; and under LISA the layer counts where it is frozen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import unwrap_model

from megatron_scalebio.compat.gpt_inputs import labelled_positions
from megatron_scalebio.config import Config
from megatron_scalebio.core.batch import sequence_sums
from megatron_scalebio.core.collectives import summed
from megatron_scalebio.core.flush import Pass, flush, passes_of, reduce_losses
from megatron_scalebio.core.training import Training
from megatron_scalebio.engine.start import Job
from megatron_scalebio.engine.state import Record
from megatron_scalebio.engine.update import step_w
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.weighting import WeightingState, learn, require_whole_flush
from megatron_scalebio.mixture.objective import Role, logits_gradient, mixed

BETAS, EPS = (0.9, 0.95), 1e-8
PUBLISHED_REACH = 16.0  # rate of z times its moves: 0.01 · 1,001 steps of 32 / 20
LARGEST_RATE = 0.1


def find(config: Config, job: Job) -> Found | None:
    """The last weights of a whole training, or None at a signal."""
    state = FastmixState(config, job.folder / "cache")
    found = learn(state, job)
    if found is None:
        return None
    averaged = {"mean_weights": found.weight_S}
    return replace(found, weight_S=state.weight_S.tolist(), details=averaged)


class FastmixState(WeightingState):
    """The proxy, its weights, and Adam's moments of their gradient.

    Attributes:
        moments_2S: the running means of the gradient and of its square, float64.
    """

    def __init__(self, config: Config, cache: Path) -> None:
        super().__init__(config, cache)
        self.moments_2S = torch.zeros(2, len(self.data.sources), dtype=torch.float64)
        require_whole_flush(self, "global_batch_size")
        require_whole_flush(self, "validation_batch_size")

    def make_step(self) -> Record:
        return fastmix_step(self)

    def moved(self, gradient_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log p after a step of Adam on z, and the moments."""
        config, (beta1, beta2) = self.config, BETAS
        usual = min(LARGEST_RATE, PUBLISHED_REACH / config.train.train_iters)
        each_2S = torch.stack([gradient_S, gradient_S.square()])
        moments_2S = torch.lerp(each_2S, self.moments_2S, torch.tensor([[beta1], [beta2]]).double())
        mean_S = moments_2S[0] / (1 - beta1 ** (self.moves + 1))
        square_S = moments_2S[1] / (1 - beta2 ** (self.moves + 1))
        step_S = (config.baseline.domain_lr or usual) * mean_S / (square_S.sqrt() + EPS)
        return (self.log_weight_S - step_S).log_softmax(0), moments_2S

    def common_state(self) -> dict[str, Any]:
        return {**super().common_state(), "moments": self.moments_2S}

    def load_common_state(self, state: dict[str, Any]) -> None:
        super().load_common_state(state)
        self.moments_2S = state["moments"]


def fastmix_step(state: FastmixState) -> Record:
    """One step of p and of the model, both or neither; its record."""
    data, training, probs_S = state.data, state.training, state.weight_S
    train, valid, picks, valid_picks = data.next(torch.full_like(probs_S, 1 / len(probs_S)))
    inclusion_S, inclusion_V = map(torch.from_numpy, (picks.inclusion_S, valid_picks.inclusion_S))
    shares_V, loss_mean = torch.from_numpy(data.shares_V), state.config.data.loss_mean
    with state.clock("period"):
        period = training.enter_period()
        first, second = (
            passes_of({role: 1.0}, batches, weight_G, loss_mean, training.groups)
            for role, batches, weight_G in (
                (Role.VALID_W, valid, shares_V / inclusion_V),
                (Role.TRAIN_W, train, probs_S / inclusion_S),
            )
        )
    alignment = OutputAlignment(training)
    records = []
    with state.clock("flush"):
        for passes, watched in ((first, alignment.target_of), (second, alignment.sources_of)):
            period.zero_grad()
            with watched(passes):
                records += flush(period.twins, passes, training.groups, training.observe)
        part_S = alignment.by_source(len(probs_S))
    sets = (len(probs_S), len(shares_V))
    losses = reduce_losses(records, [*first, *second], *sets, training.groups)
    if not losses.culprit and not part_S.isfinite().all():
        losses = replace(losses, culprit="w: the gradient of the mixture is not finite")

    alignment_S = part_S / probs_S
    moved_S, moments_2S = state.moved(logits_gradient(-alignment_S, probs_S))
    record = step_w(state, losses, picks, probs_S, learned=[moved_S, *moments_2S])
    if not record["skipped"]:
        state.moments_2S = moments_2S
        state.move_to(moved_S)
    return {
        **record,
        "validation_loss": mixed(shares_V, losses.validation_V, inclusion_V),
        "validation_losses": losses.validation_V.tolist(),
        "weights": state.weight_S.tolist(),
        "alignment": alignment_S.tolist(),
    }


class OutputAlignment:
    """Σ_labels δᵀ ∇L1 h of each source, from two flushes of w. See the head of this file."""

    def __init__(self, training: Training) -> None:
        last: Any = unwrap_model(training.w[-1])
        self._layer = last.output_layer if last.post_process else None
        self._groups = training.groups
        self._target_VH: torch.Tensor | None = None
        self._sums: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def target_of(self, passes: Sequence[Pass]) -> Iterator[None]:
        """Takes ∇L1 from the flush within. A collective of data- and context-parallel ranks."""
        with self._watched(passes, self._add_to_target):
            yield
        if self._target_VH is not None:
            dist.all_reduce(self._target_VH, group=self._groups.dp_cp)

    @contextmanager
    def sources_of(self, passes: Sequence[Pass]) -> Iterator[None]:
        """Aligns the flush within."""
        with self._watched(passes, self._align):
            yield

    def by_source(self, num_sources: int) -> torch.Tensor:
        """[S], float64, on the CPU; 0 of a source without examples there. A collective of all."""
        total_S = torch.zeros(num_sources, dtype=torch.float64)
        for group_B, sum_B in self._sums:
            total_S.index_add_(0, group_B, sum_B.cpu())
        return summed(total_S)

    @contextmanager
    def _watched(self, passes: Sequence[Pass], see: Callable[..., None]) -> Iterator[None]:
        """Has `see` called with batch, h and δ in each backward pass through the layer."""
        if self._layer is None:
            yield
            return
        batches = iter([each.batch for each in passes])

        def watch(layer: Any, inputs: Any, output: Any) -> None:
            h_SBH = inputs[0].detach()
            if layer.sequence_parallel:
                h_SBH = gather_from_sequence_parallel_region(h_SBH, group=layer.tp_group)
            output[0].register_hook(partial(see, next(batches), h_SBH))

        # Before the hooks that change the logits: δ is of what the layer gives.
        handle = self._layer.register_forward_hook(watch, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def _add_to_target(self, batch: Any, h_SBH: torch.Tensor, delta_SBV: torch.Tensor) -> None:
        part_VH = (delta_SBV.flatten(0, 1).T @ h_SBH.flatten(0, 1)).float()
        self._target_VH = part_VH if self._target_VH is None else self._target_VH.add_(part_VH)

    def _align(self, batch: Any, h_SBH: torch.Tensor, delta_SBV: torch.Tensor) -> None:
        assert self._target_VH is not None
        pulled_NH = delta_SBV.flatten(0, 1) @ self._target_VH.to(delta_SBV.dtype)
        value_N = (pulled_NH.float() * h_SBH.flatten(0, 1)).sum(1)
        place_N = labelled_positions(batch.mask_BS)
        if place_N is not None:  # there are logits of these positions alone
            flat = value_N.new_zeros(batch.mask_BS.numel())
            value_N = flat.index_copy(0, place_N.to(value_N.device), value_N)
        value_BS = value_N.view(batch.mask_BS.T.shape).T
        self._sums.append((batch.group_B, sequence_sums(value_BS, batch)))
