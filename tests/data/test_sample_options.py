"""`sample` reads records as `prepare` did, without being told again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_scalebio.cli import main
from megatron_scalebio.data.sources import ExampleSource
from tests.data.sample_world import write

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_options_of_prepare_need_no_repeating(
    tmp_path: Path, byte_level: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One source alone was cut otherwise, so that this is not taken over."""
    monkeypatch.chdir(tmp_path)
    Path("t.jinja").write_text(TEMPLATE)
    for name, more in (("a", []), ("b", ["--too-long", "drop"])):
        rows = [{"ask": f"{name} {i}", "output": f"so {i}"} for i in range(20)]
        write(tmp_path / f"{name}.jsonl", rows)
        words = ["--tokenizer", str(byte_level), "--input", f"{name}={name}.jsonl"]
        words += ["--map", "instruction=ask", "--train-on-prompt", "--chat-template", "t.jinja"]
        assert main(["prepare", *words, *more, "--out", "data"]) == 0
    told = json.loads(Path("data/b/source.json").read_text())["options"]
    assert told["too_long"] == "drop" and told["chat_template"] == str(tmp_path / "t.jinja")
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    words = ["sample", "--input", "a=../data/a", "--input", "b=../data/b", "--num-samples", "20"]
    words += ["--weights", "a=1", "b=1"]
    assert main([*words, "--out", "o"]) == 0
    drawn = [ExampleSource("o", Path("o"), 99).example(i) for i in range(20)]
    of_a = ExampleSource("a", Path("../data/a"), 99)
    whole = {tuple(of_a.example(i)[0]) for i in range(20)}
    assert sum(tuple(tokens) in whole for tokens, _ in drawn) == 10
    assert all(mask[1:].all() for _, mask in drawn), "every token of a dialogue is a target"
    assert main([*words, "--out", "p", "--chat-template", "plain"]) == 2
