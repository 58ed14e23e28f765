"""One rank's step, rehearsed: the real builders, period and pipeline flush on shapes alone.

    as_rank(rank) ─▶ build_twins ─▶ set_trainable ─▶ Period ─▶ flush     as TrainState does
                                                            │         │
                                                   holdings ◀         ▶ Ledger

The flush is cut to as many micro-batches as fill the pipeline: more change nothing but time.
"""

import math
from collections import Counter
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model

from megatron_scalebio.config import Config
from megatron_scalebio.core.batch import MicroBatch, gpt_losses
from megatron_scalebio.core.flush import Pass, flush
from megatron_scalebio.core.lisa import set_trainable
from megatron_scalebio.core.period import Period
from megatron_scalebio.core.twin import build_twins
from megatron_scalebio.errors import UserError
from megatron_scalebio.mixture.objective import Role
from megatron_scalebio.model.init import seed_generators
from megatron_scalebio.model.provider import model_provider, padded_vocab_size
from megatron_scalebio.model.settings import ddp_config, optimizer_config
from megatron_scalebio.plan.experts import balanced_experts
from megatron_scalebio.plan.fake_rank import META, as_rank, group_kinds
from megatron_scalebio.plan.holdings import FP8_COPIES, fp8_copies, holdings
from megatron_scalebio.plan.kernels import kernels_of, on_shapes, settings_for
from megatron_scalebio.plan.layout import Layout
from megatron_scalebio.plan.ledger import Ledger

ROLE_NAMES = {Role.TRAIN_U: "u train", Role.TRAIN_W: "w train", Role.VALID_W: "w validation"}

PER_PASS = ("TP", "CP", "EP", "PP")


@dataclass(frozen=True)
class StageMemory:
    """What the ranks of one pipeline stage hold and do; they are alike.

    Attributes:
        held_bytes: weights, gradients and optimizer state by kind (`holdings.KINDS`).
        parameters, trainable, layer_parameters: of w on one rank, those that train, of the largest
            layer.
        activation_bytes: what is kept for backward passes when it is most, by role, with "logits"
            and "pipeline" (received and not yet used up) apart.
        workspace_bytes: what a flush takes above these two when it takes most.
        communication_bytes: buffers that collectives keep.
        flops_per_pass: of the model's matrix products, one micro-batch forward and backward, mean
            over the roles, recomputation included.
        sent_per_pass_bytes: "TP", "CP", "EP" and "PP" traffic of a micro-batch.
        sent_per_step_bytes: "DP" and other traffic of a step.
        messages: the pipeline's sends and receives in their order.
    """

    stage: int
    active_layers: tuple[int, ...]
    layers: tuple[int, ...]
    parameters: int
    trainable: int
    layer_parameters: int
    held_bytes: dict[str, int]
    activation_bytes: dict[str, int]
    workspace_bytes: int
    communication_bytes: int
    flops_per_pass: float
    sent_per_pass_bytes: dict[str, int]
    sent_per_step_bytes: dict[str, int]
    messages: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def total_bytes(self) -> int:
        held = sum(self.held_bytes.values()) + sum(self.activation_bytes.values())
        return held + self.workspace_bytes + self.communication_bytes


def rehearse(config: Config, layout: Layout, stage: int, active: list[int] | None) -> StageMemory:
    """The first rank of a pipeline stage, with the given layers (from 0; None: all) active.

    Raises:
        UserError: where Megatron refuses the layout or the shapes.
    """
    ledgers: list[Ledger] = []
    rank = stage * layout.tp * layout.cp * layout.dp
    plain = on_shapes(config)
    with (
        as_rank(config, rank, layout.world, lambda *m: ledgers[0].on_message(*m)),
        kernels_of(config, layout.gpu.cuda),
        balanced_experts(),
    ):
        memory, models = _rehearse(plain, layout, stage, active, ledgers)
        if config.parallel.low_precision:
            _, recipe = config.parallel.low_precision
            memory.held_bytes[FP8_COPIES] = fp8_copies(models, recipe)
    return memory


def _rehearse(
    config: Config, layout: Layout, stage: int, active: list[int] | None, ledgers: list[Ledger]
) -> tuple[StageMemory, list[list[torch.nn.Module]]]:
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    try:
        megatron = settings_for(config, layout.gpu.cuda)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        seed_generators(config.train.seed)
        with META:
            w, u = build_twins(model_provider(config, megatron, vocab_size), groups)
    except (AssertionError, ValueError) as error:  # how Megatron-Core refuses a layout
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{layout}: Megatron-Core refuses it: {reason}") from error
    for chunks in (w, u):
        set_trainable(chunks, active, config.lisa.options())
    ledger = Ledger(group_kinds(), padded_vocab_size(config, vocab_size) // layout.tp)
    ledgers.append(ledger)
    passes = _passes(config, layout)
    roles = {id(each.batch): each.role for each in passes}

    def losses(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        ledger.begin(ROLE_NAMES[roles[id(batch)]])
        return gpt_losses(model, batch)

    period = Period(ddp_config(config), optimizer_config(config), w, u, losses)
    held, tensors = holdings(w, u, period)
    buffers = [b for model in (w, u) for chunk in model for b in chunk.buffers()]
    ledger.ignore([*tensors, *buffers])
    with ledger:
        flush(period.twins, passes, groups)
        ledger.begin("")
        flush_sent = Counter(ledger.sent_bytes)
        if config.parallel.use_distributed_optimizer:  # what follows the optimizers' step
            for ddp in (ddp for ddps in period.ddp.values() for ddp in ddps):
                ddp.start_param_sync(force_sync=True)
    communication = _keep_buffers(ledger.held)
    per_step = ledger.sent_bytes - flush_sent
    per_step.update({link: n for link, n in flush_sent.items() if link not in PER_PASS})
    parameters = [p for chunk in w for p in chunk.parameters()]
    layers = [layer for chunk in w for layer in unwrap_model(chunk).decoder.layers]
    numbers = sorted(layer.layer_number - 1 for layer in layers)
    memory = StageMemory(
        stage=stage,
        layers=tuple(numbers),
        active_layers=tuple(n for n in numbers if active is None or n in active),
        parameters=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        layer_parameters=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        held_bytes=held,
        activation_bytes={kind: n for kind, n in ledger.held.items() if n},
        workspace_bytes=ledger.peak_bytes - ledger.held.total() - communication,
        communication_bytes=communication,
        flops_per_pass=ledger.flops / len(passes),
        sent_per_pass_bytes={k: flush_sent[k] // len(passes) for k in PER_PASS},
        sent_per_step_bytes=dict(per_step),
        messages=tuple(ledger.messages),
    )
    return memory, [w, u]


def _passes(config: Config, layout: Layout) -> list[Pass]:
    """A step's passes on full sequences, each a batch of its own; as many as fill the pipeline."""
    train, validation = layout.shortest_flush()
    here = config.data.seq_length // layout.cp  # of each sequence
    shape = (config.train.micro_batch_size, here)
    ids_BS = torch.zeros(shape, dtype=torch.int64)
    group_B = torch.zeros(shape[0], dtype=torch.int64)
    batch = MicroBatch(ids_BS, ids_BS, torch.ones(shape), ids_BS, group_B, math.prod(shape))
    roles = [Role.TRAIN_U, Role.TRAIN_W] * train + [Role.VALID_W] * validation
    one_B = torch.ones(shape[0], dtype=torch.float64)
    return [Pass(role, replace(batch), one_B, one_B) for role in roles]


def _keep_buffers(held: Counter[str]) -> int:
    """Takes Megatron's lasting communication buffers out of the activations; their bytes."""
    buffers = parallel_state.get_global_memory_buffer().buffer.values()
    size = sum(buffer.nbytes for buffer in buffers if buffer.device.type == "meta")
    first = ROLE_NAMES[Role.TRAIN_U]  # its pass was the first to need them
    taken = min(size, held[first])
    held[first] -= taken
    return taken
