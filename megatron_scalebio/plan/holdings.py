"""What a rank holds between flushes, counted on the objects that a run builds.

Works alike on real and on meta tensors: a storage is counted once, whoever views it.
"""

from collections.abc import Iterable

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_scalebio.core.period import Period
from megatron_scalebio.core.twin import named_parameters

WEIGHTS_W, WEIGHTS_U = "weights w", "weights u"
GRADIENTS, MASTERS, ADAM = "gradients", "fp32 masters", "Adam state"
FP8_COPIES = "FP8 copies"
KINDS = (WEIGHTS_W, WEIGHTS_U, GRADIENTS, MASTERS, ADAM, FP8_COPIES)
_NEVER_CAST = (".router.weight", ".gate_weight")


def holdings(
    w: list[torch.nn.Module], u: list[torch.nn.Module], period: Period
) -> tuple[dict[str, int], list[torch.Tensor]]:
    """Bytes by kind, and the tensors behind them.

    u is what it does not share with w. Adam's state is its two moments, whether or not the first
    step has made them yet.
    """
    tensors = {
        WEIGHTS_W: [p.data for _, p in named_parameters(w)],
        WEIGHTS_U: [p.data for _, p in named_parameters(u)],
        GRADIENTS: [
            buffer.grad_data
            for ddps in period.ddp.values()
            for ddp in ddps
            for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers)
        ],
        MASTERS: [p for optimizer in period.optimizers.values() for p in stepped(optimizer)],
    }
    counted: set[int] = set()
    sizes = {kind: _new_bytes(of_kind, counted) for kind, of_kind in tensors.items()}
    sizes[ADAM] = 2 * sum(p.nbytes for p in tensors[MASTERS])
    sizes[FP8_COPIES] = 0
    return sizes, [tensor for of_kind in tensors.values() for tensor in of_kind]


def fp8_copies(models: Iterable[list[torch.nn.Module]], recipe: str) -> int:
    """Bytes of the FP8 or FP4 casts that Transformer Engine keeps of the layers' matrices.

    Not of routers and of shared experts' gates, which keep the model's precision. u and w share
    those of frozen layers that u has no weights of its own of, except under delayed scaling, where
    each has its own scales.
    """
    total, cast = 0, set()
    for model in models:
        for name, parameter in named_parameters(model):
            matrix = parameter.ndim == 2 and ".decoder.layers." in name
            if matrix and not name.endswith(_NEVER_CAST):
                # The distributed optimizer's weights all lie in one storage.
                place = parameter.untyped_storage()._cdata, parameter.storage_offset()
                if place not in cast or recipe == "delayed":
                    total += copy_bytes(parameter.shape[0], parameter.shape[1], recipe)
                cast.add(place)
    return total


def copy_bytes(rows: int, columns: int, recipe: str) -> int:
    """Bytes of a matrix's cast, for products along its rows and along its columns, with scales.

    Scales are padded to the tiles in which the products read them.
    """
    elements, sides = rows * columns, ((rows, columns), (columns, rows))
    if recipe in ("tensorwise", "delayed"):
        return 2 * elements + 4  # one fp32 scale
    if recipe == "blockwise":  # one for 128 x 128
        tiles = [(-(-across // 128), -(-along // 128)) for across, along in sides]
        return 2 * elements + 4 * sum(high * _up(wide, 4) for high, wide in tiles)
    block = {"mxfp8": 32, "nvfp4": 16}[recipe]  # in a row, with a byte of scale
    scales = sum(_up(across, 128) * _up(-(-along // block), 4) for across, along in sides)
    # NVFP4 takes half a byte an element, and two fp32 maxima.
    return scales + (2 * elements if recipe == "mxfp8" else elements + 8)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def stepped(optimizer: MegatronOptimizer) -> list[torch.Tensor]:
    """What Adam steps on this rank: the fp32 masters, this rank's shard of them, or the weights."""
    return [
        parameter
        for part in optimizer.chained_optimizers
        if not part.is_stub_optimizer
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]


def _new_bytes(tensors: Iterable[torch.Tensor], counted: set[int]) -> int:
    """Bytes of the storages that are not counted yet."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in counted:
            counted.add(storage._cdata)
            total += storage.nbytes()
    return total
