"""Amax histories and scales of FP8: `_extra_state` of Transformer Engine's modules, pickled bytes.

Transformer Engine unpickles what it is given. A checkpoint may come from anywhere, so that nothing
reaches a module before its bytes have been read as data.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_scalebio.errors import UserError

_SUFFIX = "_extra_state"
_RECIPES = "transformer_engine.common.recipe"


def is_kept(entry: Any) -> bool:
    """Whether an entry of a model's sharded state is FP8 state: without FP8 it is empty."""
    held = entry.data if isinstance(entry, ShardedObject) else None
    return isinstance(held, torch.Tensor) and held.numel() > 0


def refuse_code(model: dict[str, Any]) -> None:
    """Looks through a model's loaded state.

    Raises:
        UserError: if FP8 state names anything but tensors and recipes.
    """
    for key, value in model.items():
        if key.endswith(_SUFFIX) and value is not None:
            _read(key, value)


def drop(model: dict[str, Any]) -> None:
    """Takes FP8 state out of a model's loaded state: its modules collect their own."""
    for key in model:
        if key.endswith(_SUFFIX):
            model[key] = None


def _read(key: str, value: Any) -> None:
    name = key
    if isinstance(value, torch.Tensor):
        if value.numel() == 0:
            return
        reader = _Reader(io.BytesIO(value.detach().cpu().numpy().tobytes()))
        try:
            reader.load()
            return
        except Exception as error:  # noqa: BLE001  damaged bytes can raise anything
            name = f"{key}: {error}"
    raise UserError(
        "holds FP8 state that is not plain data", where=name,
        mend="use a checkpoint from a source you trust",
    )  # fmt: skip


class _Data:
    """Stands for whatever a pickle makes; does nothing."""

    def __new__(cls, *args: Any) -> _Data:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Reader(pickle.Unpickler):
    """Knows the names in what `get_extra_state` of Transformer Engine 1 and 2 writes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _read_storage
        if (module, name) in {
            ("torch._utils", "_rebuild_tensor_v2"),
            ("collections", "OrderedDict"),
        } or (module == _RECIPES and name.isidentifier()):
            return _Data
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
