"""The gradient of a whole model as a vector whose parts lie on all ranks.

Every number of it is in one rank's part: copies of one parameter (tied embeddings on two pipeline
stages, norms on all tensor-parallel ranks) count once, and data-parallel ranks, whose gradients
are equal after a flush, deal it among themselves as the distributed optimizer does. So whatever
is linear in the gradient is a sum of the parts' shares over the world.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared


def counted_gradients(chunks: Sequence[DistributedDataParallel]) -> list[torch.Tensor]:
    """This rank's part: flat fp32 views into the gradient buffers of a model's chunks.

    To be read after a flush, which has reduced the gradients. The same parameters give the same
    list each time; a rank's list may be empty. What is frozen has no gradient and is left out.
    """
    parts = []
    for chunk in chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            group = buffer.data_parallel_group
            for parameter, (start, end, bucket_id) in buffer.param_index_map.items():
                if not param_is_not_shared(parameter):
                    continue
                if not param_is_not_tensor_parallel_duplicate(parameter):
                    continue
                # Under the distributed optimizer the rest of a bucket is not reduced here; its
                # padded length is a multiple of the group's size.
                bucket = buffer.buckets[bucket_id]
                length, size = bucket.grad_data.numel(), group.size()
                first = bucket.offset + group.rank() * length // size
                last = bucket.offset + (group.rank() + 1) * length // size
                if max(start, first) < min(end, last):
                    parts.append(buffer.grad_data[max(start, first) : min(end, last)])
    return parts


def dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    """⟨a, b⟩ of two gradients, equal on all ranks. A collective of the whole world."""
    mine = [torch.dot(x.double(), y.double()) for x, y in zip(a, b, strict=True)]
    device = torch.device(torch.cuda.current_device())
    total = torch.stack(mine).sum() if mine else torch.zeros((), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)
