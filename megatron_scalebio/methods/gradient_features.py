"""Sketches of single examples' gradients, from Megatron's own schedules.

    micro-batches of one example ─▶ one flush of many ─▶ backward of each in turn
        └▶ as each matrix gets its gradient: (Γ of it) ─▶ sketched into the example's row ─▶ freed

A hook takes a matrix's gradient the moment it is there, so no gradient outlives its micro-batch:
neither a buffer nor a reduction over data-parallel ranks is needed, the pipeline stays full, and
the memory is that of one matrix. Each stage's backward passes come in the order of the
micro-batches. The sketch is linear: every model-parallel rank sketches what it holds, and the
ranks' rows add up.

Coordinates are the weight matrices of the transformer layers. Matrices are told apart by layer and
name, so the sketch does not depend on the pipeline; where tensor parallelism splits a matrix, each
part is a matrix of its own: another random projection than without it, as good.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.utils import unwrap_model

from megatron_scalebio import runtime
from megatron_scalebio.core.batch import MicroBatch, gpt_losses
from megatron_scalebio.core.flush import Pass, loss_func
from megatron_scalebio.data.batch import BatchLayout
from megatron_scalebio.data.sources import Source
from megatron_scalebio.engine.evaluate import evaluating, flushes
from megatron_scalebio.engine.state import RunState
from megatron_scalebio.methods.adam_moments import AdamMoments, adam_update
from megatron_scalebio.methods.sketch import CountSketch, Identity, SketchTable
from megatron_scalebio.mixture.objective import Role
from megatron_scalebio.mixture.sampler import Ints
from megatron_scalebio.progress import PROGRESS


@dataclass
class _Matrix:
    key: str
    weight: torch.nn.Parameter
    sketch: CountSketch | Identity
    moments: AdamMoments | None = None
    passes: int = 0


def matrices_of(chunks: Sequence[torch.nn.Module]) -> list[tuple[str, torch.nn.Parameter]]:
    """This rank's weight matrices of transformer layers by their global names, counted once."""
    result = []
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        for layer in unwrap_model(chunk).decoder.layers:
            for name, weight in layer.named_parameters():
                if weight.dim() == 2 and param_is_not_tensor_parallel_duplicate(weight):
                    result.append((f"{layer.layer_number:06d}.{name}.{tp_rank}", weight))
    return result


class GradientFeatures:
    """Projected gradients of examples under the weights that a run's w has at the moment.

    Outside a training period. From its construction on, the matrices alone require gradients.

    Args:
        dimensions: of the projection; nothing is projected where the matrices have no more.

    Attributes:
        dimensions: D, length of a feature.
        coordinates: of the whole model's gradient.
    """

    def __init__(self, state: RunState, dimensions: int, seed: int) -> None:
        assert state.training.period is None
        self._state = state
        for chunk in state.training.w:
            chunk.requires_grad_(False)
        named = matrices_of(state.training.w)
        held: list[Any] = [None] * parallel_state.get_model_parallel_group().size()
        sizes = [(key, weight.numel()) for key, weight in named]
        dist.all_gather_object(held, sizes, group=parallel_state.get_model_parallel_group())
        whole = sorted(entry for part in held for entry in part)
        self.coordinates = sum(size for _, size in whole)
        self.dimensions = min(dimensions, self.coordinates)
        self._matrices = []
        starts = np.cumsum([0, *(size for _, size in whole)])
        offset = {key: int(start) for (key, _), start in zip(whole, starts[:-1], strict=True)}
        table = SketchTable(self.dimensions, seed, runtime.device())
        for key, weight in named:
            weight.requires_grad_(True)
            if self.dimensions == self.coordinates:
                sketch: CountSketch | Identity = Identity(offset[key], weight.numel())
            else:
                sketch = CountSketch(table, key, weight.numel())
            self._matrices.append(_Matrix(key, weight, sketch))
        self._hooks = [
            m.weight.register_post_accumulate_grad_hook(partial(self._take, m))
            for m in self._matrices
        ]
        self._row_P: list[int] = []
        self._out_RD = torch.empty(0)

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        return [matrix.weight for matrix in self._matrices]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def of_examples(
        self, source: Source, row_N: Ints, moments: Sequence[AdamMoments] | None
    ) -> torch.Tensor:
        """The feature of every example, [N, D] float32, equal on all ranks. A collective.

        Args:
            moments: of `weights`: a gradient is turned into Adam's update before it is projected.
        """
        for number, matrix in enumerate(self._matrices):
            matrix.moments = moments[number] if moments else None
        out_ND = torch.zeros(len(row_N), self.dimensions, device=runtime.device())
        for place_P, batches in flushes(source, row_N, self._state.config, self._layout(1)):
            rows = [-1 if b.group_B[0] else int(place_P[b.member_B[0]]) for b in batches]
            self._flush([_pass(batch, "sample") for batch in batches], rows, out_ND)
        dist.all_reduce(out_ND)
        return out_ND

    def of_mean(self, source: Source, row_N: Ints | None = None) -> torch.Tensor:
        """The feature of the gradient of a set's mean loss, up to scale, [D] float32.

        Args:
            row_N: of these examples [of all].
        """
        row_N = np.arange(len(source)) if row_N is None else row_N
        for matrix in self._matrices:
            matrix.moments = None
        out_1D = torch.zeros(1, self.dimensions, device=runtime.device())
        config = self._state.config
        layout = self._layout(config.train.micro_batch_size)
        for _, batches in flushes(source, row_N, config, layout):
            passes = [_pass(batch, config.data.loss_mean) for batch in batches]
            self._flush(passes, [0] * len(batches), out_1D)
        dist.all_reduce(out_1D)
        return out_1D[0] / len(row_N)

    def _layout(self, size: int) -> BatchLayout:
        """Micro-batches of so many examples."""
        return replace(self._state.data.layout, micro_batch_size=size, packed=False)

    def _flush(self, passes: list[Pass], row_P: list[int], out_RD: torch.Tensor) -> None:
        """Forward and backward of all; each one's gradient is added to its row (−1: to none)."""
        chunks = self._state.training.w
        self._row_P, self._out_RD = row_P, out_RD
        for matrix in self._matrices:
            matrix.passes = 0
        with evaluating(chunks), PROGRESS.at("gradients"):
            get_forward_backward_func()(
                forward_step_func=_forward_step,
                data_iterator=[iter(passes) for _ in chunks] if len(chunks) > 1 else iter(passes),
                model=list(chunks),
                num_microbatches=len(passes),
                seq_length=max(each.batch.tokens_BS.shape[1] for each in passes),
                micro_batch_size=len(passes[0].batch.tokens_BS),
                forward_only=False,
            )
        assert all(matrix.passes == len(passes) for matrix in self._matrices)

    def _take(self, matrix: _Matrix, weight: torch.Tensor) -> None:
        """Hook: a matrix has got its gradient of one micro-batch."""
        row, gradient = self._row_P[matrix.passes], weight.grad
        matrix.passes += 1
        weight.grad = None
        if row < 0:
            return
        assert gradient is not None
        flat = gradient.flatten()
        for number, piece in enumerate(matrix.sketch.pieces):
            values = flat[piece].float()
            if matrix.moments:
                values = adam_update(values, matrix.moments, piece, self._state.config.optimizer)
            matrix.sketch.add(number, values, self._out_RD[row])


def _pass(batch: MicroBatch, loss_mean: str) -> Pass:
    """A pass whose objective is a sum of examples (or of target tokens), those of group 0 alone."""
    targets_B = (batch.mask_BS > 0).sum(dim=1).clamp_min(1).double()
    weight_B = 1 / targets_B if loss_mean == "sample" else torch.ones_like(targets_B)
    weight_B = torch.where(batch.group_B == 0, weight_B, 0.0)
    return Pass(Role.TRAIN_W, batch, weight_B, weight_B)


def _forward_step(passes: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    PROGRESS.mark()
    this = next(passes)
    return gpt_losses(model, this.batch), partial(loss_func, this)
