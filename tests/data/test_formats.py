from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_scalebio.data import records
from megatron_scalebio.data.examples import Dialogue, Text, Turn
from megatron_scalebio.data.formats import detect_format, parse_record, read_examples
from megatron_scalebio.data.record_fields import RecordOptions, parse_columns
from megatron_scalebio.data.records import RecordReader
from megatron_scalebio.errors import UserError

RECORDS: list[dict[str, Any]] = [
    {"text": 'one\ntwo, "quoted" \\ é中😀 ] } [ {'},
    {"text": "", "n": -12.5e3, "deep": {"a": [1, {"b": None}], "t": True}},
    {"text": "x" * 300},
]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_array_is_read_alike_in_blocks_of_any_size(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    indent: int | None,
    ascii_only: bool,
) -> None:
    monkeypatch.setattr(records, "_READ_CHARS", block)
    text = json.dumps(RECORDS, indent=indent, ensure_ascii=ascii_only)
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf" + text.encode() + b" \n")
    found = list(RecordReader(path))
    assert [r.value for r in found] == RECORDS
    lines = enumerate(text.split("\n"), start=1)
    starts = [1, 1, 1] if indent is None else [n for n, line in lines if line == "  {"]
    assert [r.line for r in found] == starts


def test_jsonl_equals_array(tmp_path: Path) -> None:
    lines = "\ufeff" + "\n\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS)
    reader = RecordReader(write(tmp_path / "a.jsonl", lines))
    found = list(reader)
    assert [r.value for r in found] == RECORDS
    assert [r.line for r in found] == [1, 3, 5]
    assert reader.bytes_read == len(lines.encode())


def test_empty_array_and_blank_file_hold_nothing(tmp_path: Path) -> None:
    for content in ("[]", " [ \n ] ", " \n\t"):
        assert list(RecordReader(write(tmp_path / "a.json", content))) == []


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ('{"text": "a"}\n{"text": b}\n', 2, "malformed JSON"),
        ('{"text": "a"}\n[1]\n', 2, "not a JSON object"),
        ('{"text": "a"} {"text": "b"}\n', 1, "malformed JSON"),
        ('{\n  "text": "pretty printed"\n}', 1, "malformed JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', 2, "not UTF-8"),
        ('[\n{"text": "a"},\n{"text": a"}\n]', 3, "malformed JSON"),
        ('[\n{"text":\n "a" "b"}\n]', 3, "malformed JSON"),
        ('[\n{"text": "a"}\n{"text": "b"}\n]', 3, "expecting ',' or ']'"),
        ('[\n{"text": "a"},\n]', 3, "expecting an object"),
        ('[\n{"text": "a"},\n"b"]', 3, "expecting an object"),
        ('[\n{"text": "a"},\n', 3, "end of file"),
        ('[\n{"text": "a"}\n', 3, "expecting ',' or ']'"),
        ('[\n{"text": "a', 2, "malformed JSON"),
        ('[\n{"text": "a"}\n]\n{}', 4, "after the end"),
        (b'[\n{"text": "a"},\n{"text": "\xff"}]', 3, "not UTF-8"),
        ('{"a":' + "[" * 200_000, 1, "nested too deeply"),
        ('[\n{"a":' + "[" * 200_000, 2, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("block", [5, 1 << 20])
def test_malformed_content_names_file_and_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: str | bytes,
    line: int,
    words: str,
    block: int,
) -> None:
    monkeypatch.setattr(records, "_READ_CHARS", block)
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(UserError) as error:
        list(RecordReader(path))
    assert str(error.value).startswith(f"{path}:{line}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_malformed_array_is_reported_without_reading_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"text": oops}' + "," + " " * (5 << 20))
    reader = RecordReader(path)
    with pytest.raises(UserError):
        list(reader)
    assert reader.bytes_read <= 1 << 20


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: cannot read"):
        list(RecordReader(tmp_path / "nowhere.json"))


DIALOGUE = Dialogue((("system", "s"), ("user", "u"), ("assistant", "a")))
DIALOGUE_OF_TWO = Dialogue((("user", "u"), ("assistant", "a")))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("text", {"text": "t", "url": "no text"}, Text("t")),
        (
            "alpaca",
            {"instruction": "i", "input": "", "output": "o", "text": "i o"},
            Dialogue((("user", "i"), ("assistant", "o"))),
        ),
        (
            "alpaca",
            {"instruction": "i", "input": "x", "output": "o"},
            Dialogue((("user", "i\n\nx"), ("assistant", "o"))),
        ),
        ("pairs", {"prompt": "u", "completion": "a", "id": 3}, DIALOGUE_OF_TWO),
        ("pairs", {"question": "u", "answer": "a"}, DIALOGUE_OF_TWO),
        (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": t} for t in ("", "u")]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            Dialogue((Turn("user", "u", parts=("", "u")), Turn("assistant", "a"))),
        ),
        *[
            (
                "sharegpt",
                {key: [{"from": f, "value": v} for f, v in turns]},
                DIALOGUE,
            )
            for key, turns in (
                ("items", [("system", "s"), ("human", "u"), ("gpt", "a")]),
                ("conversations", [("System", "s"), ("user", "u"), ("assistant", "a")]),
            )
        ],
        *[
            (
                "messages",
                {
                    key: [
                        {"role": r, "content": c} for r, c in [turn[:2] for turn in DIALOGUE.turns]
                    ]
                },
                DIALOGUE,
            )
            for key in ("messages", "conversations")
        ],
        ("messages", {"messages": []}, Dialogue(())),
    ],
)
def test_formats_are_detected_and_parsed(
    name: str, value: dict[str, Any], expected: Text | Dialogue
) -> None:
    assert detect_format(value, "f:1") == name
    assert parse_record(value, name, "f:1") == expected


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("text", {"content": "t"}, "missing field 'text'"),
        ("text", {"text": None}, "field 'text' is null"),
        ("alpaca", {"instruction": "i"}, "missing field 'output'"),
        ("alpaca", {"instruction": "i", "output": 3}, "field 'output' is a number"),
        ("sharegpt", {"messages": []}, "missing field 'items or conversations'"),
        ("sharegpt", {"items": "x"}, "not a list"),
        ("sharegpt", {"items": ["x"]}, "items[0]: turn is not an object"),
        ("sharegpt", {"items": [{"from": "human"}]}, "items[0]: missing field 'value'"),
        ("messages", {"messages": [{"role": "wizard", "content": ""}]}, "unknown role 'wizard'"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0]: a part of the content is of type 'image_url'",
        ),
        ("pairs", {"prompt": "p"}, "missing field 'completion'"),
        ("csv", {}, "unknown format 'csv'"),
    ],
)
def test_bad_records_name_place_and_field(name: str, value: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_record(value, name, "file.jsonl:7")
    assert words in str(error.value)
    assert name == "csv" or str(error.value).startswith("file.jsonl:7")


def test_unknown_format_lists_the_fields() -> None:
    with pytest.raises(UserError, match=r"f:3: unknown record format.*chosen, prompt"):
        detect_format({"prompt": "q", "chosen": "a"}, "f:3")


def test_a_column_that_is_not_there_is_named() -> None:
    options = RecordOptions(columns=parse_columns(["instruction=qestion,output=reply"]))
    words = r"no field 'qestion', which --map names.*: question, reply"
    with pytest.raises(UserError, match=words):
        detect_format({"question": "q", "reply": "a"}, "f:3", options)


def test_text_key_and_lone_surrogates(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"body": "cut \\ud83d emoji", "text": "no"}\n')
    (example,) = read_examples(path, RecordOptions(text_key="body", ignore_fields=("text",)))
    assert example == Text("cut \ufffd emoji")
