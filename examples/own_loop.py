"""ScaleBiO in a training loop of one's own: a Megatron-Core GPT, two data-parallel ranks.

    make demo                    prepares the data, in demo-run/data
    OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc_per_node 2 examples/own_loop.py demo-run/data

docs/library.md tells what each object is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from megatron_scalebio import BilevelOptions, BlendSampler, MicroBatch, Picks, ScaleBiO
from megatron_scalebio.compat import adapt

NAMES = ["english", "code", "shuffled", "noise"]
VOCABULARY, LENGTH, BATCH = 1024, 32, 48


def provider(pre_process: bool, post_process: bool, vp_stage: int | None = None) -> GPTModel:
    """Called for w, and again for u."""
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=192,
        normalization="RMSNorm", gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,  # the step's coefficients are those of the global batch
    )  # fmt: skip
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    return GPTModel(
        config, layer, VOCABULARY, LENGTH, pre_process, post_process,
        share_embeddings_and_output_weights=True, position_embedding_type="rope", vp_stage=vp_stage,
    )  # fmt: skip


def micro_batch(sets: list[IndexedDataset], picks: Picks) -> MicroBatch:
    """This data-parallel rank's share of a global batch."""
    share = len(picks.group_B) // parallel_state.get_data_parallel_world_size()
    first = share * parallel_state.get_data_parallel_rank()
    mine = slice(first, first + share)
    pairs = zip(picks.group_B[mine], picks.index_B[mine], strict=True)
    rows = [np.asarray(sets[group][index], dtype=np.int64) for group, index in pairs]
    tokens_BS = np.stack([np.pad(row, (0, LENGTH + 1 - len(row))) for row in rows])
    targets_BS = np.arange(LENGTH) < np.array([[len(row) - 1] for row in rows])
    return MicroBatch(
        tokens_BS=torch.from_numpy(tokens_BS[:, :-1]), labels_BS=torch.from_numpy(tokens_BS[:, 1:]),
        mask_BS=torch.from_numpy(targets_BS).float(),
        positions_BS=torch.arange(LENGTH).expand(len(rows), -1),
        group_B=torch.from_numpy(picks.group_B[mine]),  # each example's source
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--load", help="a Megatron checkpoint to start from")
    args = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    adapt()  # lets Megatron-Core run without a GPU
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)

    bio = ScaleBiO(
        BilevelOptions(), NAMES, provider,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True),
        OptimizerConfig(optimizer="adam", lr=1.5e-3, adam_beta2=0.95, weight_decay=0.0),
    )  # fmt: skip
    if args.load:
        [gpt] = bio.w
        loaded = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, args.load)
        gpt.load_state_dict(loaded["model"])  # u shares w's storage until it departs from it
    sources = [IndexedDataset(str(args.data / name / "tokens")) for name in NAMES]
    validation = [IndexedDataset(str(args.data / "validation" / "tokens"))]
    sampler = BlendSampler([len(source) for source in sources], BATCH, seed=1234)
    asked = BlendSampler([len(validation[0])], BATCH, seed=1235)
    for step in range(args.steps):
        picks = sampler.next(bio.weights)
        report = bio.step(
            [micro_batch(sources, picks)], [micro_batch(validation, asked.next(np.ones(1)))],
            lr=1.5e-3, inclusion=picks.inclusion_S,
        )  # fmt: skip
        if dist.get_rank() == 0 and (step + 1) % 50 == 0:
            shares = " ".join(f"{n} {p:.3f}" for n, p in zip(NAMES, bio.weights, strict=True))
            print(f"step {report.step}  L1 {report.validation_loss:.3f}  {shares}", flush=True)
    if dist.get_rank() == 0:
        learned = bio.intervals()
        for row in zip(NAMES, learned.weight_S, learned.low_S, learned.high_S, strict=True):
            print("{:<9} {:.7f}  [{:.3f}, {:.3f}]".format(*row))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
