"""`prepare` writes everything or nothing, and replaces nothing but what it wrote."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_scalebio.data.prepare import PrepareConfig, SourceInput, prepare
from megatron_scalebio.errors import UserError
from tests.data.preparing import DIALOGUES, config, digests, write_jsonl

ROOT = Path(__file__).resolve().parents[2]


def test_existing_output_is_refused_or_replaced_whole(tmp_path: Path, sentence_piece: Path) -> None:
    out = tmp_path / "out"
    source = write_jsonl(tmp_path / "a.jsonl", DIALOGUES)
    (out / "src").mkdir(parents=True)  # an empty folder is no obstacle
    prepare(config(out, sentence_piece, source))
    before = digests(out)
    with pytest.raises(UserError, match=r"src: exists and is not empty .*--overwrite"):
        prepare(config(out, sentence_piece, source))
    bad = write_jsonl(tmp_path / "bad.jsonl", [*DIALOGUES, {"text": 1}])
    with pytest.raises(UserError):
        prepare(config(out, sentence_piece, bad, overwrite=True))
    assert digests(out) == before
    (report,) = prepare(config(out, sentence_piece, source, overwrite=True, max_examples=1))
    assert report["examples"] == 1 and sorted(p.name for p in out.iterdir()) == ["src"]


def test_overwrite_never_removes_what_prepare_did_not_write(
    tmp_path: Path, sentence_piece: Path
) -> None:
    raw = tmp_path / "src"
    raw.mkdir()
    source = write_jsonl(raw / "a.jsonl", DIALOGUES)
    with pytest.raises(UserError, match="is not a prepared source"):
        prepare(config(tmp_path, sentence_piece, source, overwrite=True))
    assert source.exists()


def test_all_sources_appear_or_none(tmp_path: Path, sentence_piece: Path) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", DIALOGUES)
    bad = write_jsonl(tmp_path / "b.jsonl", [{"instruction": "a", "output": ""}])
    sources = (SourceInput("good", (good,)), SourceInput("bad", (bad,)))
    with pytest.raises(UserError, match=r"source bad: .*no example with a target.*no_target 1"):
        prepare(PrepareConfig(tmp_path / "out", sources, str(sentence_piece), workers=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_run_leaves_nothing_that_looks_complete(
    tmp_path: Path, sentence_piece: Path, number: signal.Signals
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "word " * 400}] * 20_000)
    arguments = ["--input", f"src={source}", "--out", str(tmp_path / "out")]
    code = (
        "import argparse, sys; from megatron_scalebio.commands import prepare as cli\n"
        "if __name__ == '__main__':\n"
        "    p = argparse.ArgumentParser(); cli.add_arguments(p); sys.exit(cli.run(p.parse_args()))"
    )
    (tmp_path / "main.py").write_text(code)
    process = subprocess.Popen(
        [
            sys.executable,
            str(tmp_path / "main.py"),
            *arguments,
            "--tokenizer",
            str(sentence_piece),
            "--workers",
            "2",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not any((tmp_path / "out").glob(".prepare-*/new/src/tokens.bin")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert not (tmp_path / "out" / "src").exists()
    assert not list((tmp_path / "out").glob("**/source.json"))
    if number == signal.SIGTERM:
        assert process.returncode == 3 and "nothing was written" in errors
        assert not (tmp_path / "out").exists()


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, sentence_piece: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "word " * 400}] * 400)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"out: can't write: File too large"):
            prepare(config(tmp_path / "out", sentence_piece, source))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "out").exists()
