"""What `prepare` counts and shows, over many batches and files; and that its options arrive."""

from __future__ import annotations

import argparse
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from rich.console import Console

from megatron_scalebio.commands import prepare as prepare_cli
from megatron_scalebio.data import prepare as prepare_module
from megatron_scalebio.data import train_tokenizer
from megatron_scalebio.data.load_tokenizer import load_tokenizer
from megatron_scalebio.data.prepare import PrepareConfig, Progress, SourceInput, prepare
from megatron_scalebio.data.record_fields import RecordOptions

ROOT = Path(__file__).resolve().parents[2]
SEQ = 40


def answer(prompt: str, text: str) -> dict[str, str]:
    return {"instruction": prompt, "input": "", "output": text}


# By what becomes of each, many of every kind, mixed.
GOOD = [answer(f"Say {n}", f"Number {n}") for n in range(7)]
BLANK = [answer("", " ")] * 3
SILENT = [answer(f"Say nothing {n}", "") for n in range(4)]
CUT = [answer("Go on", "word " * (50 + n)) for n in range(5)]
LOST = [answer("Long " * 60, "short")] * 2


@pytest.fixture
def raw(tmp_path: Path) -> list[Path]:
    records = [*GOOD, *BLANK, *SILENT, *CUT, *LOST]
    np.random.default_rng(3).shuffle(records)  # type: ignore[arg-type]
    paths = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for path, part in zip(paths, (records[:9], records[9:]), strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in part))
    return paths


def prepared(out: Path, tokenizer: Path, files: list[Path], **options: Any) -> dict[str, Any]:
    sources = (SourceInput("src", tuple(files)),)
    options = {"seq_length": SEQ, "workers": 1, **options}
    [report] = prepare(PrepareConfig(out, sources, str(tokenizer), **options))
    return report


@pytest.mark.parametrize("records", [2, 100])
def test_counts_are_over_all_batches_and_files(
    tmp_path: Path,
    raw: list[Path],
    sentence_piece: Path,
    monkeypatch: pytest.MonkeyPatch,
    records: int,
) -> None:
    monkeypatch.setattr(prepare_module, "_BATCH_RECORDS", records)
    report = prepared(tmp_path / "out", sentence_piece, raw)
    assert report["examples"] == len(GOOD) + len(CUT) and report["truncated"] == len(CUT)
    assert report["dropped"] == {
        "no_target": len(SILENT), "empty": len(BLANK), "too_long": 0,
        "prompt_too_long": len(LOST),
    }  # fmt: skip
    # The built-in template, each turn tokenized alone, the answer and the end behind it to learn.
    tokenizer = load_tokenizer(sentence_piece)
    lengths, targets = [], []
    for record in (*GOOD, *CUT):
        head = f"### Instruction:\n{record['instruction']}\n\n### Response:\n"
        before = len(tokenizer.encode(head))
        own = len(tokenizer.encode_continuation(record["output"])) + 1
        lengths.append(min(before + own, SEQ + 1))
        targets.append(lengths[-1] - before)
    assert report["tokens"] == sum(lengths) and report["target_tokens"] == sum(targets)
    assert [entry["bytes"] for entry in report["inputs"]] == [p.stat().st_size for p in raw]


@pytest.mark.parametrize("most", [1, 5, 9, 12])
def test_at_most_so_many_records_are_read_of_all_files_together(
    tmp_path: Path,
    raw: list[Path],
    sentence_piece: Path,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
) -> None:
    monkeypatch.setattr(prepare_module, "_BATCH_RECORDS", 2)
    options = {"max_examples": most, "train_on_prompt": True, "seq_length": None}
    report = prepared(tmp_path / "out", sentence_piece, raw, **options)
    lines = [line for path in raw for line in path.read_text().splitlines()][:most]
    blank = sum(json.loads(line)["instruction"] == "" for line in lines)
    assert (report["examples"], report["dropped"]["empty"]) == (most - blank, blank)


def test_the_table_shows_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    reports = [
        {"name": "web", "examples": 1234, "tokens": 1_000_001, "target_tokens": 98_765,
         "truncated": 4321, "dropped": {"no_target": 0, "empty": 1111, "too_long": 22}},
        {"name": "math", "examples": 3, "tokens": 40, "target_tokens": 9, "truncated": 0,
         "dropped": {"no_target": 0, "empty": 0, "too_long": 0}},
    ]  # fmt: skip
    Console(width=120).print(prepare_cli.report_table(reports, Path("out")))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [
        "source",
        "examples",
        "tokens",
        "targets",
        "mean",
        "length",
        "dropped",
        "truncated",
    ] in (rows)
    assert ["web", "1,234", "1,000,001", "98,765", "810.4", "1,111", "empty", "4,321"] in rows
    assert ["22", "too_long"] in rows
    assert ["math", "3", "40", "9", "13.3", "none", "0"] in rows


@pytest.mark.parametrize(
    ("unread", "names"),
    [(1, "0.md"), (3, "0.md, 1.md, 2.md"), (5, "0.md, 1.md, 2.md and 2 more")],
)
def test_of_the_files_that_are_not_read_three_are_named(unread: int, names: str) -> None:
    source = SourceInput("web", (), tuple(Path(f"{n}.md") for n in range(unread)))
    config: Any = SimpleNamespace(workers=1, sources=(source,))
    report = {"name": "web", "examples": 1, "truncated": 0, "dropped": {"prompt_too_long": 0},
              "ignored_fields": {}, "replaced_letters": 0, "skipped": {}}  # fmt: skip
    [line] = prepare_cli.remarks([report], config)
    assert line == f"web: not read, being of no known kind: {names}"


def test_of_many_sources_the_first_remarks_of_each_kind_are_shown() -> None:
    names = [f"s{n}" for n in range(2000)]
    config: Any = SimpleNamespace(
        workers=1, seq_length=8, sources=[SourceInput(name, ()) for name in names]
    )
    reports = [
        {"name": name, "examples": 10, "truncated": 9, "longest": 33, "ignored_fields": {},
         "dropped": {"prompt_too_long": int(name == "s1999")}, "skipped": {},
         "replaced_letters": 0}
        for name in names
    ]  # fmt: skip
    lines = prepare_cli.remarks(reports, config)
    assert len(lines) == 12 and lines[9].startswith("warning: s9: 9 of 10 examples lost their end")
    assert lines[10].startswith("s1999: 1 prompt_too_long")
    assert lines[11] == "... and 1,990 more sources: examples lost their end"


def test_the_length_that_is_named_holds_the_longest_example(
    tmp_path: Path, sentence_piece: Path
) -> None:
    file = tmp_path / "raw.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in (*GOOD, *CUT)))
    report = prepared(tmp_path / "out", sentence_piece, [file])
    source = SourceInput("src", (file,))
    config: Any = SimpleNamespace(workers=1, sources=(source,), out=tmp_path, seq_length=SEQ)
    [line] = prepare_cli.remarks([report], config)
    named = re.search(r"5 of 12 examples lost their end; --seq-length (\d+) would hold", line)
    assert named is not None, line
    for less, lost in ((0, 0), (1, 1)):
        length = int(named[1]) - less
        again = prepared(tmp_path / f"{less}", sentence_piece, [file], seq_length=length)
        assert again["truncated"] == lost


def test_progress_lines_tell_the_share_of_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = prepare_cli._Lines(Console(width=120, stderr=True))
    lines(Progress("web", 30, 120, 1500))
    lines(Progress("web", 60, 120, 1600))  # too soon after the first
    lines(Progress("web", 120, 120, 1700, finished=True))
    assert capsys.readouterr().err.splitlines() == [
        "prepare: web 25 %, 1,500 examples", "prepare: web 100 %, 1,700 examples",
    ]  # fmt: skip


def test_many_sources_are_one_count_and_few_rows(capsys: pytest.CaptureFixture[str]) -> None:
    lines = prepare_cli._Lines(Console(width=120, stderr=True), sources=2000)
    for number in range(2000):
        lines(Progress(f"s{number}", 9, 9, 5, finished=True))
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("prepare: 1 of 2,000 sources, s0 100 %") and len(said) == 2
    assert said[1].startswith("prepare: 2,000 of 2,000 sources, s1999")
    report = {
        "examples": 2, "tokens": 7, "target_tokens": 5, "truncated": 0, "dropped": {}
    }  # fmt: skip
    reports = [{"name": f"s{number}", **report} for number in range(2000)]
    Console(width=120).print(prepare_cli.report_table(reports, Path("out")))
    rows = capsys.readouterr().out
    assert "s49" in rows and "s50" not in rows
    assert "all 2,000, of which 50 are shown" in rows and "4,000" in rows and "14,000" in rows


# flag: (what it gives, the field, its value); each is not the default
FLAGS: list[tuple[list[str], str, Any]] = [
    (["--tokenizer", "t.model"], "tokenizer", "t.model"),
    (["--train-sentencepiece", "900"], "train_sentencepiece", 900),
    (["--allow-download"], "allow_download", True),
    (["--chat-template", "plain"], "chat_template", "plain"),
    (["--format", "alpaca"], "format", "alpaca"),
    (["--text-key", "body"], "text_key", "body"),
    (["--seq-length", "77"], "seq_length", 77),
    (["--too-long", "drop"], "too_long", "drop"),
    (["--train-on-prompt"], "train_on_prompt", True),
    (["--max-examples", "12"], "max_examples", 12),
    (["--workers", "3"], "workers", 3),
    (["--overwrite"], "overwrite", True),
]


def test_flags_reach_what_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n')
    seen: list[PrepareConfig] = []
    monkeypatch.setattr(prepare_cli, "run_config", seen.append)
    parser = argparse.ArgumentParser()
    prepare_cli.add_arguments(parser)
    out = tmp_path / "out"
    sources = (SourceInput("a", (source,)),)
    defaults = PrepareConfig(out, sources, "other.model")
    assert (defaults.seq_length, defaults.append_eod, defaults.max_examples) == (2048, True, None)
    assert (defaults.too_long, defaults.train_on_prompt, defaults.workers) == (None, False, 0)
    for words, field, value in FLAGS:
        tokenizer = "" if field == "train_sentencepiece" else "other.model"
        given = [*(["--tokenizer", tokenizer] if tokenizer else []), *words]
        parsed = parser.parse_args(["--input", str(source), "--out", str(out), *given])
        prepare_cli.run(parsed)
        expected = {"out": out, "sources": sources, "tokenizer": tokenizer, field: value}
        assert seen.pop() == PrepareConfig(**expected)


def test_workers_follow_the_size_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    config = PrepareConfig(Path("out"), (SourceInput("a", (Path("a"),)),), "t.model")
    asked = PrepareConfig(Path("out"), config.sources, "t.model", workers=4)
    for megabytes, workers in ((1, 1), (33, 2), (70, 4), (5000, 6)):
        assert prepare_module._workers(config, megabytes << 20) == workers
        assert prepare_module._workers(asked, megabytes << 20) == 4


def test_a_tokenizer_is_trained_on_every_nth_record_of_much_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 3.2 times as much text as may be held, every fourth record of each file."""
    import sentencepiece

    given: dict[str, Any] = {}

    def train(**options: Any) -> None:
        given.update(options, sentences=list(options["sentence_iterator"]))

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", train)
    files = []
    for name in ("a", "b"):
        files.append(tmp_path / f"{name}.jsonl")
        records = [{"body": f"{name}{n} " + "x" * 4500} for n in range(10)]
        files[-1].write_text("".join(json.dumps(record) + "\n" for record in records))
    total = sum(path.stat().st_size for path in files)
    train_tokenizer.train_sentencepiece(
        files,
        tmp_path / "m.model",
        321,
        options=RecordOptions(text_key="body"),
        max_text_bytes=int(total / 3.2),
    )
    starts = [s.split(" ")[0] for s in given["sentences"] if not s.startswith("x")]
    assert starts == ["a0", "a4", "a8", "b0", "b4", "b8"]
    assert [len(s) for s in given["sentences"][:3]] == [2000, 2000, 503]
    assert given["vocab_size"] == 321 and given["model_type"] == "bpe"
    ids = [given[f"{name}_id"] for name in ("unk", "bos", "eos", "pad")]
    assert ids == [0, 1, 2, 3]
    assert given["max_sentence_length"] >= 4 * 2000, "in bytes"
    assert train_tokenizer.MAX_TEXT_BYTES == 16 << 20


@pytest.mark.parametrize("flags", [[], ["--append-eod"], ["--append-eod", "--seq-length", "6"]])
def test_preprocess_data_closes_and_cuts_documents_as_asked(
    tmp_path: Path, sentence_piece: Path, flags: list[str]
) -> None:
    source = tmp_path / "a.jsonl"
    texts = ["some words of a text to be cut", "and others"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tool = runpy.run_path(str(ROOT / "tools" / "preprocess_data.py"))
    words = ["--input", source, "--output-prefix", tmp_path / "out" / "web"]
    words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", sentence_piece]
    assert tool["main"]([*map(str, words), *flags]) == 0
    tokenizer = load_tokenizer(sentence_piece)
    end = [tokenizer.eod_id] if flags else []
    whole = [[*tokenizer.encode(text), *end] for text in texts]
    found = IndexedDataset(str(tmp_path / "out" / "web" / "tokens"))
    pieces = [found[i].tolist() for i in range(len(found))]
    if "--seq-length" in flags:  # six inputs and the label of the last, which begins the next
        whole = [ids[at : at + 7] for ids in whole for at in range(0, len(ids) - 1, 6)]
    assert pieces == whole
