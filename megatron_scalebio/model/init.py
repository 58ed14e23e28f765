"""Initial weights that are the same under every TP × PP × VPP layout.

Megatron-Core draws weights in the order in which a rank builds its modules, so the layout decides
them. Here every tensor of the whole model is drawn from a generator seeded by (seed, name, layer),
and each rank keeps its shard.
"""

import hashlib
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_scalebio.launcher import cores

# Projections back into the residual stream start smaller, by 1/√(2 · layers) (GPT-2).
_RESIDUAL_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")
# Each is held whole, in fp32, while it is drawn.
_MOST_AT_A_TIME = 8


def seed_generators(seed: int) -> None:
    """Seeds torch's generators and Megatron's of this rank, for dropout."""
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def initialize_weights(
    chunks: Iterable[torch.nn.Module], seed: int, std: float, num_layers: int
) -> None:
    """Draws every matrix from N(0, std²); norms and biases stay at one and zero."""
    # A generator is served by one thread: a billion weights would take it a quarter of a minute.
    with ThreadPoolExecutor(min(cores(), _MOST_AT_A_TIME)) as pool:
        draws = []
        for chunk in chunks:
            state = chunk.sharded_state_dict()  # type: ignore[operator]
            apply_factories(state)
            for tensor in nested_values(state):
                if isinstance(tensor, ShardedTensor) and tensor.data.ndim >= 2:
                    is_residual = tensor.key.endswith(_RESIDUAL_PROJECTIONS)
                    scale = math.sqrt(2 * num_layers) if is_residual else 1.0
                    draws.append(pool.submit(_draw_shard, tensor, seed, std / scale))
        for draw in draws:
            draw.result()


@torch.no_grad()
def _draw_shard(tensor: ShardedTensor, seed: int, std: float) -> None:
    prepended = tensor.prepend_axis_num  # leading axes that stack layers
    layer, offset = tensor.global_offset[:prepended], tensor.global_offset[prepended:]
    name = f"{seed}/{tensor.key}/{layer}".encode()
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name).hexdigest()[:15], 16))
    whole = torch.empty(tensor.global_shape[prepended:]).normal_(0.0, std, generator=generator)
    part = tuple(slice(o, o + n) for o, n in zip(offset, tensor.data.shape, strict=True))
    tensor.data.copy_(whole[part])
