"""What `sample` deals, counts and shows, by arithmetic; and that its options arrive."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_scalebio.commands import sample as command
from megatron_scalebio.config import Config, DataConfig
from megatron_scalebio.data.formats import Dialogue, Text
from megatron_scalebio.data.load_tokenizer import load_tokenizer
from megatron_scalebio.data.prepare import PrepareConfig, Progress, SourceInput, prepare
from megatron_scalebio.data.sources import ExampleSource
from megatron_scalebio.data.weights_file import drawn_from
from megatron_scalebio.engine.epochs import caps, epochs
from megatron_scalebio.engine.outputs import natural_shares
from megatron_scalebio.sample.config import SampleConfig, WeightedSource
from megatron_scalebio.sample.contamination import (
    EvaluationIndex,
    WordIds,
    prompt_text,
    whole_text,
)
from megatron_scalebio.sample.stage import sample

SEQ = 16


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def answers(kind: str, count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"{kind} {n}?", "output": f"answer {n}"} for n in range(count)]


@pytest.fixture
def folders(tmp_path: Path, sentence_piece: Path) -> dict[str, str]:
    """Prepared: `long`, 40 texts of three examples each; `small`, 10 dialogues; `goal`."""
    tokenizer = load_tokenizer(sentence_piece)
    texts = []
    for n in range(40):
        text = f"text {n} of some"
        while len(tokenizer.encode(text)) < 2 * SEQ + 4:  # and the end of the document
            text += " words"
        texts.append({"text": text})
    files = {
        "long": write(tmp_path / "long.jsonl", texts),
        "small": write(tmp_path / "small.jsonl", answers("small", 10)),
        "goal": write(tmp_path / "goal.jsonl", answers("small", 4)),
    }
    for name, length in (("long", SEQ), ("small", SEQ), ("goal", SEQ)):
        source = (SourceInput(name, (files[name],)),)
        options = {"seq_length": length, "train_on_prompt": True, "too_long": "split"}
        [report] = prepare(PrepareConfig(tmp_path / "data", source, str(sentence_piece), **options))
        if name == "long":
            assert report["examples"] == 120
    return {name: str(tmp_path / "data" / name) for name in files}


def drawn(folders: dict[str, str], out: Path, **options: Any) -> list[dict[str, Any]]:
    sources = (
        WeightedSource("long", folders["long"], 3.0),
        WeightedSource("small", folders["small"], 1.0),
    )
    encoding = {"train_on_prompt": True, "too_long": "split"}
    return sample(SampleConfig(out, sources, **{**encoding, **options}))


def test_weights_are_shares_of_examples_and_rows_are_dealt_accordingly(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    """Rows in proportion to weight / examples a row, 3/3 to 1/e, and caps of two epochs."""
    per_row = json.loads((Path(folders["small"]) / "source.json").read_text())["examples"] / 10
    [manifest] = drawn(folders, tmp_path / "out", num_samples=30, max_epochs=2, seed=7, ngram=5)
    long, small = manifest["sources"]
    assert (long["examples_per_row"], small["examples_per_row"]) == (3.0, pytest.approx(per_row))
    asked = [30 * x / (1 + 1 / per_row) for x in (1, 1 / per_row)]
    assert [entry["asked"] for entry in (long, small)] == [round(x) for x in asked]
    assert [entry["given"] for entry in (long, small)] == [
        entry["asked"] for entry in (long, small)
    ]
    assert (long["rows"], long["usable"], small["rows"], small["usable"]) == (40, 40, 10, 10)
    assert long["epochs"] == pytest.approx(long["given"] / 40, abs=1e-6)
    assert small["epochs"] == pytest.approx(small["given"] / 10, abs=1e-6)
    assert long["examples"] == 3 * long["given"]
    assert long["unencoded"] == small["unencoded"] == 0, "all were, to count their examples"
    assert manifest["examples"] == long["examples"] + small["examples"]
    assert (manifest["seed"], manifest["max_epochs"], manifest["seq_length"]) == (7, 2, SEQ)
    assert manifest["contamination"]["ngram"] == 5
    source = json.loads((tmp_path / "out" / "source.json").read_text())
    assert source["examples"] == manifest["examples"]
    [manifest] = drawn(folders, tmp_path / "all", num_samples=95, max_epochs=2)
    long, small = manifest["sources"]
    # Half of 95 or more asked of ten rows: twenty at most, and the rest from the other.
    assert (small["given"], small["surplus"], small["received"]) == (20, small["asked"] - 20, 0)
    assert (long["given"], long["received"], long["surplus"]) == (75, 75 - long["asked"], 0)
    assert (small["epochs"], long["epochs"]) == (2.0, 1.875)
    assert (manifest["asked"], manifest["given"]) == (95, 95)
    assert manifest["redistributed"] == small["asked"] - 20


def test_rows_that_give_no_example_do_not_count_in_the_examples_a_row(
    tmp_path: Path, sentence_piece: Path
) -> None:
    whole = answers("question", 10)
    half = [{**record, "output": ""} if n % 2 else record for n, record in enumerate(whole)]
    sources = tuple(
        WeightedSource(name, str(write(tmp_path / f"{name}.jsonl", records)), 1.0)
        for name, records in (("whole", whole), ("half", half))
    )
    options: dict[str, Any] = {"tokenizer": str(sentence_piece), "seq_length": 64}
    [manifest] = sample(SampleConfig(tmp_path / "out", sources, num_samples=8, **options))
    assert [entry["examples_per_row"] for entry in manifest["sources"]] == [1.0, 1.0]
    assert [entry["given"] for entry in manifest["sources"]] == [4, 4]
    assert manifest["sources"][1]["no_example"]["no_target"] == 5


def test_rows_of_several_files_are_numbered_from_0_in_each(
    tmp_path: Path, sentence_piece: Path
) -> None:
    files = [write(tmp_path / f"{kind}.jsonl", answers(kind, 6)) for kind in ("red", "blue")]
    source = WeightedSource("src", ",".join(map(str, files)), 1.0)
    options: dict[str, Any] = {"tokenizer": str(sentence_piece), "seq_length": 64}
    [manifest] = sample(SampleConfig(tmp_path / "out", (source,), num_samples=8, **options))
    inputs = manifest["sources"][0]["inputs"]
    assert [(Path(i["path"]), i["rows"]) for i in inputs] == [(file, 6) for file in files]
    told = {f"{Path(i['path']).stem} {row}?" for i in inputs for row in i["taken"]}
    drawn = {json.loads(line)["instruction"] for line in (tmp_path / "out/sample.jsonl").open()}
    assert told == drawn and len(drawn) == 8


def test_excluded_sets_are_counted_and_not_drawn(tmp_path: Path, folders: dict[str, str]) -> None:
    exclude = (("goal", folders["goal"]),)
    first, second = drawn(folders, tmp_path / "out", per_source=8, exclude=exclude)
    [small] = second["sources"]
    assert (small["rows"], small["usable"], small["given"], small["asked"]) == (10, 6, 6, 8)
    assert small["contaminated"] == {"exact": 4, "prompt": 0, "ngram": 0}
    assert small["epochs"] == 1.0, "of those that may be drawn"
    assert (first["sources"][0]["unencoded"], small["unencoded"]) == (32, 0)
    assert (first["given"], second["max_epochs"], second["redistributed"]) == (8, 1, 0)
    [against] = second["contamination"]["against"]
    assert (against["name"], against["examples"]) == ("goal", 4)
    # A drawn folder counts as a source by what it was drawn from.
    assert drawn_from(tmp_path / "out" / "small") == 6
    assert drawn_from(tmp_path / "out" / "long") == 40
    assert drawn_from(Path(folders["small"])) is None
    folder = tmp_path / "out" / "long"
    pair = [
        ExampleSource(name, path, SEQ)
        for name, path in (("long", folder), ("goal", Path(folders["goal"])))
    ]
    goal = len(pair[1])
    assert natural_shares(pair) == pytest.approx([40 / (40 + goal), goal / (40 + goal)])
    config = Config(data=DataConfig(target_examples=10.0 * (40 + goal), max_epochs=20.0))
    config.train.global_batch_size = 8
    total = config.data.target_examples
    passes = epochs(config, pair, [0.25, 0.75])
    assert passes == pytest.approx([0.25 * total / 40, 0.75 * total / goal])
    assert caps(config, pair) == pytest.approx([20 * 40 / total, 20 * goal / total])


def test_a_row_that_repeats_a_test_is_no_less_one_where_it_was_not_selected(
    tmp_path: Path, folders: dict[str, str]
) -> None:
    source = WeightedSource("small", folders["small"], 1.0, selected=(2, 3, 4, 5))
    config = SampleConfig(
        tmp_path / "out", (source,), 2, exclude=(("goal", folders["goal"]),), train_on_prompt=True
    )
    [small] = sample(config)[0]["sources"]
    # Rows 0 to 3 repeat the set, 6 to 9 are the others that were not selected.
    assert (small["contaminated"]["exact"], small["not_selected"], small["usable"]) == (4, 4, 2)


def test_every_row_that_was_cut_is_counted(tmp_path: Path, folders: dict[str, str]) -> None:
    drawn(folders, tmp_path / "out", per_source=8, too_long="truncate")
    written = json.loads((tmp_path / "out" / "long" / "source.json").read_text())
    assert (written["truncated"], written["examples"]) == (8, 8)


def entry(
    name: str, weight: float, usable: int, asked: int, given: int, per_row: int = 1
) -> dict[str, Any]:
    return {
        "examples_per_row": float(per_row), "examples": given * per_row,
        "name": name, "weight": weight, "rows": usable + 1336, "usable": usable, "asked": asked,
        "given": given, "surplus": max(0, asked - given), "received": max(0, given - asked),
        "epochs": given / max(usable, 1), "contaminated": {"exact": 1300, "prompt": 20, "ngram": 0},
        "no_example": {"empty": 6, "no_target": 0, "too_long": 7}, "not_selected": 3,
    }  # fmt: skip


def shown(folders: dict[str, str], sources: list[dict[str, Any]], **options: Any) -> Any:
    weights = tuple(WeightedSource(e["name"], folders["small"], e["weight"]) for e in sources)
    config = SampleConfig(Path("out"), weights, **options)
    manifest = {
        "sources": sources, "redistributed": sum(e["surplus"] for e in sources),
        "asked": sum(e["asked"] for e in sources), "given": sum(e["given"] for e in sources),
        "contamination": {"against": [{"name": "goal"}, {"name": "test"}], "ngram": 13,
                          "ngram_of": "words", "short_examples": 2, "ignored_ngrams": 0,
                          "ignored_phrases": []},
        "sample_sha256": "x",
        "tokenizer": {},
    }  # fmt: skip
    return [manifest], config


def test_the_table_shows_the_manifest(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [entry("web", 3.0, 8000, 6000, 7000), entry("math", 1.0, 500, 3000, 2000)]
    given = shown(folders, sources, num_samples=9000)
    Console(width=120).print(command.sample_table(*given))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    heads = ["source", "weight", "rows", "usable", "asked", "given", "epochs", "left", "out"]
    assert heads in rows
    assert ["web", "0.7500", "9,336", "8,000", "6,000", "7,000", "0.88", "1,300", "exact"] in rows
    assert ["math", "0.2500", "1,836", "500", "3,000", "2,000", "4.00", "1,300", "exact"] in rows
    for words in ("20 prompt", "6 empty", "7 too_long", "3 not selected"):
        assert rows.count(words.split()) == 2
    Console(width=120).print(
        command.sample_table(given[0], shown(folders, sources, per_source=9)[1])
    )
    assert "web - 9,336" in " ".join(capsys.readouterr().out.split())


def test_remarks_tell_what_was_moved_and_what_is_missing(folders: dict[str, str]) -> None:
    sources = [entry("web", 3.0, 8000, 6000, 7000), entry("math", 1.0, 500, 3000, 2000)]
    lines = command.remarks(*shown(folders, sources, num_samples=9000, max_epochs=3))
    assert lines[0] == (
        "warning: not in the proportions asked for: web 77.8% for 75.0%, math 22.2% for 25.0%; "
        "about --num-samples 6,000 keeps them, or more --max-epochs"
    )  # 3 epochs of 500 rows are a quarter of 6,000
    assert lines[1].startswith(
        "1,000 rows beyond 3 epochs of math were taken from the other sources"
    )
    assert lines[2] == "compared with goal, test" and len(lines) == 6
    assert lines[5] == (
        "2 of their examples have fewer than 8 words: rows are found only if they equal one or "
        "have its prompt"
    )
    gone = [entry("web", 3.0, 8000, 6000, 8000), entry("math", 1.0, 0, 3000, 0)]
    [line, *_] = command.remarks(*shown(folders, gone, num_samples=9000))
    assert line.endswith(
        "math 0.0% for 25.0%; all rows of math are left out, for the reasons above"
    )
    near = [entry("web", 3.0, 8000, 6000, 7600), entry("math", 1.0, 500, 3000, 2400)]
    lines = command.remarks(*shown(folders, near, num_samples=9000))
    assert not lines[0].startswith("warning"), "within two per cent of the whole"
    pieces = [entry("web", 1.0, 1000, 100, 100, 9), entry("math", 1.0, 1000, 900, 900)]
    lines = command.remarks(*shown(folders, pieces, num_samples=1000))
    assert not lines[0].startswith("warning"), "weights are of examples"
    pieces[1] |= entry("math", 1.0, 100, 900, 400)
    lines = command.remarks(*shown(folders, pieces, num_samples=1000, max_epochs=4))
    assert lines[0].startswith("warning: not in the proportions asked for: web 69.2% for 50.0%")
    assert "; about --num-samples 444 keeps them" in lines[0]  # 400 rows of math, 44 of web
    short = [entry("web", 3.0, 800, 6000, 3200), entry("math", 1.0, 400, 2000, 1100)]
    lines = command.remarks(*shown(folders, short, num_samples=8000, max_epochs=4))
    assert "3,700 rows fewer than asked: the sources have no more, 4 times each" in lines
    _, config = shown(folders, short, per_source=6000)
    each = [shown(folders, [one], per_source=6000)[0][0] for one in short]
    lines = command.remarks(each, config)
    assert lines[0] == "3,700 rows fewer than asked: the sources have no more"


def test_progress_lines_tell_the_share_of_the_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = command._Lines(Console(width=120, stderr=True))
    lines("reading", Progress("web", 30, 120, 1500))
    assert capsys.readouterr().err == "", "nothing for what is quick"
    lines._next = 0.0
    lines("reading", Progress("web", 30, 120, 1500))
    assert capsys.readouterr().err == "sample: reading web 25 %, 1,500 rows\n"


# flag: (what it gives, the field, its value); each is not the default
FLAGS: list[tuple[list[str], str, Any]] = [
    (["--exclude", "t=x.jsonl"], "exclude", (("t", "x.jsonl"),)),
    (["--ngram", "8"], "ngram", 8),
    (["--max-epochs", "3"], "max_epochs", 3),
    (["--seed", "5"], "seed", 5),
    (["--from-tokens"], "from_tokens", True),
    (["--tokenizer", "t.model"], "tokenizer", "t.model"),
    (["--seq-length", "77"], "seq_length", 77),
    (["--format", "alpaca"], "format", "alpaca"),
    (["--text-key", "body"], "text_key", "body"),
    (["--too-long", "drop"], "too_long", "drop"),
    (["--train-on-prompt"], "train_on_prompt", True),
    (["--chat-template", "plain"], "chat_template", "plain"),
    (["--workers", "3"], "workers", 3),
    (["--overwrite"], "overwrite", True),
]


def test_flags_reach_what_they_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SampleConfig] = []

    def stop(config: SampleConfig, display: Any) -> None:
        seen.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "sample", stop)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out = tmp_path / "out"
    given = ["--out", str(out), "--input", "a=x", "--input", "b=y", "--weights", "b=1", "a=3"]
    sources = (WeightedSource("b", "y", 1.0), WeightedSource("a", "x", 3.0))
    for words, field, value in [([], "num_samples", 9), *FLAGS]:
        command.run(parser.parse_args([*given, "--num-samples", "9", *words]))
        assert seen.pop() == SampleConfig(**{
            "out": out, "sources": sources, "num_samples": 9, field: value,
        })  # fmt: skip
    command.run(parser.parse_args([*given, "--per-source", "4"]))
    assert seen.pop() == SampleConfig(out, sources, per_source=4)
    defaults = SampleConfig(out, sources, 9)
    assert (defaults.seed, defaults.max_epochs, defaults.ngram) == (1234, 4, 13)


@pytest.mark.parametrize(("holders", "examples", "convicts"), [
    (10, 30, True), (11, 30, False),  # of many, more than ten
    (3, 6, True), (4, 6, False),  # of few, more than half
    (1, 1, True),
])  # fmt: skip
def test_ngrams_of_many_examples_are_phrases(holders: int, examples: int, convicts: bool) -> None:
    phrase = "these are some words that stand in a number of examples of it"
    evaluation: list[Text | Dialogue] = [
        Text(" ".join(f"w{n}x{k}" for k in range(20)) + (f" {phrase}" if n < holders else ""))
        for n in range(examples)
    ]
    ids, index = WordIds(), EvaluationIndex(13)
    for example in evaluation:
        index.add(*ids.learn(whole_text(example), prompt_text(example)))
    index.close()
    found = index.kind(*ids.of(f"Look: {phrase}.", ""))
    assert found == ("ngram" if convicts else None)
    # A phrase takes the twelve n-grams that reach into it with it, of each example its own.
    assert index.ignored_ngrams == (0 if convicts else 1 + 12 * holders)
