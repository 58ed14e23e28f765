"""The stage `sample` on Megatron prefixes, which hold token ids and no records."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_scalebio.cli import main
from megatron_scalebio.errors import UserError
from megatron_scalebio.sample.config import SampleConfig, WeightedSource
from megatron_scalebio.sample.stage import sample
from megatron_scalebio.sample.writer import PrefixWriter
from tests.data.sample_world import World


def megatron_prefix(
    path: Path, lengths: list[int], first: int = 0, dtype: type[np.number] = np.uint16
) -> str:
    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
    for number, length in enumerate(lengths):
        builder.add_document(np.arange(length) + first + 10 * number, [length])
    builder.finalize(f"{path}.idx")
    return str(path)


def test_a_fingerprint_is_of_what_is_written_whatever_the_tokens_came_as(tmp_path: Path) -> None:
    found = set()
    for dtype in (np.int64, np.uint16):
        writer = PrefixWriter(tmp_path / dtype.__name__, np.uint16)
        writer.add(np.arange(5, dtype=dtype), np.ones(5), [2, 3], [(0, 1), (0, 2)])
        found.add(writer.finish({})["fingerprint"])
    assert len(found) == 1


def test_megatron_prefixes(world: World) -> None:
    long = WeightedSource("long", megatron_prefix(world.root / "long", [30] * 40), 0.5)
    short = WeightedSource("short", megatron_prefix(world.root / "short", [10, 0] * 30), 0.5)
    goal = megatron_prefix(world.root / "goal", [30])
    (manifest,) = world.sample("out", long, short, num_samples=40, exclude=(("goal", goal),))
    # Weights are shares of sequences, so of tokens: many more of the short documents.
    assert [e["given"] for e in manifest["sources"]] == [6, 34]
    assert manifest["sources"][0]["contaminated"]["exact"] == 1
    assert manifest["contamination"]["ngram_of"] == "tokens"
    assert sorted(p.name for p in (world.root / "out").iterdir()) == [
        "manifest.json", "tokens.bin", "tokens.idx"]  # fmt: skip
    found = IndexedDataset(str(world.root / "out/tokens"))
    assert Counter(found.sequence_lengths.tolist()) == {30: 6, 10: 34}
    assert len(found.document_indices) == 41
    # It has no source.json, and can be replaced all the same; another program's folder can't.
    world.sample("out", long, short, num_samples=30, overwrite=True)
    assert len(IndexedDataset(str(world.root / "out/tokens"))) == 30
    (world.root / "site").mkdir()
    for content in ('{"name": "a web application", "sources": []}', "[]", "nonsense"):
        (world.root / "site/manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"is not a prepared source .* and no sample"):
            world.sample("site", long, short, num_samples=30, overwrite=True)
        assert (world.root / "site/manifest.json").read_text() == content
    # With prepared sources, documents are cut to examples of their length.
    prefix = WeightedSource("web", megatron_prefix(world.root / "web", [100] * 40), 0.5)
    (manifest,) = world.sample("mixed", prefix, world.source("big"), num_samples=10)
    found = IndexedDataset(str(world.root / "mixed/tokens"))
    assert found.sequence_lengths.max() == 65
    assert manifest["examples"] == len(found) > 10 == manifest["given"]
    assert [e["examples_per_row"] for e in manifest["sources"]] == [100 / 64, 1.0]
    assert [e["asked"] for e in manifest["sources"]] == [4, 6]  # 64 and 100 of 164


def test_sources_in_groups_are_drawn_by_the_weights_of_their_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [
        {"name": f"{name}/web", "weight": 0.5, "path": megatron_prefix(tmp_path / name, [30] * 9)}
        for name in ("de", "en")
    ]
    (tmp_path / "weights.json").write_text(json.dumps({"sources": entries}))
    words = ["sample", "--weights", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*words, "--per-source", "4"]) == 2, "a folder has no such name"
    assert "'de/web' cannot name a source" in capsys.readouterr().err
    assert main([*words, "--num-samples", "4"]) == 0
    told = json.loads((tmp_path / "out" / "manifest.json").read_text())["sources"]
    assert [(e["name"], e["given"]) for e in told] == [("de/web", 2), ("en/web", 2)]


def test_token_0_is_a_token_and_the_first_is_no_prompt(tmp_path: Path) -> None:
    goal = megatron_prefix(tmp_path / "goal", [6])
    # Tokens 0 to 2 stand in the set's 0 to 5; 10 to 12 don't, and 0 and 1 are no three.
    source = WeightedSource("web", megatron_prefix(tmp_path / "web", [3, 3]), 1.0)
    few = WeightedSource("few", megatron_prefix(tmp_path / "few", [2, 2]), 1.0)
    config = SampleConfig(
        tmp_path / "out", (source, few), per_source=9, exclude=(("goal", goal),), ngram=3
    )
    found = [manifest["sources"][0] for manifest in sample(config)]
    assert [entry["contaminated"]["ngram"] for entry in found] == [1, 0]
    assert [entry["contaminated"]["prompt"] for entry in found] == [0, 0]


def test_a_sample_of_prefixes_is_as_wide_as_the_widest_and_knows_its_documents(
    tmp_path: Path,
) -> None:
    wide = megatron_prefix(tmp_path / "wide", [4] * 3, 70_000, np.int32)
    narrow = megatron_prefix(tmp_path / "narrow", [4] * 3)
    sources = tuple(WeightedSource(Path(p).name, p, 1.0) for p in (wide, narrow))
    sample(SampleConfig(tmp_path / "out", sources, num_samples=6))
    found = IndexedDataset(str(tmp_path / "out/tokens"))
    assert sorted(found[n][0] for n in range(6)) == [0, 10, 20, 70_000, 70_010, 70_020]
    # Equal tokens in other documents are another sample.
    prints = []
    for lengths in ([2, 4], [3, 3]):
        writer = PrefixWriter(tmp_path / str(lengths), np.uint16)
        writer.add(np.arange(6), np.ones(6), lengths, [(0, 1)] * 2)
        prints.append(writer.finish({})["fingerprint"])
    assert prints[0] != prints[1]
