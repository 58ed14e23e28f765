"""The double's casts: what its kernels make of tensors in FP8 and FP4, and how rows are padded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

BLOCK = 128
_NAMES = {
    "kByte": torch.uint8, "kInt32": torch.int32, "kFloat32": torch.float32,
    "kFloat16": torch.float16, "kBFloat16": torch.bfloat16, "kFloat8E4M3": torch.float8_e4m3fn,
    "kFloat8E5M2": torch.float8_e5m2,
}  # fmt: skip


def dtype_of(tag: Any) -> torch.dtype:
    return _NAMES[tag.name]


def largest(tag: Any) -> float:
    return torch.finfo(dtype_of(tag)).max


def create_empty_quantized_tensor(
    quantizer: Any, shape: Any, dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    if _kind(quantizer) == "Float8":
        data = torch.zeros(tuple(shape), dtype=torch.uint8)
        return _of_one_scale(data, torch.ones(1), dtype, quantizer)
    made = quantizer.storage_metadata(dtype)
    tensors = {
        name.lstrip("_"): torch.zeros(size, dtype=kind)
        for name, (size, kind) in quantizer.inner_tensor_specs(tuple(shape)).items()
    }
    names = ["rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv"]
    names += ["amax_rowwise", "amax_columnwise"] if _kind(quantizer) == "NVFP4" else []
    given = {name: tensors.get(name) for name in names} | made["nontensor_kwargs"]
    if not quantizer.internal:
        del given["fake_dtype"]
        given.update(shape=tuple(shape), dtype=dtype)
    return made["cls"](**given)


def quantize(tensor: torch.Tensor, quantizer: Any, output: Any = None, noop: Any = None) -> Any:
    x = tensor.detach().contiguous()
    if _kind(quantizer) == "Float8":
        return _quantize_whole(x, quantizer, output)
    if output is None:
        output = create_empty_quantized_tensor(quantizer, x.shape, x.dtype, "cpu", False)
    if _kind(quantizer) == "Float8Block":
        return _quantize_blocks(x, quantizer, output)
    return _quantize_rows(x, quantizer, output)


def _kind(quantizer: Any) -> str:
    """Float8 (one scale), Float8Block, MXFP8 or NVFP4."""
    name = type(quantizer).__name__.removesuffix("Quantizer")
    return "Float8" if name == "Float8CurrentScaling" else name


def _quantize_whole(x: torch.Tensor, quantizer: Any, output: Any) -> Any:
    """One scale for the tensor: of its own maximum, or of earlier ones (delayed)."""
    amax = x.abs().amax().float().reshape(1) if x.numel() else torch.zeros(1)
    if hasattr(quantizer, "scale"):
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
        scale = quantizer.scale.reshape(1).clone()
    else:
        if quantizer.with_amax_reduction:
            group = quantizer.amax_reduction_group
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group)
        scale = _scale(amax, quantizer, 0.0)
    data = _cast(x.float() * scale, quantizer.dtype)
    if output is None:
        return _of_one_scale(data, scale, x.dtype, quantizer)
    turned = data.movedim(-1, 0).contiguous()
    output._data = _into(output._data, data) if quantizer.rowwise_usage else None
    output._transpose = _into(output._transpose, turned) if quantizer.columnwise_usage else None
    output._transpose_invalid = not quantizer.columnwise_usage
    output._fp8_dtype = quantizer.dtype
    output._scale_inv.copy_((1 / scale).reshape(output._scale_inv.shape))
    return output


def _of_one_scale(
    data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, quantizer: Any
) -> Any:
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    assert quantizer.rowwise_usage or quantizer.columnwise_usage
    kind = Float8TensorStorage if quantizer.internal else Float8Tensor
    shaped = {} if quantizer.internal else {"shape": data.shape, "dtype": dtype}
    return kind(
        data=data if quantizer.rowwise_usage else None, fp8_scale_inv=1 / scale,
        data_transpose=data.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None,
        fp8_dtype=quantizer.dtype, quantizer=quantizer, **shaped,
    )  # fmt: skip


def _quantize_blocks(x: torch.Tensor, quantizer: Any, output: Any) -> Any:
    """A scale for each 128 x 128 (weights) or 1 x 128 elements."""
    flat = x.reshape(-1, x.shape[-1]).float()
    for side, matrix, shape, used in (
        ("rowwise", flat, x.shape, quantizer.rowwise_usage),
        ("columnwise", flat.t(), (x.shape[-1], *x.shape[:-1]), quantizer.columnwise_usage),
    ):
        if not used:
            setattr(output, f"_{side}_data", None)
            setattr(output, f"_{side}_scale_inv", None)
            continue
        data, inverse = _in_blocks(matrix, quantizer)
        scales = torch.zeros(quantizer.get_scale_shape(x.shape, side == "columnwise"))
        scales[: inverse.shape[0], : inverse.shape[1]] = inverse
        for name, value in (("data", data.reshape(shape)), ("scale_inv", scales)):
            held = getattr(output, f"_{side}_{name}")
            setattr(output, f"_{side}_{name}", _into(held, value))
    return output


def _in_blocks(matrix: torch.Tensor, quantizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Values; inverse scales [rows / 128, columns / 128], of single rows [columns / 128, rows]."""
    high = BLOCK if quantizer.block_scaling_dim == 2 else 1
    rows, columns = matrix.shape
    size = (-(-rows // high) * high, -(-columns // BLOCK) * BLOCK)
    padded = torch.zeros(size)
    padded[:rows, :columns] = matrix
    tiles = padded.view(size[0] // high, high, size[1] // BLOCK, BLOCK)
    scale = _scale(tiles.abs().amax((1, 3), True), quantizer, quantizer.amax_epsilon)
    data = _cast(tiles * scale, quantizer.dtype).view(size)[:rows, :columns].contiguous()
    inverse = (1 / scale)[:, 0, :, 0]
    return data, inverse if high == BLOCK else inverse.t()


def _quantize_rows(x: torch.Tensor, quantizer: Any, output: Any) -> Any:
    """MXFP8: a power of two for 32 elements of a row (of a column: of its own copy).

    NVFP4 (16 elements, turned for columns) keeps whole numbers in place of E2M1 and of its scales
    of two levels, and neither turns operands at random nor rounds so: what is read is what counts.
    """
    four = _kind(quantizer) == "NVFP4"
    flat = x.reshape(-1, x.shape[-1]).float()
    for side, matrix, used in (
        ("rowwise", flat, quantizer.rowwise_usage),
        ("columnwise", flat.t().contiguous(), quantizer.columnwise_usage),
    ):
        if not used:
            setattr(output, f"_{side}_data", None)
            setattr(output, f"_{side}_scale_inv", None)
            continue
        groups = matrix.view(len(matrix), -1, 16 if four else 32)
        most = 7.0 if four else largest(quantizer.dtype)
        exponent = (groups.abs().amax(-1, True) / most).clamp_min(2.0**-100).log2().ceil()
        inner = (groups / 2.0**exponent).view(matrix.shape)
        if four:
            halves = (inner.round() + 8).to(torch.uint8)  # 1 to 15
            data = 16 * halves[:, ::2] + halves[:, 1::2]
        else:
            data = _cast(inner, quantizer.dtype)
        scales = (exponent[..., 0] + 127).to(torch.uint8)
        if side == "columnwise" and not four:
            data, scales = data.t(), scales.t()
        held, held_scales = getattr(output, f"_{side}_data"), getattr(output, f"_{side}_scale_inv")
        held.view(data.shape).copy_(data)
        held_scales[: scales.shape[0], : scales.shape[1]] = scales
    return output


def _scale(amax: torch.Tensor, quantizer: Any, least: float) -> torch.Tensor:
    amax = amax.clamp_min(least)
    usable = (amax > 0) & amax.isfinite()
    scale = torch.where(usable, largest(quantizer.dtype) / amax, 1.0)
    return 2.0 ** scale.log2().floor() if quantizer.force_pow_2_scales else scale


def _cast(x: torch.Tensor, tag: Any) -> torch.Tensor:
    return x.clamp(-largest(tag), largest(tag)).to(dtype_of(tag)).view(torch.uint8)


def _into(held: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    return value if held is None else held.copy_(value)


def bgrad_quantize(x: torch.Tensor, quantizer: Any) -> list[Any]:
    return [x.reshape(-1, x.shape[-1]).float().sum(0).to(x.dtype), quantize(x, quantizer)]


def split_quantize(
    x: torch.Tensor, sizes: list[int], quantizers: list[Any], **options: Any
) -> list[Any]:
    return [quantize(*each) for each in zip(x.split(sizes), quantizers, strict=True)]


def fp8_transpose(x: torch.Tensor, tag: Any, *, out: torch.Tensor | None = None) -> torch.Tensor:
    return _into(out, x.movedim(-1, 0).contiguous())


def fused_multi_row_padding(
    rows: torch.Tensor, out: torch.Tensor, sizes: list[int], padded_sizes: list[int]
) -> None:
    out.zero_()
    for part, space in zip(rows.split(sizes), out.split(padded_sizes), strict=True):
        space[: len(part)] = part


def fused_multi_row_unpadding(
    rows: torch.Tensor, out: torch.Tensor, padded_sizes: list[int], sizes: list[int]
) -> None:
    for part, space in zip(rows.split(padded_sizes), out.split(sizes), strict=True):
        space[:] = part[: len(space)]


CASTS: list[Callable[..., Any]] = [
    create_empty_quantized_tensor, quantize, bgrad_quantize, split_quantize, fp8_transpose,
    fused_multi_row_padding, fused_multi_row_unpadding,
]  # fmt: skip
