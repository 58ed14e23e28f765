"""Which changes of large files are noticed, without reading them whole."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_scalebio.data.scan import packed_fingerprint, same_data
from megatron_scalebio.fingerprint import of_files


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytes(range(256)) * 40
    seen = set()
    for place in (None, 0, 5000, len(content) - 1):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        path.write_bytes(changed)
        seen.add(of_files([path], samples=4))
    assert len(seen) == 4


def test_a_terabyte_is_sampled_from_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    size = 10**12
    os.truncate(path, size)
    seen = {of_files([path], samples=8)}
    for eighth in range(8):
        with path.open("r+b") as stream:
            stream.seek(size // 8 * eighth)
            stream.write(b"other")
        seen.add(of_files([path], samples=8))
    os.truncate(path, size + 1)
    seen.add(of_files([path], samples=8))
    assert len(seen) == 10


def test_which_file_holds_what_counts(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"aa")
    two.write_bytes(b"a")
    assert of_files([one, two], 8) != of_files([two, one], 8)


def test_packed_documents_are_told_apart_by_their_lengths_and_tokens(tmp_path: Path) -> None:
    def told(tokens: list[int], lengths: list[int]) -> str:
        np.array(tokens, np.uint16).tofile(tmp_path / "tokens.bin")
        return packed_fingerprint(str(tmp_path / "tokens"), np.array(lengths, np.int32))

    first = told([1, 2, 3], [1, 2])
    assert first.startswith("3-2-6-")
    assert first == told([1, 2, 3], [1, 2])
    assert first != told([1, 2, 4], [1, 2])
    assert first != told([1, 2, 3], [2, 1])


@pytest.mark.parametrize(
    ("saved", "now", "same"),
    [
        ("3-2-6-ab", "3-2-6-ab", True),
        ("3-2-6-ab", "3-2-6-abc", False),
        ("3-2-6-abc", "3-2-6-ab", False),
        ("3-2-6", "3-2-6-ab", True),
        ("3-2-6", "3-2-60-ab", False),
        ("3-2-6-ab", "3-2-6", False),
        ("ab", "ab", True),
        ("ab", "abc", False),
    ],
)
def test_a_saved_fingerprint_is_compared_by_what_it_tells(saved: str, now: str, same: bool) -> None:
    assert same_data(saved, now) == same
