"""An ordinary Megatron-Core training step, to compare with: one model, DDP, Adam, one flush."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_scalebio import runtime
from megatron_scalebio.compat.transformer_engine import fuse_weight_gradients
from megatron_scalebio.config import Config
from megatron_scalebio.data.batch import MicroBatch
from megatron_scalebio.model.init import initialize_weights
from megatron_scalebio.model.provider import build_model
from megatron_scalebio.model.settings import transformer_config


class PlainTraining:
    """Trains one model of the same shape on micro-batches that it is given."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        self.micro_batch_size = config.train.micro_batch_size
        megatron = transformer_config(config)
        [chunk] = build_model(config, megatron, vocab_size)
        initialize_weights([chunk], config.train.seed, 0.02, config.model.num_layers)
        fuse_weight_gradients([chunk], True)
        megatron.finalize_model_grads_func = finalize_model_grads
        self.ddp = DistributedDataParallel(
            megatron, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk
        )
        settings = OptimizerConfig(
            optimizer="adam",
            lr=config.optimizer.lr,
            weight_decay=config.optimizer.weight_decay,
            adam_beta2=config.optimizer.adam_beta2,
            clip_grad=config.optimizer.clip_grad,
            bf16=config.parallel.bf16,
            params_dtype=torch.bfloat16 if config.parallel.bf16 else torch.float32,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.ddp])

    def step(self, batches: list[MicroBatch]) -> None:
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(batches),
            model=[self.ddp],
            num_microbatches=len(batches),
            seq_length=batches[0].tokens_BS.shape[1],
            micro_batch_size=self.micro_batch_size,
        )
        self.optimizer.step()


def _forward_step(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Any, Any]:
    batch = next(batches)
    return model(**batch.inputs(runtime.device())), partial(_loss_func, batch)


def _loss_func(batch: MicroBatch, loss_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    loss = (loss_BS.float() * batch.mask_BS.to(loss_BS.device)).sum()
    return loss, batch.mask_BS.sum().int().to(loss_BS.device), {"loss": loss.detach()}
