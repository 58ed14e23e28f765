"""Writes the demo's text: two good and two junk sources, and a validation set of known mixture.

Everything comes from the Python that runs it, so nothing is downloaded and one Python version
always writes the same bytes:

    english   paragraphs of prose from the manual (pydoc_data.topics) and the library's docstrings
    code      the library's source, without docstrings and comments
    shuffled  text of `english` with its words in random order
    noise     characters drawn one by one at the frequencies of `english`
    validation  held-out english and code in the proportions of `KNOWN_WEIGHTS`, no junk

Each example is a block of `BLOCK_CHARS` characters: all sources have examples of like length, and
a text can't be told from another by where it ends.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data import topics

KNOWN_WEIGHTS = {"english": 0.6, "code": 0.4, "shuffled": 0.0, "noise": 0.0}
BLOCK_CHARS = 120  # just over the 32 tokens that demo.yaml trains on
TRAINING_BLOCKS = 6000  # of each source
VALIDATION_BLOCKS = 2000
SEED = 1234

_SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "idle_test", "turtledemo", "lib2to3", "encodings", "pydoc_data",
    "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip
_COMMON_WORDS = {
    "a", "an", "and", "are", "as", "be", "by", "can", "for", "from", "if", "in", "is", "it", "not",
    "of", "or", "that", "the", "this", "to", "with",
}  # fmt: skip
_BREAKS = {"english": re.compile(r"\s+"), "code": re.compile(r"\n")}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="receives one JSONL file a source")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, blocks in build().items():
        with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": block}) + "\n" for block in blocks)
        print(f"{name:<10}  {len(blocks):,} examples of {BLOCK_CHARS} characters")


def build() -> dict[str, list[str]]:
    """Blocks of text of each source and of `validation`.

    Raises:
        SystemExit: this Python comes without its library's source.
    """
    draw = random.Random(SEED)
    held_out = {name: round(w * VALIDATION_BLOCKS) for name, w in KNOWN_WEIGHTS.items()}
    prose, code = library_text()
    sources: dict[str, list[str]] = {}
    validation: list[str] = []
    for name, documents in (("english", prose), ("code", code)):
        blocks = list(dict.fromkeys(block for text in documents for block in cut(text, name)))
        draw.shuffle(blocks)
        wanted = TRAINING_BLOCKS + held_out[name]
        if len(blocks) < wanted:
            raise SystemExit(
                f"demo: this Python has text for {len(blocks)} blocks of {name}, {wanted} are "
                "needed: use a Python that comes with its library's source and pydoc_data"
            )
        validation += blocks[: held_out[name]]
        sources[name] = blocks[held_out[name] : wanted]
    draw.shuffle(validation)
    sources["shuffled"] = [shuffle_words(block, draw) for block in sources["english"]]
    frequency = Counter("".join(sources["english"]))
    letters, counts = list(frequency), list(frequency.values())
    sources["noise"] = [
        "".join(draw.choices(letters, counts, k=BLOCK_CHARS)) for _ in range(TRAINING_BLOCKS)
    ]
    return {**sources, "validation": validation}


def library_text() -> tuple[list[str], list[str]]:
    """Documents of prose and documents of code, in a fixed order."""
    seen: set[str] = set()
    prose = [join_new(paragraphs(topics.topics[name]), seen) for name in sorted(topics.topics)]
    code = []
    for path in library_files():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # a few files are broken on purpose
            continue
        spans = list(docstrings(tree))
        prose.append(join_new((p for text, _ in spans for p in paragraphs(text)), seen))
        code.append(bare_code(source, [lines for _, lines in spans]))
    return prose, code


def library_files() -> Iterator[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            yield path


def docstrings(tree: ast.AST) -> Iterator[tuple[str, range]]:
    """Each docstring with the lines, counted from 0, that it takes up."""
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, _DOCUMENTED) else None
        if text:
            first = node.body[0]
            yield text, range(first.lineno - 1, first.end_lineno or first.lineno)


def paragraphs(text: str) -> Iterator[str]:
    """The paragraphs that read like English, each on one line."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        common = sum(word.lower() in _COMMON_WORDS for word in words)
        if len(words) >= 8 and common >= 0.2 * len(words) and paragraph.isascii():
            yield " ".join(words)


def join_new(found: Iterable[str], seen: set[str]) -> str:
    """Joins the paragraphs that were not seen before: copied docstrings would leak across sets."""
    fresh = [paragraph for paragraph in dict.fromkeys(found) if paragraph not in seen]
    seen.update(fresh)
    return "\n\n".join(fresh)


def bare_code(source: str, dropped: Iterable[range]) -> str:
    """The code without docstrings, whole-line comments and blank lines."""
    skip = {number for lines in dropped for number in lines}
    kept = [
        line.rstrip()
        for number, line in enumerate(source.splitlines())
        if number not in skip and line.strip() and not line.lstrip().startswith("#")
    ]
    return "\n".join(kept)


def cut(text: str, kind: str) -> Iterator[str]:
    """Blocks of BLOCK_CHARS characters; each begins at a word, or in code at a line."""
    start = 0
    while start + BLOCK_CHARS <= len(text):
        yield text[start : start + BLOCK_CHARS]
        following = _BREAKS[kind].search(text, start + BLOCK_CHARS)
        if following is None:
            return
        start = following.end()


def shuffle_words(text: str, draw: random.Random) -> str:
    words = text.split()
    draw.shuffle(words)
    return " ".join(words)


if __name__ == "__main__":
    main()
