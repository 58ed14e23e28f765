"""Every option of model, layout and optimizer reaches what Megatron and torch are built with.

One rank reads off the objects that a run builds; each option is set to two values, neither of them
its default, since a constant in its place would equal one of them at most.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.option_table import CHUNK, FP8, MEGATRON, PP2, TP2, Sections
from tests.markov import write_source

pytestmark = pytest.mark.distributed

OPTIMIZER = {
    "lr": 2e-3, "lr_u": 5e-3, "lr_decay_style": "constant", "lr_warmup_fraction": 0.0,
    "weight_decay": 0.3, "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_eps": 1e-5,
    "clip_grad": 0.25,
}  # fmt: skip


def load(sections: Sections, path: str = "x") -> Any:
    from megatron_scalebio.config_loader import load_config

    entry = {"name": "a", "path": path}
    other = {"name": "b", "path": path}
    data = {"seq_length": 16, "sources": [entry, other], "validation": [entry]}
    return load_config(None, {**sections, "data": {**data, **sections.get("data", {})}})


def read_off(folder: str) -> None:
    from megatron_scalebio import runtime

    config = load({}, str(Path(folder) / "a"))
    waits = starting(config)
    found: dict[str, Any] = {"waits": waits}
    found["megatron"] = {
        name: [megatron_attribute(load(sections), name) for sections, _ in cases]
        for name, cases in MEGATRON.items()
    }
    found["chunk"] = {
        name: [of_chunk(load(sections), name) for sections, _ in cases]
        for name, cases in CHUNK.items()
    }
    found["optimizers"] = optimizers(folder)
    found["layout"] = batch_layouts(folder)
    found["packed"] = [packed(folder, seed, length) for seed, length in ((7, 16), (11, 24))]
    (Path(folder) / "found.json").write_text(json.dumps(found))
    runtime.stop()


def starting(config: Any) -> list[float]:
    """Minutes that torch's and Megatron's groups wait, where three are configured."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_scalebio import runtime

    waits = []
    join, build = dist.init_process_group, parallel_state.initialize_model_parallel

    def joining(*args: Any, **keywords: Any) -> None:
        waits.append(keywords["timeout"].total_seconds() / 60)
        join(*args, **keywords)

    def building(**keywords: Any) -> None:
        waits.append(keywords["distributed_timeout_minutes"])
        build(**keywords)

    dist.init_process_group, parallel_state.initialize_model_parallel = joining, building
    config.parallel.distributed_timeout_minutes = 3
    runtime.start(config)
    dist.init_process_group, parallel_state.initialize_model_parallel = join, build
    return waits


def megatron_attribute(config: Any, name: str) -> Any:
    import torch

    from megatron_scalebio.model.settings import transformer_config

    value = getattr(transformer_config(config), name)
    value = getattr(value, "value", value)  # of an enum
    return str(value) if isinstance(value, torch.dtype) else value


def of_chunk(config: Any, name: str) -> Any:
    import torch

    from megatron_scalebio.model.provider import build_chunk
    from megatron_scalebio.model.settings import transformer_config

    torch.manual_seed(0)
    megatron = transformer_config(config)
    gpt = build_chunk(config, megatron, 61, True, True)
    if name == "activation":
        return float(megatron.activation_func(torch.tensor(1.0, dtype=torch.float64)))
    if name == "positions":
        return gpt.embedding.position_embeddings.weight.shape[0]
    if name == "frequencies":
        return gpt.rotary_pos_emb.inv_freq.tolist()
    if name == "embedding":
        return gpt.embedding.word_embeddings.weight.shape[0]
    if name == "output head":
        return gpt.output_layer.weight is not None
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.arange(16)[None]
    if name == "embedding scale":
        embedded_SBH = gpt.embedding(ids, ids)
        return float((embedded_SBH[:, 0] / gpt.embedding.word_embeddings.weight[:16]).mean())
    assert name == "logits at most"
    logits = gpt(ids, ids, None)[..., :61]
    return float(logits.abs().max())


def optimizers(folder: str) -> dict[str, Any]:
    """What torch's AdamW and Megatron's wrappers of w and u hold after a step."""
    from megatron_scalebio.methods.scalebio import TrainState, train_step

    found = {}
    for name, parallel in (
        ("plain", {}),
        ("overlap", {"use_distributed_optimizer": True, "overlap_grad_reduce": True,
                     "overlap_param_gather": True}),
        ("bf16", {"bf16": True}),
    ):  # fmt: skip
        sections = {
            "optimizer": OPTIMIZER, "parallel": parallel, "lisa": {},
            "model": {"num_layers": 1, "hidden_size": 32},
            "train": {"micro_batch_size": 2, "global_batch_size": 4, "train_iters": 7},
        }  # fmt: skip
        config = load(sections, str(Path(folder) / "a"))
        state = TrainState(config, Path(folder) / "cache")
        if name == "overlap":  # `train` alone overlaps; what is built is enough
            state.training.enter_period()
        else:
            assert train_step(state).skipped is None
        found[name] = {model: settings_of(state, model) for model in ("w", "u")}
        state.training.leave_period()
    return found


def settings_of(state: Any, model: str) -> dict[str, Any]:
    optimizer, chunks = state.training.period.optimizers[model], state.training.models[model]
    [part] = [p for p in optimizer.chained_optimizers if not p.is_stub_optimizer]
    groups = part.optimizer.param_groups
    ddp = state.training.period.ddp[model][0].ddp_config
    return {
        "lr": sorted({g["lr"] for g in groups}),
        "betas": sorted({tuple(g["betas"]) for g in groups}),
        "eps": sorted({g["eps"] for g in groups}),
        "weight_decay": sorted({g["weight_decay"] for g in groups}),
        "clip_grad": part.config.clip_grad,
        "masters": sorted({str(p.dtype) for g in groups for p in g["params"]}),
        "weights": sorted({str(p.dtype) for c in chunks for p in c.parameters()}),
        "ddp": [
            ddp.use_distributed_optimizer, ddp.overlap_grad_reduce, ddp.overlap_param_gather,
            ddp.grad_reduce_in_fp32,
        ],
    }  # fmt: skip


def batch_layouts(folder: str) -> list[list[int]]:
    """Micro-batch, multiple and most of a padded length, samplers' batches and floors, seeds."""
    from megatron_scalebio.engine.state import Data

    found = []
    for sections in (
        {"train": {"micro_batch_size": 3, "global_batch_size": 6, "validation_batch_size": 9,
                   "seed": 7},
         "bilevel": {"floor_share": 0.75}},
        {"train": {"micro_batch_size": 2, "global_batch_size": 8, "seed": 11, "packing": True},
         "data": {"seq_length": 48},
         "parallel": {**FP8, **TP2, "context_parallel_size": 3}},
        {"parallel": {"context_parallel_size": 3}},
        {"parallel": {**PP2, "num_layers_per_virtual_pipeline_stage": 1}},
    ):  # fmt: skip
        data = Data(load(sections, str(Path(folder) / "a")), Path(folder) / "cache")
        layout, train, valid = data.layout, data.sampler, data.validation_sampler
        found.append([
            layout.micro_batch_size, layout.pad_multiple, layout.seq_length, layout.fixed_length,
            layout.packed, layout.rows_multiple,
            train.batch_size, train.floor_share, train.seed, valid.batch_size, valid.seed,
        ])  # fmt: skip
    return found


def packed(folder: str, seed: int, length: int) -> list[Any]:
    """A prefix as it is opened, and Megatron's own dataset of it."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    from megatron_scalebio.config import SourceConfig
    from megatron_scalebio.data.sources import open_sources

    prefix = str(Path(folder) / "a" / "tokens")
    config = load({"train": {"seed": seed}, "data": {"seq_length": length}})
    [source] = open_sources([SourceConfig("p", prefix)], config, Path(folder) / "cache")
    nothing: Any = SimpleNamespace(eod=-1, pad=-1, vocab_size=None, unique_identifiers={})
    settings = GPTDatasetConfig(
        random_seed=seed, sequence_length=length, blend=([prefix], None), split="1,0,0",
        path_to_cache=str(Path(folder) / "theirs"), tokenizer=nothing, reset_position_ids=False,
        reset_attention_mask=False, eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    documents = np.arange(20, dtype=np.int32)
    theirs = GPTDataset(IndexedDataset(prefix), prefix, documents, None, Split.train, settings)
    same = len(source) == len(theirs)
    for number in range(len(source)):
        tokens, item = source.example(number)[0].tolist(), theirs[number]
        same &= (tokens[:-1], tokens[1:]) == (item["tokens"].tolist(), item["labels"].tolist())
    return [same, source.length(0), source.tokens]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    import numpy as np

    folder = tmp_path_factory.mktemp("options")
    write_source(folder, "a", list(np.random.default_rng(2).integers(32, size=(20, 17))))
    run_distributed(read_off, 1, str(folder))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("name", MEGATRON)
def test_option_reaches_megatrons_configuration(found: dict[str, Any], name: str) -> None:
    assert found["megatron"][name] == [expected for _, expected in MEGATRON[name]]


@pytest.mark.parametrize("name", CHUNK)
def test_option_reaches_the_model(found: dict[str, Any], name: str) -> None:
    for got, (sections, expected) in zip(found["chunk"][name], CHUNK[name], strict=True):
        assert got == pytest.approx(expected, rel=1e-5), sections


@pytest.mark.parametrize("name", ["plain", "bf16"])
def test_options_reach_the_optimizers_of_both_models(found: dict[str, Any], name: str) -> None:
    for model, lr in (("w", 2e-3), ("u", 5e-3)):
        got = found["optimizers"][name][model]
        assert got["lr"] == [pytest.approx(lr)]
        assert got["betas"] == [[0.7, 0.8]] and got["eps"] == [1e-5]
        assert got["weight_decay"] == [0.0, 0.3], "norms have none"
        assert got["clip_grad"] == 0.25
        assert got["masters"] == ["torch.float32"]
        assert got["weights"] == ["torch.bfloat16" if name == "bf16" else "torch.float32"]
        assert got["ddp"] == [False, False, False, True]
        assert found["optimizers"]["overlap"][model]["ddp"] == [True, True, True, True]


def test_options_reach_samplers_and_batches(found: dict[str, Any]) -> None:
    assert found["layout"] == [
        [3, 8, 16, False, False, 1, 6, 0.75, 7, 9, 8],
        [2, 96, 48, False, True, 1, 8, 0.25, 11, 8, 12],  # 16 · TP · CP
        [4, 24, 16, False, False, 1, 32, 0.25, 1234, 32, 1235],  # least multiple of 8 and 2 · CP
        [4, 8, 16, True, False, 2, 32, 0.25, 1234, 32, 1235],
    ]


def test_options_reach_packed_sources(found: dict[str, Any]) -> None:
    assert found["packed"] == [[True, 16, 340], [True, 24, 340]]


def test_collectives_wait_a_minute_longer_than_the_watchdog(found: dict[str, Any]) -> None:
    assert found["waits"] == [4, 4]
