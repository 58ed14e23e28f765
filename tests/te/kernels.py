"""A double of Transformer Engine's kernels: the same functions in plain torch, on the CPU.

An operand of a product has to hold the data (row-wise or column-wise) that Hopper's FP8 products
read, as stale or missing copies of a weight are what can go wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.te.casts import BLOCK, CASTS, dtype_of, quantize


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
        *CASTS, generic_gemm, te_general_grouped_gemm, rmsnorm_fwd, rmsnorm_bwd, layernorm_fwd,
        layernorm_bwd, multi_tensor_adam, multi_tensor_l2norm, multi_tensor_scale,
    )
]  # fmt: skip
