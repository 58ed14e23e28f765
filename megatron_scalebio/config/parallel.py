"""Layout over ranks, numerics and recompute."""

from dataclasses import dataclass
from typing import Any, Literal

from megatron_scalebio.config.checks import option, require_positive
from megatron_scalebio.errors import UserError


@dataclass
class ParallelConfig:
    tensor_model_parallel_size: int = option(1, "ranks that share each layer (TP)")
    pipeline_model_parallel_size: int = option(1, "pipeline stages (PP)")
    context_parallel_size: int = option(1, "ranks that share each sequence (CP)")
    expert_model_parallel_size: int = option(
        1, "data-parallel ranks that share the experts of a layer (EP)"
    )
    expert_tensor_parallel_size: int | None = option(
        None, "ranks that share each expert [tensor_model_parallel_size]"
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers per virtual chunk: interleaved pipeline (VPP)"
    )
    sequence_parallel: bool = option(
        False, "split the activations of norms and dropout along the sequence over TP ranks"
    )
    use_distributed_optimizer: bool = option(False, "shard optimizer state over DP (ZeRO-1)")
    overlap_grad_reduce: bool = option(
        False, "reduce gradients over DP while the backward pass still runs"
    )
    overlap_param_gather: bool = option(
        False, "`train`: gather updated weights over DP while the next forward pass runs"
    )
    bf16: bool = option(False, "bfloat16 weights, fp32 master weights and fp32 gradient sums")
    fp8_format: Literal["hybrid", "e4m3"] | None = option(
        None, "FP8 matrix products by Transformer Engine; hybrid: e4m3 forward, e5m2 backward"
    )
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = option(
        "tensorwise", "how FP8 tensors are scaled; mxfp8: Blackwell only"
    )
    fp4_format: Literal["e2m1"] | None = option(
        None, "FP4 matrix products (recipe NVFP4) by Transformer Engine: Blackwell only"
    )
    fp8_param_gather: bool = option(False, "Megatron-LM's flag, refused here: weights stay in bf16")
    recompute_granularity: Literal["full", "selective"] | None = option(
        None, "recompute activations in the backward pass"
    )
    recompute_method: Literal["uniform", "block"] | None = option(
        None, "with full recompute: uniform chunks of layers, or the first layers of each stage"
    )
    recompute_num_layers: int | None = option(
        None, "with full recompute: layers per chunk, or layers to recompute"
    )
    distributed_timeout_minutes: int = option(10, "minutes that a collective may wait")

    def __post_init__(self) -> None:
        require_positive(
            self, "tensor_model_parallel_size", "pipeline_model_parallel_size",
            "context_parallel_size", "num_layers_per_virtual_pipeline_stage",
            "recompute_num_layers", "distributed_timeout_minutes", "expert_model_parallel_size",
            "expert_tensor_parallel_size",
        )  # fmt: skip
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise UserError(
                "sequence_parallel: True needs tensor parallelism (raise "
                "tensor_model_parallel_size or drop it)"
            )
        if self.num_layers_per_virtual_pipeline_stage and self.pipeline_model_parallel_size == 1:
            raise UserError(
                "num_layers_per_virtual_pipeline_stage: "
                f"{self.num_layers_per_virtual_pipeline_stage!r} needs pipeline parallelism (raise "
                "pipeline_model_parallel_size or drop it)"
            )
        for name in ("fp8_format", "fp4_format"):
            if getattr(self, name) and not self.bf16:
                raise UserError(f"{name}: {getattr(self, name)!r} needs bf16 (set bf16)")
        if self.fp8_format and self.fp4_format:
            raise UserError(
                f"fp4_format: {self.fp4_format!r} and fp8_format exclude each other (drop one)"
            )
        if self.fp8_param_gather:
            raise UserError(
                "fp8_param_gather: True is refused: masters and u, which shares w's storage, would "
                "be wrong under weights kept in FP8 (drop it; fp8_format casts weights by itself)"
            )
        if self.overlap_param_gather and not (
            self.overlap_grad_reduce and self.use_distributed_optimizer
        ):
            raise UserError(
                "overlap_param_gather: True needs overlap_grad_reduce and "
                "use_distributed_optimizer (set both or drop it)"
            )
        if self.recompute_granularity == "full":
            self.recompute_method = self.recompute_method or "uniform"
            self.recompute_num_layers = self.recompute_num_layers or 1

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on one micro-batch together; the others are data-parallel."""
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        return tp * pp * self.context_parallel_size

    @property
    def expert_tp(self) -> int:
        """Ranks that share each expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    @property
    def low_precision(self) -> tuple[str, str] | None:
        """Which option has the layers' products in FP8 or FP4, and the recipe of their scales."""
        if self.fp4_format:
            return "fp4_format", "nvfp4"
        return ("fp8_format", self.fp8_recipe) if self.fp8_format else None

    @property
    def product_divisor(self) -> int:
        """What each side of a matrix product has to be a multiple of."""
        if self.low_precision is None:
            return 1
        return 32 if self.low_precision[1] in ("mxfp8", "nvfp4") else 16

    @property
    def length_divisor(self) -> int:
        """What a padded sequence has to be a multiple of: CP deals it in 2 · CP chunks."""
        cp, tp = self.context_parallel_size, self.tensor_model_parallel_size
        return (2 * cp if cp > 1 else 1) * (tp if self.sequence_parallel else 1)

    def group_sizes(self, num_layers: int) -> dict[str, Any]:
        """The sizes of Megatron's groups, as `parallel_state` takes them."""
        return {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": self.virtual_chunks(num_layers),
            "context_parallel_size": self.context_parallel_size,
            "expert_model_parallel_size": self.expert_model_parallel_size,
            "expert_tensor_parallel_size": self.expert_tensor_parallel_size,
        }

    def virtual_chunks(self, num_layers: int) -> int | None:
        """Virtual pipeline chunks per rank, or None without interleaving."""
        per_chunk = self.num_layers_per_virtual_pipeline_stage
        if per_chunk is None:
            return None
        per_stage, rest = divmod(num_layers, self.pipeline_model_parallel_size)
        if rest or per_stage % per_chunk or per_stage == per_chunk:
            raise UserError(
                f"num_layers_per_virtual_pipeline_stage: {per_chunk!r} does not split {num_layers} "
                f"layers over {self.pipeline_model_parallel_size} stages into two or more equal "
                "chunks each (choose a smaller divisor)"
            )
        return per_stage // per_chunk
