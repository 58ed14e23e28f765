"""A double of Transformer Engine's kernels: the same functions in plain torch, on the CPU.

An operand of a product has to hold the data (row-wise or column-wise) that Hopper's FP8 products
read, as stale or missing copies of a weight are what can go wrong.
"""

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


# ---- casts -----------------------------------------------------------------------------------


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


# ---- products and norms ----------------------------------------------------------------------


def _operand(x: Any, rowwise: bool) -> torch.Tensor:
    """An operand as a matrix, from the data that a product reads; it must be there and valid."""
    side = "row" if rowwise else "column"
    if hasattr(x, "_transpose_invalid"):  # one scale
        data = x._data if rowwise else None if x._transpose_invalid else x._transpose
        assert data is not None, f"the FP8 product lacks {side}-wise data"
        values = data.view(dtype_of(x._fp8_dtype)).float() * x._scale_inv
        return values.flatten(0, -2) if rowwise else values.flatten(1).t()
    if hasattr(x, "_is_2D_scaled"):
        part = getattr(x, f"_{side}wise_data")
        assert part is not None, f"the FP8 product lacks {side}-wise data"
        data = part.view(dtype_of(x._fp8_dtype)).float()
        data = data.flatten(0, -2) if rowwise else data.flatten(1)
        inverse = getattr(x, f"_{side}wise_scale_inv")
        spread = inverse if x._is_2D_scaled else inverse.t()
        scales = spread.repeat_interleave(BLOCK, 1)
        scales = scales.repeat_interleave(BLOCK, 0) if x._is_2D_scaled else scales
        values = data * scales[: data.shape[0], : data.shape[1]]
        return values if rowwise else values.t()
    if hasattr(x, "_with_gemm_swizzled_scales"):
        return _rows(x, side, rowwise)
    return x.detach().float().reshape(-1, x.shape[-1])


def _rows(x: Any, side: str, rowwise: bool) -> torch.Tensor:
    """What `_quantize_rows` has made."""
    data, scales = getattr(x, f"_{side}wise_data"), getattr(x, f"_{side}wise_scale_inv")
    assert data is not None, f"the product lacks {side}-wise data"
    four = hasattr(x, "_fp4_dtype")
    data = data.flatten(1) if four and not rowwise else data.flatten(0, -2)
    if four:
        values = torch.stack([data // 16, data % 16], -1).flatten(1).float() - 8
    else:
        values = data.view(dtype_of(x._fp8_dtype)).float()
        values, scales = (values, scales) if rowwise else (values.t(), scales.t())
    spread = (2.0 ** (scales.float() - 127)).repeat_interleave(16 if four else 32, 1)
    values = values * spread[: values.shape[0], : values.shape[1]]
    return values if rowwise else values.t()


def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any,
    bias: Any, bias_type: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any,
    workspace_size: int, accumulate: bool, use_split_accumulator: bool, **options: Any,
) -> list[Any]:  # fmt: skip
    low = hasattr(A, "_quantizer")
    assert not gelu and options["comm_overlap"] is None and low == hasattr(B, "_quantizer")
    a, b = _operand(A, transA), _operand(B, not transB)
    if low:
        sides = (*a.shape, b.shape[1] if transB else b.shape[0])
        least = 32 if hasattr(A, "_with_gemm_swizzled_scales") else 16
        assert sides[0] % least == sides[1] % least == sides[2] % 8 == 0, f"a product of {sides}"
    out = b.t() @ a if transB else b @ (a.t() if transA else a)
    dtype = dtype_of(output_dtype) if output_dtype is not None else A.dtype
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b.sum(0).to(dtype)
    elif bias is not None:
        out = out + bias.detach().float()
    out = out * options["alpha"]
    if not transB:
        out = out.reshape(*(B.size() if low else B.shape)[:-1], out.shape[-1])
    if D is not None:
        out = D.copy_(D.float() + out if accumulate else out)
    else:
        out = out.to(dtype)
        out = out if quantizer is None else quantize(out, quantizer)
    return [out, bias_grad, gelu_in, options["extra_output"]]


def te_general_grouped_gemm(
    A: list[Any], transA: bool, B: list[Any], transB: bool, D: list[torch.Tensor],
    output_dtype: Any, splits: list[int] | None, bias: list[torch.Tensor], bias_type: Any,
    single_output: bool, gelu_in: Any, grad: bool, workspaces: Any, workspace_size: int,
    accumulate: bool, use_split_accumulator: bool, sms: int,
) -> list[torch.Tensor]:  # fmt: skip
    """Each group's product alone; an expert without tokens has one of no rows."""
    outputs = list(D[0].split(splits)) if single_output else D
    for a, b, out, of_group in zip(A, B, outputs, bias, strict=True):
        has_bias = of_group.numel() > 0
        _, bias_grad, *_ = generic_gemm(
            a, transA, b, transB, out, None, output_dtype, of_group if has_bias else None,
            bias_type, False, None, grad, workspaces, workspace_size, accumulate,
            use_split_accumulator, comm_overlap=None, alpha=1.0, extra_output=None,
        )  # fmt: skip
        if grad and has_bias:
            of_group.copy_(bias_grad)
    return bias


def rmsnorm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: Any, quantizer: Any, tag: Any,
    sm_margin: int, one_plus: bool,
) -> list[Any]:  # fmt: skip
    inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    y = (x.float() * inverse * (weight.float() + one_plus)).to(dtype_of(tag))
    return [y if quantizer is None else quantize(y, quantizer), None, inverse.flatten()]


def rmsnorm_bwd(
    dz: torch.Tensor, x: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor,
    sm_margin: int, one_plus: bool,
) -> list[torch.Tensor]:  # fmt: skip
    hat = x.float() * inverse.reshape(*x.shape[:-1], 1)
    d = dz.float().reshape(x.shape)
    return [_through_norm(d, hat, inverse, weight, one_plus, x, centred=False),
            (d * hat).flatten(0, -2).sum(0).to(weight.dtype)]  # fmt: skip


def _through_norm(
    d: torch.Tensor, hat: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor,
    one_plus: bool, x: torch.Tensor, centred: bool,
) -> torch.Tensor:  # fmt: skip
    g = d * (weight.float() + one_plus)
    along = g - hat * (g * hat).mean(-1, keepdim=True)
    along = along - g.mean(-1, keepdim=True) if centred else along
    return (along * inverse.reshape(*x.shape[:-1], 1)).to(x.dtype)


def layernorm_fwd(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out: Any,
    quantizer: Any, tag: Any, sm_margin: int, one_plus: bool,
) -> list[Any]:  # fmt: skip
    mean = x.float().mean(-1, keepdim=True)
    inverse = torch.rsqrt((x.float() - mean).pow(2).mean(-1, keepdim=True) + eps)
    y = (x.float() - mean) * inverse * (weight.float() + one_plus)
    y = (y if bias is None else y + bias.float()).to(dtype_of(tag))
    y = y if quantizer is None else quantize(y, quantizer)
    return [y, mean.flatten(), inverse.flatten()]


def layernorm_bwd(
    dz: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, inverse: torch.Tensor,
    weight: torch.Tensor, sm_margin: int, one_plus: bool,
) -> list[torch.Tensor]:  # fmt: skip
    mean, column = (t.reshape(*x.shape[:-1], 1) for t in (mean, inverse))
    hat, d = (x.float() - mean) * column, dz.float().reshape(x.shape)
    dx = _through_norm(d, hat, inverse, weight, one_plus, x, centred=True)
    sums = [(d * hat).flatten(0, -2).sum(0), d.flatten(0, -2).sum(0)]
    return [dx, *(each.to(weight.dtype) for each in sums)]


# ---- optimizer -------------------------------------------------------------------------------


def multi_tensor_adam(
    chunk: int, noop: Any, lists: list[list[torch.Tensor]], lr: float, beta1: float, beta2: float,
    eps: float, step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    assert type(step) is int and mode == 1
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for g, p, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g.float(), alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g.float(), g.float(), value=1 - beta2)
        update = (m / first) / ((v / second).sqrt() + eps) + weight_decay * p.float()
        p.copy_(p.float() - lr * update)


def multi_tensor_l2norm(
    chunk: int, noop: Any, lists: list[list[torch.Tensor]], per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    norms = torch.stack([t.float().norm() for t in lists[0]])
    return norms.norm().reshape(1), norms


def multi_tensor_scale(
    chunk: int, noop: Any, lists: list[list[torch.Tensor]], scale: float
) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


KERNELS: list[Callable[..., Any]] = [
    torch.no_grad()(kernel) for kernel in (
        create_empty_quantized_tensor, quantize, bgrad_quantize, split_quantize, fp8_transpose,
        fused_multi_row_padding, fused_multi_row_unpadding, generic_gemm, te_general_grouped_gemm,
        rmsnorm_fwd, rmsnorm_bwd, layernorm_fwd, layernorm_bwd, multi_tensor_adam,
        multi_tensor_l2norm, multi_tensor_scale,
    )
]  # fmt: skip
