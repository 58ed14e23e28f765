"""ScaleBiO with Megatron-LM's own arguments, model, checkpoint, optimizer and learning rates.

    torchrun --nproc_per_node 8 examples/megatron_lm.py --use-checkpoint-args --load checkpoints \\
        --scalebio-sources math=data/math web=/corpora/web_text_document \\
        --scalebio-validation data/goal --train-iters 600 --micro-batch-size 4 \\
        --global-batch-size 128 --lr 1e-5 ...

Every flag that does not begin with scalebio or lisa is Megatron-LM's. docs/library.md tells what of
its training loop is kept here, and the flags that it needs without a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import argument_utils, arguments, checkpointing, initialize, training

from megatron_scalebio import BilevelOptions, BlendSampler, LisaOptions, MicroBatch, Picks, ScaleBiO
from megatron_scalebio.compat import megatron_lm


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    add = parser.add_argument_group("ScaleBiO").add_argument
    add("--scalebio-sources", nargs="+", required=True, type=name_and_path, metavar="NAME=PATH",
        help="prepared folders, or prefixes of .bin/.idx pairs")  # fmt: skip
    add("--scalebio-validation", required=True, metavar="PATH")
    add("--scalebio-alpha", type=float, default=BilevelOptions.alpha)
    add("--scalebio-blend", type=Path, default="blend.txt", help="file for the weights")
    add("--lisa-layers", type=int, help="layers that train at a time [all]")
    add("--lisa-interval", type=int, default=LisaOptions.interval)
    return parser


def name_and_path(entry: str) -> tuple[str, str]:
    name, path = entry.split("=", 1)
    return name, path


class Source:
    """Sequences of at most seq_length tokens and the token after; longer ones are cut into such."""

    def __init__(self, path: str, seq_length: int) -> None:
        prepared = (Path(path) / "tokens.idx").is_file()
        self.prefix = f"{path}/tokens" if prepared else path
        self.tokens = IndexedDataset(self.prefix)
        self.mask = IndexedDataset(f"{path}/loss_mask") if prepared else None
        self.seq_length = seq_length
        targets = self.tokens.sequence_lengths.astype(np.int64) - 1
        self.pieces = np.maximum(1, -(-targets // seq_length))  # of each sequence
        self.ends = np.cumsum(self.pieces)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def tokens_and_targets(self, index: int) -> np.ndarray:
        """[2, seq_length + 1]: ids, and 1 where one is to be predicted; zeros on the right."""
        at = int(np.searchsorted(self.ends, index, side="right"))
        start = int(index - self.ends[at] + self.pieces[at]) * self.seq_length
        length = min(self.seq_length + 1, int(self.tokens.sequence_lengths[at]) - start)
        rows = np.zeros((2, self.seq_length + 1), dtype=np.int64)
        rows[0, :length] = self.tokens.get(at, start, length)
        rows[1, :length] = 1 if self.mask is None else self.mask.get(at, start, length)
        return rows


def micro_batches(sources: list[Source], picks: Picks, micro_batch_size: int) -> list[MicroBatch]:
    """This data-parallel rank's share of a global batch."""
    share = len(picks.group_B) // parallel_state.get_data_parallel_world_size()
    first = share * parallel_state.get_data_parallel_rank()
    batches = []
    for start in range(first, first + share, micro_batch_size):
        mine = slice(start, start + micro_batch_size)
        pairs = zip(picks.group_B[mine], picks.index_B[mine], strict=True)
        rows = [sources[group].tokens_and_targets(index) for group, index in pairs]
        tokens_BS, targets_BS = torch.from_numpy(np.stack(rows, axis=1))
        batches.append(MicroBatch(
            tokens_BS=tokens_BS[:, :-1], labels_BS=tokens_BS[:, 1:],
            mask_BS=targets_BS[:, 1:].float(),
            positions_BS=torch.arange(tokens_BS.size(1) - 1).expand(len(rows), -1),
            group_B=torch.from_numpy(picks.group_B[mine]),  # each example's source
        ))  # fmt: skip
    return batches


def build(args: argparse.Namespace, names: list[str]) -> ScaleBiO:
    """w and u as Megatron-LM builds models, and w filled from --load."""
    # A step's coefficients are those of the global batch: Megatron must not divide once more.
    args.calculate_per_token_loss = True
    config = argument_utils.gpt_config_from_args(args)
    config.finalize()
    builder = config.get_builder_cls()(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    ddp = training.get_megatron_ddp_config(args)
    ddp.check_for_nan_in_grad = False  # for Megatron-LM's own loop; ScaleBiO leaves such a step out
    bio = ScaleBiO(
        BilevelOptions(alpha=args.scalebio_alpha), names,
        lambda **stage: builder.build_model(groups, **stage), ddp,
        training.get_megatron_optimizer_config(args)[0], seed=args.seed,
        lisa=LisaOptions(args.lisa_layers, args.lisa_interval) if args.lisa_layers else None,
    )  # fmt: skip
    if args.load:
        args.finetune = True  # the weights alone: no steps, optimizer or random numbers
        checkpointing.load_checkpoint(bio.w, None, None)  # u is on w's storage
    return bio


def main() -> None:
    megatron_lm.adapt()  # lets Megatron-LM run from a wheel, and without a GPU
    args = arguments.parse_and_validate_args(add_flags)
    if args.context_parallel_size > 1:
        raise SystemExit("--context-parallel-size: this example does not cut sequences for it")
    initialize.initialize_megatron(allow_no_cuda=not torch.cuda.is_available())
    names = [name for name, _ in args.scalebio_sources]
    sources = [Source(path, args.seq_length) for _, path in args.scalebio_sources]
    validation = [Source(args.scalebio_validation, args.seq_length)]
    bio = build(args, names)
    rates = SimpleNamespace(param_groups=[{}])  # in place of an optimizer
    schedule = training.get_optimizer_param_scheduler(rates)
    sampler = BlendSampler([len(each) for each in sources], args.global_batch_size, args.seed)
    asked = BlendSampler([len(validation[0])], args.global_batch_size, args.seed + 1)
    for _ in range(args.train_iters):
        picks = sampler.next(bio.weights)
        report = bio.step(
            micro_batches(sources, picks, args.micro_batch_size),
            micro_batches(validation, asked.next(np.ones(1)), args.micro_batch_size),
            lr=rates.param_groups[0]["lr"], inclusion=picks.inclusion_S,
        )  # fmt: skip
        schedule.step(args.global_batch_size)
        if report.step % args.log_interval == 0 or report.skipped:
            shares = " ".join(f"{n} {p:.3f}" for n, p in zip(names, bio.weights, strict=True))
            said = report.skipped or shares  # a step with NaN or a spike is not applied
            training.print_rank_0(f"step {report.step}  L1 {report.validation_loss:.3f}  {said}")

    learned = bio.intervals()
    for row in zip(names, learned.weight_S, learned.low_S, learned.high_S, strict=True):
        training.print_rank_0("{:<12} {:.9f}  [{:.3f}, {:.3f}]".format(*row))
    if dist.get_rank() == 0:  # Megatron-LM's data sets fail on weights that round to no sample
        kept = [(p, s) for p, s in zip(learned.weight_S, sources, strict=True) if p >= 1e-3]
        args.scalebio_blend.write_text(" ".join(f"{p:.6f} {s.prefix}" for p, s in kept) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
