"""Megatron `.bin/.idx` prefixes as sources, and the blend files in Megatron's own datasets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist

from megatron_scalebio.data import sources
from megatron_scalebio.data.sources import PackedSource
from tests.commands import command, note, noted, the_only_line, write_config
from tests.distributed.harness import run_distributed
from tests.markov import VOCAB, draw, transition_matrices

pytestmark = pytest.mark.distributed
STEPS = 6


def write_prefix(path: Path, matrices: np.ndarray, source: int, documents: int) -> str:
    """Documents of uneven length, as Megatron-LM's tools/preprocess_data.py writes them."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    rows = draw(matrices, np.full(documents, source), 40, (source, 3))
    for number, row in enumerate(rows):
        document = row[: 11 + number % 29].astype(np.uint16)
        builder.add_document(document, [len(document)])
    builder.finalize(f"{path}.idx")
    return str(path)


def on_one_rank(folder_name: str) -> None:
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    for name, flags in (("run", []), ("again", ["--tensor-model-parallel-size", 1])):
        words = ["reweight", "--config", folder / "x.yaml", "--output", folder / name, *flags]
        note(folder / "noted", name, command(*words))
    note(folder / "noted", "dataset", (0, json.dumps(megatron_reads(folder / "run"))))
    go_on(folder)


class SizesAlone(PackedSource):
    """As earlier versions told data apart, which their checkpoints hold."""

    @property
    def fingerprint(self) -> str:
        return super().fingerprint.rpartition("-")[0]


def go_on(folder: Path) -> None:
    """Resumes a run of an earlier version, then with other data of the same size."""
    words = ["reweight", "--config", folder / "x.yaml", "--output", folder / "old"]
    with mock.patch.object(sources, "PackedSource", SizesAlone):
        note(folder / "noted", "old", command(*words))
    note(folder / "noted", "old resumed", command(*words, "--train-iters", STEPS + 2))
    for name in ("s1", "goal"):
        path = folder / f"{name}_text_document.bin"
        whole = path.read_bytes()
        path.write_bytes(np.frombuffer(whole, np.uint16)[::-1].tobytes())
        note(folder / "noted", f"other {name}", command(*words, "--train-iters", STEPS + 4))
        path.write_bytes(whole)


def megatron_reads(run: Path) -> dict:
    """How many samples of each source Megatron-LM's own loader takes from blend.txt."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import get_blend_from_list

    nothing: Any = SimpleNamespace(eod=-1, pad=-1, vocab_size=None, unique_identifiers={})
    settings = GPTDatasetConfig(
        random_seed=1, sequence_length=16, split="1,0,0", path_to_cache=str(run / "loader"),
        blend=get_blend_from_list((run / "blend.txt").read_text().split()),
        tokenizer=nothing, reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    builder = BlendedMegatronDatasetBuilder(GPTDataset, [200, 0, 0], lambda: True, settings)
    train = builder.build()[0]
    ids = [int(train[n]["dataset_id"]) for n in range(len(train))]
    return {"counts": np.bincount(ids, minlength=2).tolist(), "tokens": len(train[0]["tokens"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    matrices = transition_matrices(2, 0)
    paths = [write_prefix(folder / f"s{n}_text_document", matrices, n, 90) for n in (0, 1)]
    target = write_prefix(folder / "goal_text_document", matrices, 0, 60)
    write_config(
        folder / "x.yaml",
        [{"name": f"s{n}", "path": path} for n, path in enumerate(paths)],
        [{"name": "goal", "path": target}],
        model={"vocab_size": VOCAB},
        train={"train_iters": STEPS},
    )
    run_distributed(on_one_rank, 1, str(folder))
    return folder


def test_prefixes_are_sources(folder: Path) -> None:
    code, said = noted(folder / "noted", "run")
    assert code == 0, said
    content = json.loads((folder / "run" / "weights.json").read_text())
    assert [Path(s["path"]).name for s in content["sources"]] == [
        "s0_text_document", "s1_text_document",
    ]  # fmt: skip
    assert all(s["examples"] > 50 for s in content["sources"])


def test_the_same_data_gives_the_same_run(folder: Path) -> None:
    weights = [(folder / name / "weights.json").read_text() for name in ("run", "again")]
    assert weights[0] == weights[1]


def test_megatron_loads_the_blend_in_the_learned_proportions(folder: Path) -> None:
    read = json.loads(noted(folder / "noted", "dataset")[1])
    content = json.loads((folder / "run" / "weights.json").read_text())
    shares = np.array(read["counts"]) / sum(read["counts"])
    learned = [source["weight"] for source in content["sources"]]
    np.testing.assert_allclose(shares, learned, atol=0.01)
    assert read["tokens"] == 16


def test_a_checkpoint_that_tells_data_by_their_sizes_alone_resumes(folder: Path) -> None:
    code, said = noted(folder / "noted", "old resumed")
    assert code == 0 and f"from step {STEPS}" in said, said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("s1", "the data of source 's1' has changed since"),
        ("goal", "was made for other validation sets, other data in them, or"),
    ],
)
def test_other_data_of_the_same_size_are_refused(folder: Path, name: str, words: str) -> None:
    code, said = noted(folder / "noted", f"other {name}")
    assert code == 2 and words in the_only_line(said), said
