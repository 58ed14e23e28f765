"""Thousands of sources: few descriptors, one cache file, nothing seen twice, nothing stale."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets import indexed_dataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_scalebio.data import indexed, scan
from megatron_scalebio.data.catalog import CATALOG_FILE, open_catalog
from megatron_scalebio.data.indexed import IndexedPair, OpenFiles
from megatron_scalebio.data.sources import ExampleSource, PackedSource, has_prompts
from megatron_scalebio.errors import UserError
from tests.markov import write_source

ROWS = [np.arange(1, 8 + n % 5) % 30 for n in range(12)]


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Prepared folders and prefixes, in turn."""
    folders = [write_source(tmp_path, f"s{n}", ROWS[n:]) for n in range(6)]
    return [f"{path}/tokens" if n % 2 else path for n, path in enumerate(folders)]


def opened(
    cache: Path, paths: list[str], length: int = 8, seed: int = 3, **options: Any
) -> list[tuple[int, int]]:
    """Opens the catalog; what it had to look at."""
    seen: list[tuple[int, int]] = []
    open_catalog(cache, paths, length, seed, lambda *progress: seen.append(progress), **options)
    return seen


def test_the_format_is_megatrons() -> None:
    assert indexed_dataset._INDEX_HEADER == indexed.MAGIC
    theirs = {each.value: np.dtype(DType.dtype_from_code(each.value)) for each in DType}
    assert theirs == indexed.DTYPES


def test_sources_are_looked_at_once(tmp_path: Path, paths: list[str]) -> None:
    cache = tmp_path / "cache"
    assert opened(cache, paths) == [(n + 1, 6) for n in range(6)]
    assert [path.name for path in cache.iterdir()] == [CATALOG_FILE]
    assert opened(cache, paths) == []
    assert opened(cache, paths[::-1]) == [], "in any order"


@pytest.mark.parametrize(
    "change", ["tokens", "mask", "another", "length", "seed", "torn", "foreign", "version"]
)
def test_a_change_is_seen(tmp_path: Path, paths: list[str], change: str) -> None:
    cache, options = tmp_path / "cache", {}
    opened(cache, paths)
    part = {"tokens": "s1/tokens.bin", "mask": "s2/loss_mask.bin"}.get(change)
    if part:
        stream = tmp_path / part
        stream.write_bytes(stream.read_bytes())  # as large as before
    elif change == "another":
        paths = paths[:-1]
    elif change in ("length", "seed"):
        options = {change: 4}
    elif change == "torn":
        os.truncate(cache / CATALOG_FILE, 100)
    elif change == "foreign":
        (cache / CATALOG_FILE).write_bytes(b"x" * 1000)
    else:
        (cache / CATALOG_FILE).write_bytes((cache / CATALOG_FILE).read_bytes()[:-1] + b"0")
    assert len(opened(cache, paths, **options)) == len(paths)
    assert opened(cache, paths, **options) == []


def test_a_rank_that_need_not_check_asks_no_file(tmp_path: Path, paths: list[str]) -> None:
    cache = tmp_path / "cache"
    opened(cache, paths)
    os.remove(tmp_path / "s1" / "tokens.bin")
    assert opened(cache, paths, check=False) == []
    with pytest.raises(UserError, match=r"s1/tokens: is neither a prepared folder nor"):
        opened(cache, paths)


def test_what_is_read_back_is_what_was_seen(tmp_path: Path, paths: list[str]) -> None:
    paths = [*paths[2:], *paths[:2]]  # not as they are sorted
    for _ in range(2):
        catalog = open_catalog(tmp_path / "cache", paths, 8, 3, lambda done, of: None)
        for number, path in enumerate(paths):
            facts, packing = scan.look_at(path, 1, 8, 3)
            assert catalog.facts(number) == replace(facts, stamp="")
            if packing is not None:
                for ours, theirs in zip(catalog.packing(number), packing, strict=True):
                    np.testing.assert_array_equal(ours, theirs)
                    assert ours.dtype == theirs.dtype
    assert len({id(catalog.facts(number).tokenizer) for number in (0, 2, 4)}) == 1


def test_a_prefix_gives_what_megatrons_own_dataset_does(tmp_path: Path) -> None:
    prefix = (
        f"{write_source(tmp_path, 's', [np.arange(1, 3 + n * 7 % 23) for n in range(20)])}/tokens"
    )
    catalog = open_catalog(tmp_path / "cache", [prefix], 8, 3, lambda done, of: None)
    nothing: Any = SimpleNamespace(eod=-1, pad=-1, vocab_size=None, unique_identifiers={})
    settings = GPTDatasetConfig(
        random_seed=3, sequence_length=8, split="1,0,0", tokenizer=nothing, eod_mask_loss=False,
        reset_position_ids=False, reset_attention_mask=False, create_attention_mask=False,
    )  # fmt: skip
    documents = np.arange(20, dtype=np.int32)
    theirs = GPTDataset(IndexedDataset(prefix), prefix, documents, None, Split.train, settings)
    ours = PackedSource("p", prefix, catalog, 0)
    assert len(ours) == len(theirs) > 20
    for number in range(len(ours)):
        tokens, targets = ours.example(number)
        np.testing.assert_array_equal(tokens[:-1], theirs[number]["tokens"])
        np.testing.assert_array_equal(tokens[1:], theirs[number]["labels"])
        assert targets.tolist() == [0] + [1] * 8


def test_a_source_that_is_read_outside_a_run_may_have_a_large_vocabulary(tmp_path: Path) -> None:
    """As `sample` reads one: no model says where the vocabulary ends."""
    folder = Path(write_source(tmp_path, "large", ROWS[:1], vocab_size=200_000))
    builder = indexed_dataset.IndexedDatasetBuilder(f"{folder}/tokens.bin", dtype=np.int32)
    ids = np.array([5, 199_999, *ROWS[0][2:]])
    builder.add_document(ids, [len(ids)])
    builder.finalize(f"{folder}/tokens.idx")
    assert ExampleSource("large", folder, 99).example(0)[0].tolist() == ids.tolist()


def test_sources_without_prompts_are_told(tmp_path: Path) -> None:
    """Text trains on every token but the first of an example."""
    text = write_source(tmp_path, "text", ROWS)
    chat = write_source(
        tmp_path, "chat", ROWS, [np.r_[np.zeros(3), np.ones(len(r) - 3)] for r in ROWS]
    )
    catalog = open_catalog(
        tmp_path / "cache", [text, chat, f"{chat}/tokens"], 8, 3, lambda *_: None
    )
    found = [ExampleSource("s", Path(path), 99, catalog, n) for n, path in enumerate((text, chat))]
    assert [has_prompts(source) for source in found] == [False, True]
    assert not has_prompts(PackedSource("p", f"{chat}/tokens", catalog, 2))


def test_few_files_are_open_however_many_are_read(
    tmp_path: Path, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = OpenFiles(limit=3)
    monkeypatch.setattr(indexed, "FILES", files)
    catalog = open_catalog(tmp_path / "cache", paths, 8, 3, lambda done, of: None)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for number, path in enumerate(paths):
            if catalog.facts(number).packed:
                PackedSource("p", path, catalog, number).example(0)
            else:
                source = ExampleSource("e", Path(path), 99, catalog, number)
                tokens, mask = source.example(len(source) - 1)
                np.testing.assert_array_equal(tokens, ROWS[-1])
                assert mask.all() and len(source) == 12 - number
            assert len(os.listdir("/proc/self/fd")) - before <= 3


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path, paths: list[str]) -> None:
    code, lengths_D = indexed.check_pair(Path(paths[1]))
    pair = IndexedPair(paths[1], code, len(lengths_D))
    os.truncate(f"{paths[1]}.bin", 4)
    with pytest.raises(UserError, match=r"tokens.bin: ends within a sequence"):
        pair.tokens(3)


def test_a_disk_without_room_for_the_catalog_is_named(tmp_path: Path, paths: list[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"sources.catalog: can't write"):
        opened(tmp_path / "file" / "cache", paths)


def test_nothing_is_left_of_a_look_that_failed(tmp_path: Path, paths: list[str]) -> None:
    os.truncate(tmp_path / "s3" / "tokens.bin", 4)
    with pytest.raises(UserError, match=r"s3/tokens.bin: truncated: 4 bytes of"):
        opened(tmp_path / "cache", paths)
    assert not (tmp_path / "cache" / CATALOG_FILE).exists()
