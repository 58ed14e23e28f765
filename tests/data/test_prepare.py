from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_scalebio.commands import prepare as prepare_cli
from megatron_scalebio.data.encode_pool import cut
from megatron_scalebio.data.inputs import parse_input
from megatron_scalebio.data.load_tokenizer import load_tokenizer
from megatron_scalebio.data.prepare import (
    PrepareConfig,
    Progress,
    SourceInput,
    prepare,
)
from megatron_scalebio.errors import UserError
from tests.data.preparing import DIALOGUES, config, digests, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def examples(folder: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    tokens, mask = (IndexedDataset(str(folder / part)) for part in ("tokens", "loss_mask"))
    assert len(tokens) == len(mask) == len(tokens.document_indices) - 1
    assert list(tokens.document_indices) == list(range(len(tokens) + 1))
    assert tokens[0].dtype == np.uint16 and mask[0].dtype == np.uint8
    # Copies: Megatron's arrays are views of a memory map that ends with the dataset.
    return [(tokens[i].copy(), mask[i].copy()) for i in range(len(tokens))]


def test_what_is_written_and_counted(tmp_path: Path, sentence_piece: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DIALOGUES)
    seen: list[Progress] = []
    (report,) = prepare(config(tmp_path / "out", sentence_piece, source), seen.append)
    folder = tmp_path / "out" / "src"
    assert json.loads((folder / "source.json").read_text()) == report
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["src"]
    found = examples(folder)
    assert report["examples"] == len(found) == 3
    assert report["dropped"] == {
        "no_target": 1, "empty": 1, "too_long": 0, "prompt_too_long": 1,
    }  # fmt: skip
    assert report["truncated"] == 1 and report["skipped"] == {}
    assert report["tokens"] == sum(len(ids) for ids, _ in found)
    assert report["target_tokens"] == sum(int(mask.sum()) for _, mask in found)
    assert report["format_version"] == 1 and report["format"] == "alpaca"
    assert report["name"] == "src" and report["seq_length"] == 64
    assert report["inputs"] == [
        {
            "path": str(source),
            "bytes": source.stat().st_size,
            "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        }
    ]
    tokenizer = load_tokenizer(sentence_piece)
    assert report["tokenizer"] == {**tokenizer.describe(), "model": str(sentence_piece)}
    targets = [tokenizer.decode(ids[mask == 1]) for ids, mask in found]
    assert targets[:2] == ["Hi there", "1 2 3"]
    assert [len(ids) for ids, _ in found][2] == 65  # seq_length inputs and their labels
    assert found[0][0][-1] == tokenizer.eod_id and found[0][1][-1] == 1
    assert seen[-1] == Progress("src", source.stat().st_size, source.stat().st_size, 3, True)


def test_too_long_options(tmp_path: Path, sentence_piece: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", DIALOGUES)
    (report,) = prepare(config(tmp_path / "d", sentence_piece, source, too_long="drop"))
    assert (report["examples"], report["dropped"]["too_long"], report["truncated"]) == (2, 2, 0)
    (report,) = prepare(config(tmp_path / "s", sentence_piece, source, too_long="split"))
    assert report["dropped"]["too_long"] == report["truncated"] == 0
    (whole,) = prepare(config(tmp_path / "w", sentence_piece, source, seq_length=None))
    assert report["target_tokens"] == whole["target_tokens"]
    assert whole["examples"] == 4 and report["examples"] > 4


def test_text_is_split_so_that_every_token_is_predicted_once(
    tmp_path: Path, sentence_piece: Path, corpus: list[str]
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in corpus[:5]])
    (report,) = prepare(config(tmp_path / "out", sentence_piece, source, seq_length=50))
    found = examples(tmp_path / "out" / "src")
    tokenizer = load_tokenizer(sentence_piece)
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in corpus[:5]]
    assert report["target_tokens"] == sum(len(ids) - 1 for ids in expected)
    predicted = np.concatenate([ids[mask == 1] for ids, mask in found])
    assert predicted.tolist() == [i for ids in expected for i in ids[1:]]
    assert max(len(ids) for ids, _ in found) == 51
    assert all(mask[0] == 0 for _, mask in found)


def test_cut() -> None:
    ids = np.arange(10, dtype=np.int32)
    mask = np.array([0, 0, 0, 1, 1, 0, 0, 0, 0, 1], dtype=np.uint8)
    pieces = cut(ids, mask, 4, "split")
    assert [piece.tolist() for piece, _ in pieces] == [[0, 1, 2, 3], [3, 4], [6, 7, 8, 9]]
    assert [piece.tolist() for _, piece in pieces] == [[0, 0, 0, 1], [0, 1], [0, 0, 0, 1]]
    assert [piece.tolist() for piece, _ in cut(ids, mask, 8, "truncate")] == [[0, 1, 2, 3, 4]]
    assert cut(ids, mask, 3, "truncate") == []
    assert cut(ids, mask, 9, "drop") == []
    assert len(cut(ids, mask, 10, "drop")) == len(cut(ids, mask, None, "drop")) == 1


def test_same_bytes_whatever_the_number_of_workers(
    tmp_path: Path, byte_level: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [
        {"messages": [{"role": "user", "content": t[:50]}, {"role": "assistant", "content": t}]}
        for t in corpus * 3
    ]
    files = (
        write_jsonl(tmp_path / "a.jsonl", messages),
        write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in corpus]),
        write_jsonl(tmp_path / "c.jsonl", DIALOGUES),
    )
    monkeypatch.setattr("megatron_scalebio.data.prepare._BATCH_BYTES", 5000)
    one, two = tmp_path / "one", tmp_path / "two"
    prepare(config(one, byte_level, *files, workers=1))
    prepare(config(two, byte_level, *files, workers=2))
    assert digests(one) == digests(two)
    assert json.loads((one / "src" / "source.json").read_text())["format"] == "messages,text,alpaca"


def test_errors_of_workers_name_file_and_line(tmp_path: Path, sentence_piece: Path) -> None:
    records = [*DIALOGUES[:1] * 4000, {"instruction": "no output"}]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    for workers in (1, 2):
        with pytest.raises(UserError) as error:
            prepare(config(tmp_path / "out", sentence_piece, source, workers=workers))
        assert str(error.value).startswith(f"{source}:4001: missing field 'output'")
        assert not (tmp_path / "out").exists()


def test_a_first_record_at_fault_is_found_before_any_source_is_tokenized(
    tmp_path: Path, sentence_piece: Path
) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", DIALOGUES)
    bad = write_jsonl(tmp_path / "b.jsonl", [{**DIALOGUES[0], "output": 5}, *DIALOGUES])
    seen: list[Progress] = []
    sources = (SourceInput("good", (good,)), SourceInput("bad", (bad,)))
    two = replace(config(tmp_path / "out", sentence_piece, good), sources=sources)
    with pytest.raises(UserError, match=r"b\.jsonl:1: .*'output'"):
        prepare(two, seen.append)
    assert not seen
    assert [report["examples"] for report in prepare(replace(two, bad_records="skip"))] == [3, 3]


def test_directory_and_several_files_in_sorted_order(tmp_path: Path, sentence_piece: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    for name in ("b.jsonl", "a.json", "10.jsonl", ".hidden.jsonl", "notes.txt"):
        (folder / name).write_text(json.dumps([{"text": name}]) if name == "a.json" else
                                   json.dumps({"text": name}))  # fmt: skip
    source = parse_input(f"src={folder}")
    assert [file.name for file in source.files] == ["10.jsonl", "a.json", "b.jsonl"]
    (report,) = prepare(config(tmp_path / "out", sentence_piece, *source.files))
    assert [Path(i["path"]).name for i in report["inputs"]] == ["10.jsonl", "a.json", "b.jsonl"]
    tokenizer = load_tokenizer(sentence_piece)
    texts = [tokenizer.decode(ids) for ids, _ in examples(tmp_path / "out" / "src")]
    assert texts == ["10.jsonl", "a.json", "b.jsonl"]
    assert [file.name for file in source.unread] == ["notes.txt"]
    two = parse_input(f"x={folder / 'b.jsonl'},{folder / '10.jsonl'}")
    assert [file.name for file in two.files] == ["b.jsonl", "10.jsonl"]
    with pytest.raises(UserError, match=r"b\.jsonl stands twice in a source"):
        parse_input(f"x={folder / 'b.jsonl'},{folder}")
    assert parse_input(str(folder / "b.jsonl")).name == "b"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x={tmp}/none.jsonl", "none.jsonl: no such file"),
        ("x={tmp}", "holds no .json"),
        ("x=", "no path"),
        ("a/b={tmp}/empty.jsonl", "cannot name a source"),
    ],
)
def test_bad_inputs(tmp_path: Path, value: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parse_input(value.format(tmp=tmp_path))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file is empty"),
        ("\n\n", "holds no record"),
        ("[]", "holds no record"),
        ('{"question": "q"}', ":1: unknown record format"),
        ('{"text": "a"}\n{"text": ', ":2: malformed JSON"),
        ('{"text": "a"}\n{"txt": "b"}', ":2: missing field 'text'"),
        ('{"text": " "}', r"is left, dropped: empty 1 (its records hold no text: check the field"),
    ],
)
def test_bad_files(tmp_path: Path, sentence_piece: Path, content: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        prepare(config(tmp_path / "out", sentence_piece, path))
    assert words in str(error.value) and str(path) in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"format": "csv"}, "--format: 'csv' is not a choice"),
        ({"too_long": "cut"}, "--too-long: 'cut' is not a choice"),
        ({"seq_length": 0}, "--seq-length: 0 is below 1"),
        ({"workers": -1}, "--workers: -1 is below 0"),
        ({"train_sentencepiece": 100}, "exactly one of --tokenizer"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        config(tmp_path, tmp_path / "t.model", tmp_path / "a.jsonl", **options)
    assert words in str(error.value)


def test_train_sentencepiece(tmp_path: Path, corpus: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in corpus])
    given: dict[str, Any] = {"train_sentencepiece": 900, "workers": 1, "text_key": "body"}
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        (report,) = prepare(PrepareConfig(out, (SourceInput("src", (source,)),), **given))
        assert report["tokenizer"]["model"] == str(out / "tokenizer.model")
        assert report["tokenizer"]["vocab_size"] == 900
    models = [(out / "tokenizer.model").read_bytes() for out in outs]
    assert models[0] == models[1]
    tokenizer = load_tokenizer(outs[0] / "tokenizer.model")
    for text in ("é中😀\n\n\tindent  and  spaces ", *corpus):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(UserError, match=r"tokenizer.model: exists"):
        prepare(PrepareConfig(outs[0], (SourceInput("b", (source,)),), **given))
    with pytest.raises(
        UserError,
        match=r"--train-sentencepiece: the text is too small for 1000000 pieces .take --train-sent",
    ):
        many = {**given, "train_sentencepiece": 10**6}
        prepare(PrepareConfig(tmp_path / "c", (SourceInput("b", (source,)),), **many))
    with pytest.raises(UserError, match="--chat-template: a chat template needs a Hugging Face"):
        written = {**given, "chat_template": str(source)}
        prepare(PrepareConfig(tmp_path / "d", (SourceInput("b", (source,)),), **written))


def test_a_bad_record_ends_the_training_of_a_tokenizer_or_is_left_out(
    tmp_path: Path, corpus: list[str]
) -> None:
    records = [{"text": text} for text in corpus]
    source = write_jsonl(tmp_path / "a.jsonl", [*records, {"question": "q", "answer": "a"}])
    given = {"sources": (SourceInput("s", (source,)),), "train_sentencepiece": 900}
    with pytest.raises(UserError) as error:
        prepare(PrepareConfig(tmp_path / "one", **given))
    assert str(error.value).startswith(f"{source}:{len(corpus) + 1}: missing field 'text'")
    (report,) = prepare(PrepareConfig(tmp_path / "two", **given, bad_records="skip"))
    assert report["skipped"] == {"missing field": 1}


def test_command_line(
    tmp_path: Path, sentence_piece: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "math.jsonl", DIALOGUES)
    parser = argparse.ArgumentParser()
    prepare_cli.add_arguments(parser)
    arguments = ["--input", str(source), "--out", str(tmp_path / "out"), "--seq-length", "64"]
    args = parser.parse_args([*arguments, "--tokenizer", str(sentence_piece), "--train-on-prompt"])
    assert prepare_cli.run(args) == 0
    printed = capsys.readouterr()
    assert "math" in printed.out and "1 empty" in printed.out
    assert "100 %, 5 examples" in printed.err  # the blank answer too, since its prompt is a target
    report = json.loads((tmp_path / "out" / "math" / "source.json").read_text())
    assert report["target_tokens"] == report["tokens"] - report["examples"]


def test_preprocess_data_tool(tmp_path: Path, sentence_piece: Path, corpus: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"body": text} for text in corpus[:3]])
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source)]
    command += ["--output-prefix", str(tmp_path / "out" / "web"), "--json-keys", "body"]
    command += ["--tokenizer-model", str(sentence_piece), "--append-eod", "--tokenizer-type"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = [subprocess.run([*command, kind], env=env, capture_output=True, text=True)
           for kind in ("HuggingFaceTokenizer", "SentencePieceTokenizer")]  # fmt: skip
    assert run[0].returncode == 2 and "is a SentencePieceTokenizer" in run[0].stderr
    assert run[1].returncode == 0, run[1].stderr
    tokenizer = load_tokenizer(sentence_piece)
    found = IndexedDataset(str(tmp_path / "out" / "web" / "tokens"))
    assert [found[i].tolist() for i in range(len(found))] == [
        [*tokenizer.encode(text), tokenizer.eod_id] for text in corpus[:3]
    ]
    assert f"--data-path {tmp_path}/out/web/tokens" in run[1].stdout


@pytest.mark.slow
@pytest.mark.parametrize("array", [False, True])
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, sentence_piece: Path, array: bool
) -> None:
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from megatron_scalebio.data.prepare import *\n"
        "s = (SourceInput('s', (Path(sys.argv[1]),)),)\n"
        "prepare(PrepareConfig(Path(sys.argv[2]), s, sys.argv[3], workers=1))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peak_mb = []
    for megabytes in (4, 36):
        path = tmp_path / f"{megabytes}.json"
        record = json.dumps({"text": "A few words to tokenize.", "meta": ["m" * 990] * 4})
        with open(path, "w") as file:
            file.write("[" * array)
            for number in range(megabytes * 250):
                file.write((",\n" if array else "\n") * (number > 0) + record)
            file.write("]" * array)
        command = [sys.executable, "-c", code, path, tmp_path / f"out{megabytes}", sentence_piece]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        peak = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
        peak_mb.append(int(peak) / 1024)
        assert path.stat().st_size > megabytes * 980_000
    assert peak_mb[1] - peak_mb[0] < 16
