"""Reads what Transformer Engine's compiled extension offers from its source: extension.json.

    python -m tests.te.read_extension transformer_engine_torch-2.20.2.tar.gz

The archive is the package's source distribution. Its bindings name the enumerations, classes and
functions; the numbers of an enumeration's members stand where the headers declare it (of two that
no header of the archive declares, members are numbered in their order).
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from pathlib import Path

EXTENSION = Path(__file__).with_name("extension.json")


def read(archive: Path) -> dict[str, object]:
    """version, enums {name: {member: number}}, classes and functions [names]."""
    texts = {}
    with tarfile.open(archive) as files:
        for file in files:
            if file.name.endswith((".h", ".cpp")) and (content := files.extractfile(file)):
                texts[file.name] = _without_comments(content.read().decode(errors="replace"))
    bindings = "\n".join(text for text in texts.values() if "enum_<" in text or "m.def(" in text)
    everything = "\n".join(texts.values())
    enums = {}
    for made in re.finditer(r'enum_<([\w:]+)>\s*\(\s*m,\s*"(\w+)"([^;]*);', bindings):
        kind, name, members = made.groups()
        numbers = _numbers(kind.rpartition("::")[2], everything)
        # .value("NAME", path::to::MEMBER)
        pairs = re.findall(r'\.value\(\s*"(\w+)",\s*([\w:]+)', members)
        enums[name] = {
            each: numbers[member.rpartition("::")[2]] if numbers else place
            for place, (each, member) in enumerate(pairs)
        }
    classes = re.findall(r'class_<[^"]*?\(\s*m,\s*"(\w+)"', bindings)
    functions = re.findall(r'm\.def\(\s*"(\w+)"', bindings)
    version = archive.name.removeprefix("transformer_engine_torch-").removesuffix(".tar.gz")
    return {
        "version": version, "enums": dict(sorted(enums.items())),
        "classes": sorted(set(classes)), "functions": sorted(set(functions)),
    }  # fmt: skip


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    return text.replace("\\\n", "\n")  # macros of many lines


def _numbers(kind: str, text: str) -> dict[str, int]:
    declared = re.search(rf"enum\s+(?:class\s+)?{kind}\s*(?::\s*\w+\s*)?\{{(.*?)\}}", text, re.S)
    if declared is None:
        return {}
    numbers: dict[str, int] = {}
    following = 0
    for part in filter(None, map(str.strip, declared[1].split(","))):
        member, _, given = (word.strip() for word in part.partition("="))
        if given:  # a number, or another member
            following = numbers[given] if given in numbers else int(given, 0)
        numbers[member] = following
        following += 1
    return numbers


if __name__ == "__main__":
    EXTENSION.write_text(json.dumps(read(Path(sys.argv[1])), indent=1) + "\n")
