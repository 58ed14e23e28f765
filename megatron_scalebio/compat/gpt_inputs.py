"""What Megatron's GPTModel takes beside ids: where packed sequences end, and which labels count.

Logits are the largest tensor of a pass, and prompts often half of a dialogue: of them and of
padding nobody wants any. GPTModel hands its last hidden states to an `output_processor` in place of
its own head and loss.
"""

from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """From pinned memory: a copy from other memory may wait for all that is queued before it.

    Memory is pinned as it lies, which an expanded tensor (positions) refuses.
    """
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


def packed_params(lengths_B: torch.Tensor, padded: int, device: torch.device) -> PackedSeqParams:
    """Where the sequences of a row begin and end. Its padding is one more, unseen by the others.

    Args:
        padded: tokens of the row.
    """
    lengths = lengths_B.tolist()
    if padded > sum(lengths):
        lengths.append(padded - sum(lengths))
    ends = sent(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
    longest = max(lengths)
    return PackedSeqParams("thd", ends, ends, max_seqlen_q=longest, max_seqlen_kv=longest)


def labelled_positions(mask_BS: torch.Tensor) -> torch.Tensor | None:
    """Where labels count, as places in [S, B] flattened; None: everywhere.

    At least one: a head without any position would leave its weights without a gradient.
    """
    if bool((mask_BS > 0).all()):
        return None
    place_N = torch.nonzero(mask_BS.T.flatten() > 0)[:, 0]
    return place_N if len(place_N) else torch.zeros(1, dtype=torch.int64)


def labelled_losses(
    hidden_states: torch.Tensor,
    output_layer: Any,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    context: torch.Tensor,
    compute_language_model_loss: Any,
    scale_logits: Any,
    config: Any,
    **unused: Any,
) -> torch.Tensor:
    """GPTModel's output_processor: the loss of each label that counts, zero elsewhere, [B, S].

    Args:
        context: their places, from `labelled_positions`, on the device.
    """
    split = config.sequence_parallel
    if split:  # the head sums the gradients of the tensor ranks; each takes its part of the sum
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=output_layer.tp_group
        )
    rows_NH = hidden_states.flatten(0, 1).index_select(0, context)
    output_layer.sequence_parallel = False  # as Megatron does for the last token's logits alone
    try:
        logits_N1V, _ = output_layer(rows_NH.unsqueeze(1), weight=output_weight)
    finally:
        output_layer.sequence_parallel = split
    label_1N = labels.T.flatten()[context].unsqueeze(0)
    loss_1N = compute_language_model_loss(label_1N, scale_logits(logits_N1V))
    flat = loss_1N.new_zeros(labels.numel()).index_copy(0, context, loss_1N[0])
    return flat.view(labels.T.shape).T
