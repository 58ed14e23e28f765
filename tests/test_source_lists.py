"""Sources by globs, lists of files and Megatron-LM's lists: which entries they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_scalebio.config_loader import config_text, load_config
from megatron_scalebio.errors import UserError
from tests.markov import write_source

ROWS = [[1, 2, 3, 4]]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """corpus/{math,code}/{web,books}.{idx,bin}, and prepared/{a,b}."""
    for topic in ("math", "code"):
        (tmp_path / "corpus" / topic).mkdir(parents=True)
        for name in ("web.idx", "web.bin", "books.idx", "books.bin"):
            (tmp_path / "corpus" / topic / name).touch()
    for name in "ab":
        write_source(tmp_path / "prepared", name, ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sources(given: Any, **data: Any) -> list[tuple[str, str, float | None]]:
    config = load_config(None, {"data": {"sources": given, **data}} if given else {"data": data})
    return [(s.name, s.path, s.initial_weight) for s in config.data.sources]


def test_a_glob_names_prefixes(corpus: Path) -> None:
    found = sources({"glob": "corpus/*/*", "name": "{parent}/{stem}"})
    assert found == [
        (f"{topic}/{kind}", f"corpus/{topic}/{kind}", None)
        for topic in ("code", "math") for kind in ("books", "web")
    ]  # fmt: skip
    assert sources({"glob": "corpus/*/*.idx"}) == found, "the fewest folders that tell them apart"
    assert [s[0] for s in sources({"glob": "corpus/math/*.idx"})] == ["books", "web"]


def test_two_stars_reach_folders_at_any_depth(corpus: Path) -> None:
    (corpus / "corpus" / "web.idx").touch()
    found = sources({"glob": "corpus/**/web.idx", "name": "{parent}"})
    assert [path for _, path, _ in found] == ["corpus/code/web", "corpus/math/web", "corpus/web"]


@pytest.mark.parametrize("pattern", ["prepared/*", "prepared/*/source.json", "prepared/*/*.idx"])
def test_a_glob_names_prepared_folders(corpus: Path, pattern: str) -> None:
    assert sources({"glob": pattern}) == [("a", "prepared/a", None), ("b", "prepared/b", None)]


def test_a_list_stands_beside_other_entries_and_hands_its_fields_on(corpus: Path) -> None:
    (corpus / "corpus" / "list.txt").write_text("# ours\nmath/web\n\ncode/web.bin\n")
    entries = [
        {"list": "corpus/list.txt", "name": "{grandparent}-{parent}", "initial_weight": 2.0},
        {"name": "a", "path": "prepared/a", "initial_weight": 1.0},
    ]
    assert sources(entries) == [
        ("corpus-math", "corpus/math/web", 2.0), ("corpus-code", "corpus/code/web", 2.0),
        ("a", "prepared/a", 1.0),
    ]  # fmt: skip


def test_megatron_lists_are_taken_with_weights_and_without(corpus: Path) -> None:
    blend = corpus / "blend.txt"
    blend.write_text(f"0.25 corpus/math/web 0.75 '{corpus}/prepared/a/tokens'\n")
    assert sources(None, data_args_path="blend.txt") == [
        ("web", "corpus/math/web", 0.25), ("a", f"{corpus}/prepared/a", 0.75),
    ]  # fmt: skip
    blend.write_text("corpus/math/web\ncorpus/code/web")
    assert sources(None, data_args_path="blend.txt") == [
        ("math/web", "corpus/math/web", None), ("code/web", "corpus/code/web", None),
    ]  # fmt: skip


def test_the_written_configuration_names_each_source(corpus: Path) -> None:
    config = load_config(None, {"data": {"sources": {"glob": "corpus/*/*.idx"}}})
    (corpus / "again.yaml").write_text(config_text(config))
    assert load_config("again.yaml") == config and "glob:" not in config_text(config)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sources": {"glob": "corpus/*.idx"}}, "sources[0].glob: 'corpus/*.idx' matches nothing"),
        ({"sources": {"glob": "*"}}, "'*' matches corpus, which is not a source"),
        (
            {"sources": {"glob": "corpus/*/*.idx", "name": "{folder}"}},
            "sources[0].name: '{folder}' is not a name (it may hold {stem}, {parent}, {grand",
        ),
        (
            {"sources": {"glob": "corpus/*/*.idx", "name": "{stem}"}},
            "sources[0].name: '{stem}' calls both corpus/code/books and corpus/math/books 'books'",
        ),
        ({"sources": {"glob": ["a", "b"]}}, "sources[0].glob: ['a', 'b'] is not a text (make each"),
        ({"sources": ["corpus/math/web"]}, "data.sources: 'corpus/math/web' is not a list"),
        ({"sources": {"m": "corpus/math/web"}}, "(write [{name: m, path: corpus/math/web}])"),
        ({"validation": {"name": "v", "path": "p"}}, "data.validation: {'name': 'v', 'path': 'p'}"),
        ({"test": ["p"]}, "data.test: 'p' is not a list of names and paths"),
        ({"data_args_path": "mixed"}, "mixed: '0.5' stands where a path should (write a weight"),
        ({"data_args_path": "minus"}, "minus: the weight of corpus/math/web is -0.5 (give"),
        ({"sources": {"glob": "corpus/math/*.idx", "name": "{stem}/"}}, "'books/' cannot name a"),
        ({"sources": {"glob": "x", "path": "y"}}, "sources[0]: glob and path both name sources"),
        ({"sources": {"list": "none"}}, "sources[0].list: none: No such file or directory"),
        ({"sources": {"list": "empty"}}, "empty: names no source (one path a line)"),
        ({"sources": {"glob": "corpus/*/*.idx", "weigth": 1}}, "unknown key 'weigth'"),
        ({"data_args_path": "empty"}, "data_args_path: empty: names no source"),
        ({"data_args_path": "quote"}, "quote: is not a list of paths: No closing quotation"),
        ({"data_args_path": "twice"}, "twice: names corpus/math/web 2 times (name it once)"),
        (
            {"data_args_path": "twice", "sources": [{"name": "a", "path": "prepared/a"}]},
            "data_args_path: 'twice' and sources both name sources",
        ),
    ],
)  # fmt: skip
def test_what_names_no_sources_is_refused(corpus: Path, data: dict, words: str) -> None:
    (corpus / "empty").touch()
    (corpus / "quote").write_text("1.0 'a")
    (corpus / "mixed").write_text("0.5 corpus/math/web corpus/math/books")
    (corpus / "minus").write_text("0.5 corpus/math/books -0.5 corpus/math/web")
    (corpus / "twice").write_text("1 corpus/math/web 2 corpus/math/web.idx")
    with pytest.raises(UserError) as refused:
        load_config(None, {"data": data})
    assert words in str(refused.value)
