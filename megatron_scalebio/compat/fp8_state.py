"""Amax histories and scales of FP8: `_extra_state` of Transformer Engine's modules, pickled bytes.

Transformer Engine unpickles what it is given. A checkpoint may come from anywhere, so that nothing
reaches a module before its bytes have been read with stand-ins for all that they name. A stand-in
takes attributes as what it stands for does: a call that the bytes arrange is made here too, on
something harmless.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject

from megatron_scalebio.errors import UserError

_SUFFIX = "_extra_state"
_RECIPES = "transformer_engine.common.recipe"
# In what `get_extra_state` of Transformer Engine 1 and 2 writes, beside functions.
_CLASSES = {
    (_RECIPES, name) for name in (
        "DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling",
        "Format", "_FormatHelper", "MMParams", "QParams",
    )
} | {("megatron.core.extensions.transformer_engine", "TEDelayedScaling")}  # fmt: skip


def is_fp8_state(key: str) -> bool:
    """Whether a key of a model's state is FP8 state's."""
    return key.endswith(_SUFFIX)


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
        if is_fp8_state(key) and value is not None:
            _read(key, value)


def move_scales(source: torch.nn.Module, target: torch.nn.Module, share: float) -> None:
    """Moves a module's scales and amax histories towards another's, where both have delayed ones.

    In place: Transformer Engine keeps them in lists of its own.
    """
    for key in ("scaling_fwd", "scaling_bwd"):
        theirs: Any = getattr(source, "fp8_meta", {}).get(key)
        ours: Any = getattr(target, "fp8_meta", {}).get(key)
        if hasattr(theirs, "amax_history") and hasattr(ours, "amax_history"):
            for held, wanted in (
                (ours.scale, theirs.scale), (ours.amax_history, theirs.amax_history)
            ):  # fmt: skip
                held.copy_(wanted if share == 1.0 else held.lerp(wanted, share))


def drop(model: dict[str, Any]) -> None:
    """Takes FP8 state out of a model's loaded state: its modules collect their own."""
    for key in model:
        if is_fp8_state(key):
            model[key] = None


def _read(key: str, value: Any) -> None:
    try:
        if value.numel():
            state = _Reader(io.BytesIO(value.detach().cpu().numpy().tobytes())).load()
            if _holds_function(state):
                raise pickle.UnpicklingError("it keeps a function")
    except Exception as error:  # noqa: BLE001  damaged bytes can raise anything
        raise UserError(
            f"{key}: {error}: holds FP8 state that is not plain data (use a checkpoint from a "
            "source you trust)"
        ) from None


class _Sealed(type):
    """Classes to which a pickle can't give attributes."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it sets {name} of a class")


class _Object(metaclass=_Sealed):
    """An object of any of the classes."""

    def __new__(cls, *args: Any) -> _Object:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None: ...


class _Function:
    """A function that a pickle can call, and give no attributes."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a function")


def _load_storage(data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001  damaged bytes can raise anything
        raise pickle.UnpicklingError(
            "it holds bytes in a tensor's place that are not one"
        ) from None


_FUNCTIONS = {
    ("torch.storage", "_load_from_bytes"): _Function(_load_storage),
    # Megatron-Core puts it in that one's place.
    ("megatron.core.safe_globals", "safe_load_from_bytes"): _Function(_load_storage),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(lambda *args: None),
    ("collections", "OrderedDict"): _Function(OrderedDict),
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _CLASSES:
            return _Object
        if (module, name) in _FUNCTIONS:
            return _FUNCTIONS[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _holds_function(value: Any) -> bool:
    """Whether one is left in what was read, for later code to call."""
    left, seen = [value], set()
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, _Function | type):
            return True
        if isinstance(each, _Object):
            left.append(vars(each))
        elif isinstance(each, dict):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            left += each
    return False
