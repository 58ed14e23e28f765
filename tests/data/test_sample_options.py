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


def test_sources_may_be_a_list_of_files_and_not_standard_input(
    tmp_path: Path, byte_level: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(5)])
    (tmp_path / "list").write_text("a.jsonl\nb.jsonl\n")
    words = ["sample", "--num-samples", "10", "--tokenizer", str(byte_level), "--weights", "s=1"]
    words += ["--max-epochs", "1", "--out", str(tmp_path / "o"), "--input"]
    assert main([*words, f"s=@{tmp_path / 'list'}", "--workers", "999"]) == 0
    assert "--workers 999: " in capsys.readouterr().out
    drawn = {json.loads(line)["text"] for line in (tmp_path / "o/sample.jsonl").open()}
    assert drawn == {f"{name} {i}" for name in "ab" for i in range(5)}
    capsys.readouterr()
    assert main([*words, "s=-", "--overwrite"]) == 2
    assert "standard input can be read only once" in capsys.readouterr().err
    assert main([*words, "s=@nowhere", "--overwrite"]) == 2
    assert "nowhere: cannot read the list: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["NaN", "1e999", "-Infinity"])
def test_a_sample_is_json_whatever_its_records_hold(
    tmp_path: Path, byte_level: Path, number: str
) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "meta": {{"x": [{number}, 1.5]}}}}\n' * 3)
    words = ["sample", "--num-samples", "3", "--tokenizer", str(byte_level), "--weights", "s=1"]
    words += ["--input", f"s={tmp_path / 'a.jsonl'}", "--out", str(tmp_path / "o")]
    assert main(words) == 0
    for line in (tmp_path / "o/sample.jsonl").open():
        found = json.loads(line, parse_constant=pytest.fail)["meta"]["x"]
        assert found == [number.replace("1e999", "Infinity"), 1.5]
