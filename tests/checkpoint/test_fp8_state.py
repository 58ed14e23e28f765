"""FP8 state in checkpoints. Transformer Engine needs a GPU: what it saves has a double."""

from __future__ import annotations

import enum
import importlib
import io
import json
import os
import pickle
import sys
import types
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from megatron_scalebio.compat import fp8_state
from megatron_scalebio.core.state import load_models
from megatron_scalebio.errors import UserError
from tests.commands import command, metrics, note, noted
from tests.distributed.harness import run_distributed
from tests.markov import write_two_sources

RECIPES = "transformer_engine.common.recipe"
KEY = "decoder.layers.0.self_attention.linear_qkv._extra_state"
PP2, TP2 = ["--pipeline-model-parallel-size", 2], ["--tensor-model-parallel-size", 2]
FLAGS = ["--lisa-layers", 1, "--lisa-interval", 4]


# ---- what may be read ------------------------------------------------------------------------


def as_bytes(state: object) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(pickle.dumps(state), dtype=np.uint8).copy())


class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float


class Format(enum.Enum):
    HYBRID = _FormatHelper(max_fwd=448, max_bwd=57344)


@dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True


@dataclass
class DelayedScaling:
    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: MMParams = MMParams()
    amax_history_len: int = 1024


@dataclass
class TEDelayedScaling(DelayedScaling):
    """Megatron's own, which its layers keep."""


TEDelayedScaling.__module__ = "megatron.core.extensions.transformer_engine"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> DelayedScaling:
    """A recipe that pickles under the names that Transformer Engine's have."""
    module = types.ModuleType(RECIPES)
    for made in (_FormatHelper, Format, MMParams, DelayedScaling):
        monkeypatch.setattr(made, "__module__", RECIPES)
        setattr(module, made.__name__, made)
    parts = RECIPES.split(".")
    for end in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:end]))
        monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, RECIPES, module)
    return DelayedScaling()


@pytest.mark.parametrize("of_megatron", [False, True])
def test_what_transformer_engine_writes_is_read(
    recipe: DelayedScaling, of_megatron: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if of_megatron:
        module = importlib.import_module(TEDelayedScaling.__module__)
        monkeypatch.setattr(module, "TEDelayedScaling", TEDelayedScaling)
    state = {
        "recipe": TEDelayedScaling() if of_megatron else recipe,
        "scale_fwd": torch.ones(3), "amax_history_fwd": torch.rand(1024, 3),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1},
    }  # fmt: skip
    fp8_state.refuse_code({KEY: as_bytes(state), "decoder.weight": torch.ones(2)})
    fp8_state.refuse_code({KEY: torch.empty(0, dtype=torch.uint8), "core._extra_state": None})


class Run:
    """Pickles into a call of the system's shell."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 3",)


class Nested:
    """Hides one in the bytes of a tensor's storage, which torch unpickles without care."""

    def __reduce__(self) -> Any:
        inner = io.BytesIO()
        torch.save(Run(), inner)
        return torch.storage._load_from_bytes, (inner.getvalue(),)


def build_twice() -> torch.Tensor:
    """An object that is given `__setstate__`, and then a state: bytes for torch to unpickle."""
    inner = io.BytesIO()
    torch.save(Run(), inner)
    stream = io.BytesIO()
    writer = pickle._Pickler(stream, 3)  # type: ignore[attr-defined]  the one in Python
    writer.write(pickle.PROTO + bytes([3]))
    writer.save(OrderedDict)
    writer.write(pickle.EMPTY_TUPLE + pickle.REDUCE)
    writer.save({"__setstate__": torch.storage._load_from_bytes})
    writer.write(pickle.BUILD)
    writer.save(inner.getvalue())
    writer.write(pickle.BUILD + pickle.STOP)
    return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)


@pytest.mark.parametrize(
    "state",
    [as_bytes({"recipe": Run()}), as_bytes({"scale_fwd": Nested()}), as_bytes({})[:-3],
     as_bytes({"recipe": getattr}), io.BytesIO(b""), build_twice(),
     as_bytes({"amax_compute_algo": torch.storage._load_from_bytes})],
    ids=["call", "nested", "cut off", "name", "stream", "attribute", "kept function"],
)  # fmt: skip
def test_code_is_refused_by_key(state: object) -> None:
    with pytest.raises(UserError, match="not plain data") as refused:
        fp8_state.refuse_code({KEY: state})
    assert KEY in str(refused.value) and "\n" not in str(refused.value)


def test_state_that_is_dropped_is_not_looked_at() -> None:
    model: dict[str, Any] = {KEY: as_bytes(Run()), "decoder.weight": torch.ones(2)}
    fp8_state.drop(model)
    assert model[KEY] is None
    assert model["decoder.weight"] is not None


class Careful(torch.nn.Linear):
    """Takes FP8 state as Transformer Engine 2.20 does: where it is told that it may."""

    taken: torch.Tensor | None = None

    def get_extra_state(self) -> torch.Tensor:
        return as_bytes({"scale_fwd": torch.ones(3)})

    def set_extra_state(self, state: torch.Tensor) -> None:
        assert os.environ.get("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE") == "1"
        self.taken = state


@pytest.mark.parametrize("before", [None, "0"])
def test_state_that_was_looked_through_is_taken(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    monkeypatch.delenv(name, raising=False)
    if before:
        monkeypatch.setenv(name, before)
    layer = Careful(2, 2)
    load_models([layer], {"model": dict(layer.state_dict())})
    assert layer.taken is not None and os.environ.get(name) == before


def test_a_model_lacks_no_state_but_fp8_state() -> None:
    """Layers of another implementation keep it in modules of their own."""
    layer = Careful(2, 2)
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    layer._fp8_copies_of = (object(), 3)  # type: ignore[assignment]
    load_models([layer], {"model": dict(weights)})
    assert layer.taken is None and layer.weight.sum() == 4
    assert layer._fp8_copies_of == (None, 0), "copies are of the weights of before"
    with pytest.raises(AssertionError, match="bias"):
        load_models([layer], {"model": {"weight": weights["weight"]}})


# ---- runs that keep one ----------------------------------------------------------------------


def collect_amax() -> None:
    """Has Megatron's linear layers keep a history of their inputs, and save it pickled."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    forward = ColumnParallelLinear.forward

    def collecting(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not kwargs:  # those are for the output layer, which is never in FP8
            history = getattr(self, "history", torch.zeros(64))
            self.history = torch.cat([history[1:], hidden.detach().abs().max()[None].float()])
        return forward(self, hidden, *args, **kwargs)

    def get_extra_state(self: Any) -> torch.Tensor | None:
        held = getattr(self, "history", None)
        return None if held is None else as_bytes({"amax": held})

    def set_extra_state(self: Any, state: torch.Tensor | None) -> None:
        if state is not None and state.numel():
            self.history = pickle.loads(state.numpy().tobytes())["amax"]

    ColumnParallelLinear.forward = collecting  # type: ignore[method-assign]
    ColumnParallelLinear.get_extra_state = get_extra_state
    ColumnParallelLinear.set_extra_state = set_extra_state


def histories(part: Path, prefix: str) -> dict[str, list[float]]:
    """The FP8 state that a checkpoint holds, by key."""
    held = {}
    for index, info in FileSystemReader(part).read_metadata().storage_data.items():
        if index.fqn.startswith(prefix) and "_extra_state" in index.fqn:
            with (part / info.relative_path).open("rb") as stream:
                stream.seek(info.offset)
                blob = io.BytesIO(stream.read(info.length))
            [state] = torch.load(blob, weights_only=True)
            if isinstance(state, torch.Tensor) and state.numel():
                held[index.fqn] = pickle.loads(state.numpy().tobytes())["amax"].tolist()
    return held


def on_ranks(folder_name: str) -> None:
    collect_amax()
    folder = Path(folder_name)
    dist.init_process_group("gloo")

    def run(name: str, *flags: object) -> None:
        words = ["reweight", "--config", folder / "x.yaml", "--output", folder / name, *flags]
        note(folder / "noted", name, command(*words, *FLAGS))
        dist.barrier()

    run("whole", *PP2)
    if dist.get_rank() == 0:
        (folder / "from").mkdir()
        step = "iter_0000006"
        (folder / "from" / step).symlink_to(folder / "whole" / "checkpoints" / step)
        saved = folder / "whole/checkpoints/iter_0000008"
        for part, prefix in ((saved, "decoder"), (saved / "bilevel", "u.decoder")):
            (folder / f"{prefix}.json").write_text(json.dumps(histories(part, prefix)))
    dist.barrier()
    run("resumed", *PP2, "--load", folder / "from")
    run("elsewhere", *TP2, "--load", folder / "from")
    run(
        "pretrained",
        *PP2,
        "--pretrained-checkpoint",
        folder / "whole/checkpoints",
        "--train-iters",
        1,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fp8")
    write_two_sources(
        folder, bilevel={"resync_interval": 5}, checkpoint={"save_interval": 2, "keep_last": 9},
    )  # fmt: skip
    run_distributed(on_ranks, 2, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_both_models_keep_their_own(runs: Path) -> None:
    of_w = json.loads((runs / "decoder.json").read_text())
    of_u = json.loads((runs / "u.decoder.json").read_text())
    assert len(of_u) == 4, of_u.keys()  # two linear layers in each of two
    assert of_w
    assert not set(map(tuple, of_w.values())) & set(map(tuple, of_u.values()))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["resumed", "elsewhere"])
def test_a_resumed_run_goes_on_with_both(runs: Path, name: str) -> None:
    assert noted(runs / "noted", name)[0] == 0
    last = Path("checkpoints/iter_0000008")
    for part, prefix in ((last, "decoder"), (last / "bilevel", "u.decoder")):
        whole = histories(runs / "whole" / part, prefix)
        resumed = histories(runs / name / part, prefix)
        assert whole.keys() == resumed.keys()
        assert whole
        for key in whole:
            assert resumed[key] == pytest.approx(whole[key], rel=1e-5), key
    if name == "resumed":
        assert metrics(runs / name) == metrics(runs / "whole")[6:]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_pretrained_one_hands_over_none(runs: Path) -> None:
    assert noted(runs / "noted", "pretrained")[0] == 0
    begun = histories(runs / "pretrained/checkpoints/iter_0000001", "decoder")
    ended = histories(runs / "whole/checkpoints/iter_0000006", "decoder")
    assert begun.keys() == ended.keys() and begun
    for key, history in begun.items():
        assert history.count(0.0) > ended[key].count(0.0)
