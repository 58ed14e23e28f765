"""What the command tells of itself: the next step, the usual options, a first run.yaml."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_scalebio.cli import COMMANDS, main
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.data.sources import repeated_data
from tests.commands import the_only_line
from tests.markov import write_source

Capture = pytest.CaptureFixture[str]


def help_of(capsys: Capture, *words: str) -> str:
    with pytest.raises(SystemExit, match="0"):
        main([*words])
    return capsys.readouterr().out


def flags(text: str) -> list[str]:
    """Those that have a line, without help's own."""
    lines = [line.split() for line in text.splitlines() if line.startswith("  -")]
    return [line[0].rstrip(",") for line in lines if line[0] not in ("-h,", "--help-all")]


def test_without_arguments_it_says_what_to_do(capsys: Capture) -> None:
    assert main([]) == 0
    told = capsys.readouterr().out
    assert "megatron-scalebio init DATA" in told and "--help" in told


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_the_usual_options_and_help_all_every_one(capsys: Capture, command: str) -> None:
    usual = help_of(capsys, command, "--help")
    assert len(flags(usual)) <= 10
    if "--help-all" not in usual:
        return
    every = help_of(capsys, command, "--help-all")
    assert f"and {len(flags(every)) - 10} more options: " in usual
    assert len(flags(usual)) == 10 and set(flags(usual)) < set(flags(every))
    assert "more options" not in every


def test_the_shell_learns_every_command_and_option(capsys: Capture, tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "tcsh"):
        assert main(["completion", shell]) == 0
        script = capsys.readouterr().out
        words = ["--adam-beta1", "--train-sentencepiece", "--hf-reference", *COMMANDS]
        if shell == "tcsh":  # which adds the dashes
            words = [word.removeprefix("--") for word in words]
        assert all(word in script for word in words)
        if shell == "bash":
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)


# ---- init ------------------------------------------------------------------------------------


def names(entries: list) -> list[tuple[str, str]]:
    return [(entry.name, entry.path) for entry in entries]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to start from, on a machine without a GPU, with two files, a goal and a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    raw = tmp_path / "raw"
    (raw / "math" / "deep").mkdir(parents=True)
    for name in ("chat data.jsonl.gz", "math/deep/a.parquet", "val.json", "a-test.csv", "README"):
        (raw / name).touch()
    return tmp_path


def test_init_writes_the_run_and_the_commands_before_it(here: Path, capsys: Capture) -> None:
    assert main(["init", "raw"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == ["sources: chat-data, math", "validation: val", "test: a-test"]
    config = load_config("run.yaml")
    config.validate(1)
    assert names(config.data.sources) == [("chat-data", "data/chat-data"), ("math", "data/math")]
    assert names(config.data.validation) == [("val", "data/val")]
    assert names(config.data.test) == [("a-test", "data/a-test")]
    assert (config.model.num_layers, config.train.global_batch_size) == (2, 16), "on a CPU"
    assert not config.parallel.bf16
    prepare, reweight = (shlex.split(line) for line in told[-2:])
    assert prepare[:4] == ["megatron-scalebio", "prepare", "--out", "data"]
    assert prepare[prepare.index("--seq-length") + 1] == str(config.data.seq_length) == "256"
    given = [word for word, flag in zip(prepare[1:], prepare, strict=False) if flag == "--input"]
    assert given == ["a-test=raw/a-test.csv", "chat-data=raw/chat data.jsonl.gz", "math=raw/math",
                     "val=raw/val.json"]  # fmt: skip
    assert prepare[prepare.index("--train-sentencepiece") + 1] == "300", "of a small text"
    assert "tokens of an example, as prepared" in Path("run.yaml").read_text()
    assert reweight == ["megatron-scalebio", "reweight", "--config", "run.yaml"]
    assert all(f"#   {line.strip()}" in Path("run.yaml").read_text() for line in told[-2:])
    assert main(["init", "raw"]) == 2 and "run.yaml: is there already" in capsys.readouterr().err
    assert main(["init", "raw", "--overwrite", "--validation", "math", "val"]) == 2
    assert "one source alone" in capsys.readouterr().err, "and a-test is one for testing"
    (here / "raw" / "more.json").touch()
    assert main(["init", "raw", "--overwrite", "--validation", "math"]) == 0
    config = load_config("run.yaml")
    assert [source.name for source in config.data.sources] == ["chat-data", "more", "val"]
    assert [source.name for source in config.data.validation] == ["math"]


def test_init_takes_what_is_prepared_as_it_is(here: Path, capsys: Capture) -> None:
    rows = [np.arange(9)] * 3
    for name in ("one", "goal"):
        write_source(here / "data", name, rows)
    source = here / "data" / "one" / "source.json"
    source.write_text(json.dumps({**json.loads(source.read_text()), "seq_length": 48}))
    for suffix in ("idx", "bin"):
        (here / "data" / f"web.{suffix}").touch()
    assert main(["init", "data"]) == 0
    said = capsys.readouterr().out
    assert "prepare" not in said and "model.vocab_size: 32000 is a guess" in said
    config = load_config("run.yaml")
    assert names(config.data.sources) == [("one", "data/one"), ("web", "data/web")]
    assert config.data.seq_length == 48 and config.model.vocab_size == 32000


def test_init_quotes_what_yaml_would_take_for_something_else(here: Path) -> None:
    for name in ("1", "null", "goal"):
        write_source(here / "📚", name, [np.arange(9)] * 3)
    assert main(["init", "📚"]) == 0
    config = load_config("run.yaml")
    assert names(config.data.sources) == [("1", "📚/1"), ("null", "📚/null")]


def test_init_tells_languages_apart(here: Path) -> None:
    (here / "two").mkdir()
    for name in ("web.en.parquet", "web.de.jsonl.gz", "goal.de.jsonl", "v1.0.idx", "v1.0.bin"):
        (here / "two" / name).touch()
    assert main(["init", "two"]) == 0
    data = load_config("run.yaml").data
    assert names(data.sources) == [
        ("v1.0", "two/v1.0"), ("web.de", "data/web.de"), ("web.en", "data/web.en"),
    ]  # fmt: skip
    assert names(data.validation) == [("goal.de", "data/goal.de")]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (
            ["raw", "--validation", "goals"],
            "--validation: 'goals' is not in raw (a-test, chat-data",
        ),
        (["raw/math"], "raw/math: one source alone beside the validation and test sets (found: "),
        (["none"], "none: no source beside the validation and test sets (found: nothing"),
        (["deep"], "deep/*/*.idx', name: '{parent}/{stem}'}})"),
        (["plain"], """plain text is not read: write JSONL, {"text": "..."} a line)"""),
        (["raw", "--hf", "raw"], "raw/config.json: No such file"),
        (["twice"], "twice: two sets are called 'math' (rename one)"),
        (["odd"], "odd/数学.json: '' cannot name a source or a set (use A-Z"),
        (["tools"], "tools/c.json:1: has tools, which the chat template of a model renders (name"),
    ],
)
def test_init_refuses(here: Path, capsys: Capture, words: list[str], answer: str) -> None:
    for name in ("odd", "none", "twice", "deep/topic", "plain", "tools"):
        (here / name).mkdir(parents=True)
    for name in ("deep/topic/a.idx", "deep/topic/a.bin", "plain/a.txt"):
        (here / name).touch()
    for name in ("math.json", "math.csv", "web.json", "goal.json"):
        (here / "twice" / name).touch()
    for name in ("a", "数学", "goal"):
        (here / "odd" / f"{name}.json").touch()
    for name in ("a", "c", "goal"):
        turns = [{"role": "user", "content": name}, {"role": "assistant", "content": "1"}]
        record = {"messages": turns} | ({"tools": [{"name": "f"}]} if name == "c" else {})
        (here / "tools" / f"{name}.json").write_text(json.dumps(record))
    assert main(["init", *words]) == 2
    assert answer in the_only_line(capsys.readouterr().err)
    assert not Path("run.yaml").exists()


def test_init_asks_which_set_is_the_goal(here: Path, capsys: Capture) -> None:
    (here / "raw" / "val.json").rename(here / "raw" / "values.json")
    assert main(["init", "raw"]) == 2
    line = the_only_line(capsys.readouterr().err)
    assert "among a-test, chat-data, math, values says" in line and "--validation NAME" in line


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["reweight", "--learning-rate", "1e-3"], "did you mean --lr?"),
        (["reweight", "--max-steps=5"], "did you mean --train-iters?"),
        (["convert", "--learning-rate", "1"], "--help"),
        (["reprot", "run"], "'reprot' is not a command (did you mean report?)"),
    ],
)
def test_words_of_other_tools_are_understood(capsys: Capture, words: list[str], meant: str) -> None:
    assert main(words) == 2
    assert meant in the_only_line(capsys.readouterr().err)


def test_a_reader_that_ends_first_is_no_crash() -> None:
    """As `head` does."""
    command = [sys.executable, "-m", "megatron_scalebio", "completion", "bash"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_data_that_stand_twice_are_named() -> None:
    def of(name: str, fingerprint: str) -> Any:
        return SimpleNamespace(name=name, fingerprint=fingerprint)

    sources = [of("a", "x"), of("b", "y"), of("c", "x")]
    assert not repeated_data(sources[:2], [of("goal", "z")])
    twice, goal = repeated_data(sources, [of("goal", "y"), of("other", "z")])
    assert twice.startswith("sources a, c hold the same examples")
    assert goal.startswith("validation set 'goal' holds the examples of source 'b'")
