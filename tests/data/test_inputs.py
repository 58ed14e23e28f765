"""What --input names, and every kind of file that is read, with the same examples from each."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from megatron_scalebio.data import records as reading
from megatron_scalebio.data.files import open_records
from megatron_scalebio.data.inputs import parse_input, parse_inputs
from megatron_scalebio.data.prepare import PrepareConfig, SourceInput, prepare
from megatron_scalebio.data.prepared import PreparedFolder
from megatron_scalebio.data.source_writer import Staging
from megatron_scalebio.errors import UserError

PAIRS = [
    {"question": f'What, "{k}"?\nOr not?', "answer": f"é中 {k}", "system": None if k % 2 else "Hi"}
    for k in range(2500)
]
CHATS = [
    {"messages": [{"role": "user", "content": f"q{k}"},
                  {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
                  if k % 2 else {"role": "assistant", "content": f"a{k}"}]}
    for k in range(1500)
]  # fmt: skip


def _lines(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def _arrow(path: Path, records: list[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    """Records as a file of the kind that its name tells."""
    kind = path.name.partition(".")[2]
    plain = json.dumps(records).encode() if kind == "json" else _lines(records)
    compress = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": _zstd}
    if kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            delimiter = "\t" if kind == "tsv" else ","
            writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=600)
    elif kind == "arrow":
        _arrow(path, records)
    else:
        path.write_bytes(compress.get(kind.split(".")[-1], bytes)(plain))
    return path


def without_nulls(record: Any) -> Any:
    if isinstance(record, dict):
        return {k: without_nulls(v) for k, v in record.items() if v not in (None, "")}
    return [without_nulls(item) for item in record] if isinstance(record, list) else record


@pytest.mark.parametrize(
    "name",
    ["a.json", "a.jsonl", "a.JSONL", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.json.xz",
     "a.jsonl.bz2", "a.parquet", "a.arrow", "a.csv", "a.tsv"],
)  # fmt: skip
def test_every_kind_of_file_has_the_same_records(tmp_path: Path, name: str) -> None:
    sets = [PAIRS] if name.endswith("sv") else [PAIRS, CHATS]
    for records in sets:
        reader = open_records(write(tmp_path / name, records))
        found = [record.value for record in reader]
        assert without_nulls(found) == without_nulls(records)
        assert 0 < reader.bytes_read <= (tmp_path / name).stat().st_size


def config(out: Path, tokenizer: Path, *files: Path, **options: Any) -> PrepareConfig:
    return PrepareConfig(out, (SourceInput("s", files),), str(tokenizer), **options)


def test_examples_do_not_depend_on_the_kind_of_file(tmp_path: Path, byte_level: Path) -> None:
    found = set()
    for name in ("a.jsonl.gz", "a.parquet", "a.csv"):
        path = write(tmp_path / name, PAIRS[:300])
        found.add(prepare(config(tmp_path / name[2:], byte_level, path))[0]["fingerprint"])
    assert len(found) == 1


def test_folders_globs_lists_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "raw"
    (raw / "deep" / "er").mkdir(parents=True)
    names = ["a.jsonl.gz", "b.JSONL", "c.ndjson", "d.parquet", "deep/e.csv", "deep/er/f.json.zst"]
    for name in names:
        write(raw / name, PAIRS[:2])
    (raw / "README.md").write_text("x")
    (raw / ".cache").mkdir()
    write(raw / ".cache" / "g.jsonl", PAIRS[:1])
    source = parse_input(str(raw))
    assert [str(file.relative_to(raw)) for file in source.files] == names
    assert (source.name, source.unread) == ("raw", (raw / "README.md",))
    assert [file.name for file in parse_input(f"x={raw}/*.j*").files] == ["a.jsonl.gz"]
    assert len(parse_input(f"x={raw}/**/*.*n*").files) == 3
    (tmp_path / "list.txt").write_text("# two\nraw/c.ndjson\n\nraw/deep\n")
    listed = parse_input(f"@{tmp_path / 'list.txt'}")
    with pytest.raises(UserError, match=r"none: cannot read the list: No such file"):
        parse_input("a=@none")
    assert [file.name for file in listed.files] == ["c.ndjson", "e.csv", "f.json.zst"]
    assert listed.name == "list" and parse_input(str(raw / "a.jsonl.gz")).name == "a"
    many = ",".join(str(write(raw / f"shard-{k:03}.jsonl", PAIRS[:1])) for k in range(40))
    assert len(parse_input(many).files) == len(parse_input(f"x={many}").files) == 40
    monkeypatch.chdir(raw)
    (raw / "ünï.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"can't be one .*--input 'NAME=ünï\.jsonl'\)"):
        parse_input("ünï.jsonl")
    for value, words in ((f"x={raw}/*.txt", "no file matches"), (f"x={'y' * 300}", "no such file"),
                         (f"x={raw}/a.jsonl.gz,{raw}/./a.jsonl.gz", "stands twice")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            parse_input(value)


def test_a_saved_data_set_is_read_in_its_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(PAIRS)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(tmp_path / "two")
    found = [
        record.value for file in parse_input(f"x={tmp_path / 'one'}").files
        for record in open_records(file)
    ]  # fmt: skip
    assert without_nulls(found) == without_nulls(PAIRS)
    with pytest.raises(UserError, match=r"holds the splits test, train \(name one of them"):
        parse_input(f"x={tmp_path / 'two'}")
    assert len(parse_input(f"x={tmp_path / 'two' / 'train'}").files) == 1
    whole.select([5, 2]).save_to_disk(tmp_path / "some")
    rows = [r.value["answer"] for f in parse_input(f"x={tmp_path / 'some'}").files
            for r in open_records(f)]  # fmt: skip
    assert rows == [PAIRS[5]["answer"], PAIRS[2]["answer"]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "a.jsonl:1: a number has more digits"),
        ("a.json", b'[{"a": ' + b"9" * 5000 + b"}]", "a.json:1: a number has more digits"),
        ("a.jsonl.gz", gzip.compress(_lines(PAIRS))[:-90], "a.jsonl.gz: the compressed file is"),
        ("a.jsonl.xz", lzma.compress(_lines(PAIRS))[:-90], "a.jsonl.xz: the compressed file is"),
        ("a.jsonl.zst", _zstd(_lines(PAIRS))[:-90], "a.jsonl.zst"),
        (
            "a.jsonl.xz",
            lzma.compress(_lines(PAIRS)) + b"junk",
            "a.jsonl.xz: the compressed file is",
        ),
        ("a.jsonl.bz2", bz2.compress(_lines(PAIRS)) + b"junk", "a.jsonl.bz2: the compressed file"),
        ("a.jsonl.bz2", bz2.compress(_lines(PAIRS))[:-90], "a.jsonl.bz2: the compressed file"),
        ("a.jsonl", b'{"a": 1, "b": 2, "a": 1}', "a.jsonl:1: the field 'a' stands twice in one"),
        ("a.jsonl", b'{"m": [{"c": "x", "c": "y"}]}', "a.jsonl:1: the field 'c' stands twice"),
        ("a.json", b'[{"a": 1}, \n{"a": 1, "a": 2}]', "a.json:2: the field 'a' stands twice"),
        ("a.csv", b"text,note,text\nx,y,z\n", "a.csv: the column 'text' stands twice"),
        ("a.parquet", b"PAR1 is what it is not", "a.parquet: is damaged, or of another kind"),
        ("a.arrow", b"nor is this", "a.arrow: is damaged, or of another kind"),
        ("a.csv", b"question,answer\nx,y\nx\n", "a.csv:3: has another number of cells"),
        ("a.csv", b"question,answer\nx,\xff\n", "a.csv:2: not UTF-8"),
        ("a.csv", b'question,answer\nx,"y\n', "a.csv:2: is not CSV"),
    ],
)
def test_damaged_files_are_named_in_one_line(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(open_records(tmp_path / name))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2", "zst"])
def test_several_compressed_streams_are_one_file(tmp_path: Path, kind: str) -> None:
    packs = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zst": _zstd}
    parts = [packs[kind](_lines(part)) for part in (PAIRS[:1000], PAIRS[1000:])]
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0\xff\xff\xff\xff" if kind == "zst" else b""
    padding = b"\0" * 8 if kind == "xz" else b""
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(skipped + parts[0] + padding + skipped + parts[1] + padding)
    reader = open_records(path)
    assert [record.value for record in reader] == PAIRS
    assert reader.bytes_read == path.stat().st_size


def _columns(*pairs: tuple[str, Any]) -> pyarrow.Table:
    names = [name for name, _ in pairs]
    return pyarrow.Table.from_arrays([pyarrow.array([value]) for _, value in pairs], names=names)


def _struct_twice() -> pyarrow.Table:
    twice = pyarrow.StructArray.from_arrays([pyarrow.array(["a"])] * 2, names=["content"] * 2)
    return pyarrow.table({"messages": pyarrow.ListArray.from_arrays([0, 1], twice)})


def _not_utf8() -> pyarrow.Table:
    buffers = [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
    return pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 1, buffers)})


def _far_date() -> pyarrow.Table:
    return pyarrow.table({"text": ["a"], "day": pyarrow.array([2**31 - 1], pyarrow.date32())})


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    ("table", "words"),
    [
        (lambda: _columns(("text", "a"), ("text", "b")), "the column 'text' stands twice"),
        (_struct_twice, "the column 'content' stands twice"),
        (_not_utf8, "is damaged"),
        (_far_date, "holds a value that Python cannot take: days=2147483647"),
    ],
)
def test_tables_that_cannot_be_read_whole_are_refused_in_one_line(
    tmp_path: Path, kind: str, table: Any, words: str
) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table(), path)
    else:
        with pyarrow.ipc.new_stream(str(path), table().schema) as writer:
            writer.write_table(table())
    with pytest.raises(UserError) as error:
        list(open_records(path))
    assert f"{path}: {words}" in str(error.value) and "\n" not in str(error.value)


def test_a_cut_arrow_stream_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    _arrow(path, [{"text": "a"}])
    whole = path.read_bytes()
    assert len(list(open_records(path))) == 1
    for content, words in ((whole[:-8], "it was cut off"), (whole * 2, "stands behind its end")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            list(open_records(path))


def test_an_element_at_fault_in_an_array_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elements = ['{"text": "a"}', '"no object"', "12345", "null", '{"a": 1, "a": 2}', "[1, {}]",
                '{"n": ' + "9" * 5000 + "}", '{"text": "b"}', "-1.5e300"]  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n".join(elements) + "\n]")
    for block in (1, 3, 7, 1 << 20):
        monkeypatch.setattr(reading, "_READ_CHARS", block)
        bad: dict[int, UserError] = {}
        found = list(open_records(path, bad.__setitem__))
        assert [(r.line, r.value) for r in found] == [(2, {"text": "a"}), (9, {"text": "b"})]
        assert list(bad) == [3, 4, 5, 6, 7, 8, 10]
    for content in ('[{"text": "a"}, nonsense]', '[{"text": "a"},]'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"a\.json:1: "):
            list(open_records(path, lambda line, error: None))


BAD = [*PAIRS[:3], {"question": "q", "answer": "a", "context": "c"}, {"question": "q"}]


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_records_end_the_run_or_are_left_out(
    tmp_path: Path, byte_level: Path, workers: int
) -> None:
    files = []
    for name in ("a", "b"):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_bytes(_lines(BAD) + b"{broken\n" + _lines(PAIRS[:1]))
    with pytest.raises(UserError, match=r"a\.jsonl:"):
        prepare(config(tmp_path / "out", byte_level, *files, workers=workers))
    assert not (tmp_path / "out").exists()
    options = {"bad_records": "skip", "workers": workers}
    (report,) = prepare(config(tmp_path / "out", byte_level, *files, **options))
    assert report["examples"] == 8
    assert report["skipped"] == {"unknown field context": 2, "missing field": 2, "malformed": 2}
    listed, counts = PreparedFolder(tmp_path / "out" / "s").left_out(100)
    assert [(Path(e["file"]).name, e["line"]) for e in listed] == [
        (name, line) for name in ("a.jsonl", "b.jsonl") for line in (4, 5, 6)
    ]
    assert sum(counts.values()) == 6 and all(e["message"].startswith(e["file"]) for e in listed)


def test_examples_know_the_lines_they_are_from(tmp_path: Path, byte_level: Path) -> None:
    from megatron_scalebio.data.load_tokenizer import load_tokenizer

    tokenizer = load_tokenizer(byte_level)
    paths = []
    for name in ("a", "b"):
        paths.append(tmp_path / f"{name}.jsonl")
        texts = [f"{name}{line} " + "word " * line for line in range(1, 40)]
        paths[-1].write_bytes(b"\n" + _lines([{"text": text} for text in texts]))
    prepare(config(tmp_path / "out", byte_level, *paths, seq_length=16))
    seen = {}
    for shown in PreparedFolder(tmp_path / "out" / "s").examples(0, 10**6, tokenizer):
        assert shown.targets == shown.tokens - 1
        seen.setdefault((shown.file, shown.line), "".join(piece.text for piece in shown.pieces))
    assert len(seen) == 78
    for (file, line), text in seen.items():
        assert text.startswith(f"{Path(file).stem}{line - 1} ")


def test_two_runs_that_write_one_name_leave_the_first(tmp_path: Path) -> None:
    stagings = [Staging(tmp_path / "out", ["a", "b", "file"], overwrite=False) for _ in range(2)]
    with stagings[0] as first, pytest.raises(UserError, match="by another run"), stagings[1] as two:
        for staging, text in ((first, "first"), (two, "second")):
            for name in ("a", "b"):
                staging.path(name).mkdir(parents=True)
                (staging.path(name) / "x").write_text(text)
            staging.path("file").write_text(text)
        first.commit()
        (tmp_path / "out" / "a" / "x").unlink()
        (tmp_path / "out" / "a").rmdir()  # so that the second fails at its second name
        two.commit()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b", "file"]
    assert (tmp_path / "out" / "b" / "x").read_text() == "first"


def test_what_a_killed_run_left_goes_away_and_a_running_one_stays(tmp_path: Path) -> None:
    script = (
        "import os, sys, time; from pathlib import Path\n"
        "from megatron_scalebio.data.source_writer import Staging\n"
        "with Staging(Path(sys.argv[1]), ['a'], overwrite=False):\n"
        "    print('ready', flush=True); time.sleep(100)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        (running,) = tmp_path.iterdir()
        with Staging(tmp_path, ["b"], overwrite=False):
            assert running.exists()
    finally:
        child.kill()
        child.wait()
    assert running.exists()
    with Staging(tmp_path, ["b"], overwrite=False):
        assert not running.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["pipe", "standard input"])
def test_pipes_and_standard_input_are_read(tmp_path: Path, byte_level: Path, how: str) -> None:
    def run(content: bytes, *words: str) -> subprocess.CompletedProcess[str]:
        place, given = "-", content
        if how == "pipe":
            read, write_end = os.pipe()
            os.write(write_end, content)
            os.close(write_end)
            place, given = f"/dev/fd/{read}", b""
        command = [sys.executable, "-m", "megatron_scalebio", "prepare", "--tokenizer"]
        command += [
            str(byte_level),
            "--out",
            str(tmp_path / "out"),
            "--input",
            f"s={place}",
            *words,
        ]
        done = subprocess.run(
            command, input=given, capture_output=True, check=False,
            pass_fds=[read] if how == "pipe" else [],
        )  # fmt: skip
        return subprocess.CompletedProcess(
            command, done.returncode, done.stdout.decode(), done.stderr.decode()
        )

    done = run(_lines(PAIRS[:20]))
    assert done.returncode == 0, done.stderr
    assert len(PreparedFolder(tmp_path / "out" / "s")) == 20
    done = run(_lines(PAIRS[:2]) + b"{broken", "--overwrite")
    assert done.returncode == 2 and ".prepare-" not in done.stderr
    assert ("-:3: " if how == "standard input" else ":3: malformed JSON") in done.stderr
    done = run(b"", "--overwrite")
    words = "--input -: standard input is empty" if how == "standard input" else "file is empty"
    assert done.returncode == 2 and ".prepare-" not in done.stderr and words in done.stderr


def test_a_name_of_fields_makes_every_file_a_source(tmp_path: Path) -> None:
    for name in ("math/web.jsonl.gz", "math/books.jsonl", "code/web.jsonl", "code/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = parse_inputs(f"{{parent}}-{{stem}}={tmp_path}")
    assert [(s.name, len(s.files), len(s.unread)) for s in found] == [
        ("code-web", 1, 1), ("math-books", 1, 0), ("math-web", 1, 0),
    ]  # fmt: skip
    assert [s.name for s in parse_inputs(f"one={tmp_path}")] == ["one"]
    for name, words in (
        ("{file}", "'{file}' is not a name"),
        ("a/{stem}", "cannot name a"),
    ):
        with pytest.raises(UserError) as refused:
            parse_inputs(f"{name}={tmp_path}")
        assert words in str(refused.value)
