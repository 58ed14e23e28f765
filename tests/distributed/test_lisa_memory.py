"""LISA's memory, counted exactly: every tensor that the twin, its DDP and its optimizers hold.

Storages are counted once, whoever views them. "Training state" is what exists because a parameter
trains: gradient buffers, fp32 masters, Adam moments.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_scalebio.core.lisa import active_layers
from tests.distributed.harness import run_distributed
from tests.markov import VOCAB, write_source

pytestmark = pytest.mark.distributed

LAYERS, ACTIVE, PERIODS = 12, 2, 8
# Adam's step counters, buffers padded for the distributed optimizer.
SLACK = 0.02


def load(folder: Path, lisa: bool, bf16: bool, distributed: bool):
    from megatron_scalebio import runtime
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.scalebio import TrainState

    names = ("a", "b", "validation")
    entries = [{"name": name, "path": str(folder / name)} for name in names]
    settings = {
        "data": {"seq_length": 8, "sources": entries[:2], "validation": entries[2:]},
        "model": {"num_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 2},
        "parallel": {"bf16": bf16, "use_distributed_optimizer": distributed},
        "lisa": {"lisa_layers": ACTIVE, "lisa_interval": 2} if lisa else {},
        "train": {"micro_batch_size": 2, "global_batch_size": 2},
    }
    config = load_config(None, settings)
    config.validate(torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    runtime.start(config)
    return TrainState(config, folder / "cache")


def total_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind tensors, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    storages.pop(0, None)
    return sum(storages.values())


class PeakBytes(TorchDispatchMode):
    """Most bytes alive at once of the storages that operations make within."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._alive: dict[int, tuple[int, weakref.ref]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._alive:
                    self._enter(storage)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        end = weakref.ref(storage, lambda _: self._leave(key))
        self._alive[key] = (storage.nbytes(), end)
        self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)

    def _leave(self, key: int) -> None:
        self._now -= self._alive.pop(key)[0]


def weights(state) -> list[torch.Tensor]:
    return [
        p.data
        for model in (state.training.w, state.training.u)
        for chunk in model
        for p in chunk.parameters()
    ]


def training_state(state) -> list[torch.Tensor]:
    """Gradient buffers, masters and Adam moments of w and u, without the weights themselves."""
    period = state.training.period
    tensors = []
    for ddp in (*period.ddp["w"], *period.ddp["u"]):
        for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers):
            tensors.append(buffer.grad_data)
    for optimizer in period.optimizers.values():
        for part in optimizer.chained_optimizers:
            if part.is_stub_optimizer:
                continue
            for group in part.optimizer.param_groups:
                tensors += group["params"]
            for moments in part.optimizer.state.values():
                tensors += [m for m in moments.values() if isinstance(m, torch.Tensor)]
    held = {t.untyped_storage().data_ptr() for t in weights(state)}
    return [t for t in tensors if t.untyped_storage().data_ptr() not in held]


def trainable(state) -> int:
    """Trainable parameters of w."""
    return sum(
        p.numel() for chunk in state.training.w for p in chunk.parameters() if p.requires_grad
    )


def live_bytes() -> int:
    """Bytes of all tensors alive in this process, after a collection."""
    import gc

    gc.collect()
    return total_bytes(o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter))


def with_both_optimizers(folder: str, bf16: bool) -> None:
    for distributed in (False, True):
        memory_follows_the_active_layers(folder, bf16, distributed)


def memory_follows_the_active_layers(folder: str, bf16: bool, distributed: bool) -> None:
    from megatron.core.utils import unwrap_model

    from megatron_scalebio.methods.scalebio import train_step

    full = load(Path(folder), False, bf16, distributed)
    one_model = sum(p.nbytes for chunk in full.training.w for p in chunk.parameters())
    train_step(full)
    full_bytes, full_count = total_bytes(training_state(full)), trainable(full)
    full.training.leave_period()

    with PeakBytes() as built:
        state = load(Path(folder), True, bf16, distributed)
    # Each tensor is drawn in fp32 before its shard is kept; u's are made one at a time.
    assert one_model < built.peak < 1.25 * one_model, (built.peak, one_model)
    for chunk_w, chunk_u in zip(state.training.w, state.training.u, strict=True):
        same_buffers(unwrap_model(chunk_w), unwrap_model(chunk_u))
    assert total_bytes(weights(state)) == one_model, "u takes memory before it trains"
    ratio, alive = [], []
    for _ in range(2 * PERIODS):
        train_step(state)
        ratio.append(total_bytes(training_state(state)) / full_bytes)
        share = trainable(state) / full_count
        assert share < 0.5
        assert abs(ratio[-1] / share - 1) < SLACK, (ratio[-1], share)
        untouched_layers_are_shared(state)
        alive.append(live_bytes() - bits_at_rest(state, bf16))
    assert max(ratio) < 1.001 * min(ratio)
    assert max(alive[1:]) <= 1.01 * alive[0], alive


def bits_at_rest(state, bf16: bool) -> int:
    """Of bf16 masters, 16 bits are kept of each weight that has trained and rests."""
    from megatron_scalebio.core import low_bits

    lisa, training = state.training.lisa, state.training
    seed, before = training._seed, range(training.period_number)
    draws = [active_layers(lisa, LAYERS, 1, 1, period, seed) or [] for period in before]
    rest = {layer for draw in draws for layer in draw} - set(training.active_layers)
    [chunk] = training.w
    layers = chunk.module.decoder.layers if bf16 else []
    bytes_of = [2 * sum(p.numel() for p in layers[n].parameters()) for n in rest if bf16]
    kept = [low_bits.kept(p) for chunks in training.models.values() for c in chunks
            for p in c.parameters()]  # fmt: skip
    assert total_bytes(each.bits for each in kept if each) == sum(bytes_of)
    return sum(bytes_of)


def same_buffers(w, u) -> None:
    """What is not a parameter is u's own and equal: rotary frequencies, and buffers if any."""
    pairs = [(w.rotary_pos_emb.inv_freq, u.rotary_pos_emb.inv_freq)]
    pairs += zip(w.buffers(), u.buffers(), strict=True)
    for of_w, of_u in pairs:
        assert of_u.device.type == "cpu" and of_w.equal(of_u)
        assert of_w.data_ptr() != of_u.data_ptr()


def untouched_layers_are_shared(state) -> None:
    """What does not train in u is w's own storage, except what trained in an earlier period."""
    for chunk_w, chunk_u in zip(state.training.w, state.training.u, strict=True):
        for p_w, p_u in zip(chunk_w.parameters(), chunk_u.parameters(), strict=True):
            assert p_w.requires_grad == p_u.requires_grad
            assert (p_w.data_ptr() == p_u.data_ptr()) == (not p_w.requires_grad)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lisa-memory")
    for name in ("a", "b", "validation"):
        rows = np.random.default_rng(3).integers(VOCAB, size=(20, 9))
        write_source(folder, name, list(rows))
    return folder


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_lisa_memory_follows_the_active_layers(folder: Path, bf16: bool) -> None:
    run_distributed(with_both_optimizers, 1, str(folder), bf16)
