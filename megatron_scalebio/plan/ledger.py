"""Keeps account of what torch does: live bytes by kind, arithmetic and traffic.

A storage is counted once, when an operation first returns it, and struck off when it dies. Its kind
is what was going on then: the forward pass of a role, or "workspace" (the backward pass, with what
it recomputes). Tensors as wide as the vocabulary are "logits", received ones "pipeline".
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

WORKSPACE, LOGITS, PIPELINE = "workspace", "logits", "pipeline"


class Ledger(TorchDispatchMode):
    """Counts within `with ledger:`.

    Args:
        links: parallelism by the name of its process group.
        vocab_shard: width of this rank's logits.
    """

    def __init__(self, links: dict[str, str], vocab_shard: int) -> None:
        super().__init__()
        self.kind = WORKSPACE
        self.live: Counter[str] = Counter()  # bytes by kind
        self.peak_bytes = 0
        self.held: Counter[str] = Counter()  # most bytes held for a backward pass, by kind
        self.flops = 0.0
        # What leaves the rank with ring algorithms, by "TP", "CP", "EP", "PP", "DP" or "other".
        self.sent_bytes: Counter[str] = Counter()
        self.messages: list[tuple[str, tuple[int, ...]]] = []
        self._links, self._vocab_shard = links, vocab_shard
        # By storage: kind, bytes, and what keeps the storage or tells of its end.
        self._seen: dict[int, tuple[str, int, Any]] = {}
        self._total = 0
        self._in_backward = False

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leaves out tensors that are accounted for elsewhere, with what views them."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self._seen:
                self._strike(key)
            self._seen[key] = (WORKSPACE, 0, tensor.untyped_storage())

    def begin(self, kind: str) -> None:
        """The forward pass of a micro-batch of this kind begins."""
        self.sample_held()
        self._in_backward = False
        self.kind = kind

    def sample_held(self) -> None:
        """Between passes: what is alive is held for backward passes."""
        if self._in_backward:
            return
        held = self.live - Counter({WORKSPACE: self.live[WORKSPACE]})
        if held.total() > self.held.total():
            self.held = held

    def on_message(self, name: str, tensor: torch.Tensor) -> None:
        """A pipeline message: the wire of `fake_rank.as_rank`."""
        self.messages.append((name, tuple(tensor.shape)))
        if name.startswith("send"):
            self.sent_bytes["PP"] += tensor.nbytes
        else:
            key = tensor.untyped_storage()._cdata
            if key in self._seen:
                self._strike(key)
                self._enter(tensor.untyped_storage(), PIPELINE)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            return self._collective(func, args)
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._in_backward:
            self.sample_held()
            self._in_backward = True
        out = func(*args, **(kwargs or {}))
        count: Any = flop_registry.get(func._overloadpacket)
        attention: Any = _ATTENTION.get(func._overloadpacket)
        if attention is not None:
            self.flops += attention(*args)
        elif count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, WORKSPACE if in_backward else self.kind)
        return out

    def _count(self, tensor: torch.Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen or tensor.device.type != "meta":
            return
        if tensor.ndim > 1 and tensor.shape[-1] == self._vocab_shard and kind != WORKSPACE:
            kind = LOGITS
        self._enter(storage, kind)

    def _enter(self, storage: torch.UntypedStorage, kind: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen[key] = (kind, size, weakref.ref(storage, lambda _: self._strike(key)))
        self.live[kind] += size
        self._total += size
        self.peak_bytes = max(self.peak_bytes, self._total)

    def _strike(self, key: int) -> None:
        kind, size, _ = self._seen.pop(key, (WORKSPACE, 0, None))
        self.live[kind] -= size
        self._total -= size

    def _collective(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Counts what a ring algorithm sends, and answers as if it were done."""
        work = FakeWork().boxed()
        name = func._overloadpacket.__name__
        if name != "barrier":
            group = next(ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            whole = max(_bytes(a) for a in args)
            rounds = 2 if name.startswith("allreduce") else 1
            sent = rounds * whole * (group.size() - 1) / group.size()
            self.sent_bytes[self._links.get(group.group_name, "other")] += int(sent)
        return work if len(func._schema.returns) == 1 else (args[0], work)


def _bytes(argument: Any) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(_bytes, argument)) if isinstance(argument, (list, tuple)) else 0


def _attention_flops(products: float, query: torch.Tensor, key: torch.Tensor) -> float:
    """FLOPs of causal attention: `products` matrix products over the scores that count.

    The queries are the last positions of the keys': all of them without context parallelism.
    """
    batch, heads, length, width = query.shape
    return products * 2 * batch * heads * length * (key.shape[2] - length / 2) * width


def _forward(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> float:
    return _attention_flops(2, query, key)


def _backward(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *rest: Any) -> float:
    return _attention_flops(5, query, key)  # the scores once more, and four gradients


_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_backward: _backward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
