"""`show`, the date of a template and what `prepare` says on screen, from the command line."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_scalebio.cli import main


def jsonl(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def prepared(tmp_path: Path, tokenizer: Path, source: Path, *words: str) -> Path:
    out = tmp_path / "out"
    assert main(["prepare", "--tokenizer", str(tokenizer), "--input", f"s={source}", "--out",
                 str(out), *words]) == 0  # fmt: skip
    return out / "s"


def test_show_marks_what_trains_and_says_where_it_is_from(
    tmp_path: Path, byte_level: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = jsonl(tmp_path / "a[b].jsonl", chat("One [x]?", "Yes"), chat("Two?", " "),
                   {"no": 1}, chat("Three?", "No"))  # fmt: skip
    folder = prepared(tmp_path, byte_level, source, "--bad-records", "skip")
    capsys.readouterr()
    assert main(["show", str(folder), "--rows", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{source}:1\n" in said and f"{source}:4\n" in said
    told = re.findall(r"^([01]) of 2 · (\d+) of (\d+) tokens train ·", said, re.M)
    mask = np.fromfile(folder / "loss_mask.bin", np.uint8)  # of both examples
    assert [number for number, _, _ in told] == ["0", "1"]
    assert [sum(int(each[k]) for each in told) for k in (1, 2)] == [mask.sum(), len(mask)]
    assert "user\nOne [x]?<|im_end|>\n<|im_start|>assistant\n⟦Yes<|im_end|>⟧\n" in said
    assert "left out: 1 no_target" in said and f"  {source}:2: no_target\n" in said
    assert "left out: 1 missing field" in said and f"  {source}:3: missing field 'messages" in said
    assert main(["show", str(folder), "--from", "1", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("line") for line in lines] == [4, None, None]
    assert lines[0]["pieces"][-1] == {"text": "No<|im_end|>", "trains": True}
    assert (str(lines[0]["targets"]), str(lines[0]["tokens"])) == told[1][1:]
    assert lines[0]["text"] == "".join(piece["text"] for piece in lines[0]["pieces"])
    assert [line["left_out"]["line"] for line in lines[1:]] == [2, 3]


def test_examples_beyond_the_last_are_not_nothing(
    tmp_path: Path, byte_level: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path, byte_level, jsonl(tmp_path / "a.jsonl", chat("One?", "Yes")))
    assert main(["show", str(folder), "--from", "1"]) == 2
    assert "--from: 1 is beyond the last example (give 0 or less)" in capsys.readouterr().err
    assert main(["show", str(folder), "--from", "0"]) == 0
    told = json.loads((folder / "source.json").read_text())
    told["tokenizer"]["model"] = str(tmp_path / "moved away")
    (folder / "source.json").write_text(json.dumps(told))
    assert main(["show", str(folder)]) == 2
    assert main(["show", str(folder), "--tokenizer", str(byte_level)]) == 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda f: (f / "source.json").unlink(),
            ": is not a prepared folder: source.json is missing",
        ),
        (lambda f: (f / "tokens.idx").write_bytes(b"x"), "/tokens.idx: not a whole Megatron index"),
        (lambda f: (f / "loss_mask.bin").write_bytes(b"x"), "/loss_mask.bin: truncated"),
        (lambda f: (f / "rows.npy").write_bytes(b"x"), "/rows.npy: is damaged"),
        (lambda f: (f / "rows.npy").write_bytes(b""), "/rows.npy: is damaged"),
        (lambda f: np.save(f / "rows.npy", np.zeros(3)), "/rows.npy: is damaged"),
        (lambda f: np.save(f / "rows.npy", np.array("x")), "/rows.npy: is damaged"),
        (lambda f: (f / "left_out.jsonl").write_bytes(b"\xff"), "/left_out.jsonl: is damaged"),
        (lambda f: (f / "left_out.jsonl").write_text("[]"), "/left_out.jsonl: is damaged"),
        (lambda f: (f / "left_out.jsonl").write_text('{"why": 1}'), "/left_out.jsonl: is damaged"),
        (lambda f: (f / "left_out.jsonl").write_text("[" * 99999), "/left_out.jsonl: is damaged"),
        (lambda f: change(f / "source.json", inputs=[{}]), "/source.json: is damaged"),
        (lambda f: change(f / "source.json", inputs=5), "/source.json: is damaged"),
        (lambda f: (f / "source.json").write_text("[]"), "/source.json: is not a JSON object"),
    ],
)
def test_show_refuses_other_folders(
    tmp_path: Path, byte_level: Path, capsys: pytest.CaptureFixture[str], damage: Any, words: str
) -> None:
    folder = prepared(tmp_path, byte_level, jsonl(tmp_path / "a.jsonl", chat("One?", "Yes")))
    damage(folder)
    assert main(["show", str(folder)]) == 2
    assert f"{folder}{words}" in capsys.readouterr().err


def test_show_refuses_the_words_of_another_tokenizer(
    tmp_path: Path, byte_level: Path, border_merging: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared(tmp_path, byte_level, jsonl(tmp_path / "a.jsonl", chat("One?", "Yes")))
    assert main(["show", str(folder), "--tokenizer", str(border_merging)]) == 2
    words = f"{border_merging}: is not the tokenizer that {folder} was prepared with"
    assert words in capsys.readouterr().err


def test_prepare_says_what_was_cut_left_out_and_not_used(
    tmp_path: Path, byte_level: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw[1]"
    raw.mkdir()
    (raw / "notes.md").write_text("x")
    jsonl(raw / "a.jsonl", chat("One?", "yes " * 40, id=1), chat("long " * 40, "x"), {"no": 1})
    words = ("--seq-length", "32", "--bad-records", "skip", "--workers", "64")
    folder = prepared(tmp_path, byte_level, raw, *words)
    said = capsys.readouterr().out
    assert "--workers 64: " in said and "as many as there are cores" in said
    assert f"s: not read, being of no known kind: {raw}/notes.md" in said
    assert "s: fields not used: id (1)" in said
    assert f"s: 1 missing field left out, listed in {folder}/left_out.jsonl" in said
    assert "s: 1 prompt_too_long: the prompt alone fills --seq-length 32" in said
    assert "warning: s: 1 of 1 examples lost their end; --seq-length" in said
    [advised] = map(int, re.findall(r"--seq-length (\d+) would hold the longest", said))
    for length, cut in ((advised, False), (advised - 1, True)):
        words = ("--seq-length", str(length), "--bad-records", "skip", "--overwrite")
        prepared(tmp_path, byte_level, raw, *words)
        assert ("lost their end" in capsys.readouterr().out) == cut, length


class Tomorrow(datetime.date):
    @classmethod
    def today(cls) -> datetime.date:
        return datetime.date(2031, 12, 2)


class Today(datetime.date):
    @classmethod
    def today(cls) -> datetime.date:
        return datetime.date(2031, 12, 1)


def test_the_day_of_prepare_stays(
    tmp_path: Path, byte_level: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d.%m.%Y') }}{% for m in messages %}"
                        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
                        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
                        )  # fmt: skip
    source = jsonl(tmp_path / "a.jsonl", *(chat(f"Q{k}?", f"A{k}") for k in range(5)))
    words = ("--chat-template", str(template))
    monkeypatch.setattr(datetime, "date", Today)
    folder = prepared(tmp_path, byte_level, source, *words)
    before = json.loads((folder / "source.json").read_text())
    assert before["date"] == "2031-12-01"
    monkeypatch.setattr(datetime, "date", Tomorrow)
    arguments = ["sample", "--input", f"s={folder}", "--weights", "s=1", "--num-samples", "3",
                 "--out", str(tmp_path / "drawn"), *words]  # fmt: skip
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(["show", str(tmp_path / "drawn"), "--json"]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert json.loads(line)["text"].startswith("01.12.2031<|im_start|>")
    (tmp_path / "later").mkdir()
    second = prepared(tmp_path / "later", byte_level, source, *words)
    arguments = ["sample", "--input", f"s={folder}", "--input", f"t={second}", "--weights", "s=1",
                 "t=1", "--num-samples", "6", "--max-epochs", "1", "--out",
                 str(tmp_path / "both"), *words]  # fmt: skip
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(["show", str(tmp_path / "both"), "--rows", "6", "--json"]) == 0
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(text[:10] for text in texts) == ["01.12.2031"] * 3 + ["02.12.2031"] * 3
    again = prepared(tmp_path, byte_level, source, *words, "--overwrite")
    after = json.loads((again / "source.json").read_text())
    assert after["fingerprint"] == before["fingerprint"]
