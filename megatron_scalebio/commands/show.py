"""The subcommand ``show``: prepared examples, with what trains in them marked."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from megatron_scalebio import launcher
from megatron_scalebio.config.checks import require_at_least
from megatron_scalebio.data.load_tokenizer import load_tokenizer
from megatron_scalebio.data.prepared import PreparedFolder, Shown
from megatron_scalebio.errors import EXIT_OK, UserError

MARKS = ("⟦", "⟧")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``show``."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="written by prepare or sample")
    add(
        "--rows",
        type=int,
        default=3,
        metavar="N",
        help="number of examples, and of left-out records, to show [3]",
    )
    add("--from", type=int, default=0, dest="first", metavar="N", help="the first example [0]")
    add("--tokenizer", metavar="PATH", help="default: the one it was prepared with")
    add("--json", action="store_true", help="one JSON object per line")


def run(args: argparse.Namespace) -> int:
    """Shows the examples that the arguments name; returns an exit code.

    Raises:
        UserError: the folder is none of prepare's, or its tokenizer is gone.
    """
    require_at_least("--rows", args.rows, 1)
    require_at_least("--from", args.first, 0)
    folder = PreparedFolder(Path(args.folder))
    if args.first >= len(folder):
        last = len(folder) - 1
        raise UserError(f"--from: {args.first} is beyond the last example (give {last} or less)")
    tokenizer = load_tokenizer(args.tokenizer or folder.model, chat_template="plain")
    prepared_with = folder.description["tokenizer"]["fingerprint"]
    if tokenizer.fingerprint != prepared_with:
        raise UserError(
            f"{tokenizer.model}: is not the tokenizer that {args.folder} was prepared with, and "
            "would read other text from its ids (name that one by --tokenizer)"
        )
    shown = list(folder.examples(args.first, args.rows, tokenizer))
    listed, counts = folder.left_out(args.rows)
    if not launcher.is_first_rank():
        return EXIT_OK
    if args.json:
        for example in shown:
            print(json.dumps(as_json(example), ensure_ascii=False))
        for entry in listed:
            print(json.dumps({"left_out": entry}, ensure_ascii=False))
        return EXIT_OK
    console = Console(soft_wrap=True, highlight=False)
    for example in shown:
        console.print(Text(heading(example, len(folder)), "bold"))
        console.print(marked(example, console.is_terminal))
        console.print()
    for why, count in counts.items():
        console.print(Text(f"left out: {count:,} {why}", "bold"))
    for entry in listed:
        place = f"{entry['file']}:{entry['line']}"
        console.print(Text("  " + entry.get("message", f"{place}: {entry['why']}")))
    return EXIT_OK


def heading(example: Shown, of: int) -> str:
    place = f" · {example.file}:{example.line}" if example.file else ""
    return (
        f"{example.number:,} of {of:,} · {example.targets} of {example.tokens} tokens train{place}"
    )


def marked(example: Shown, colour: bool) -> Text:
    """The example's text, what trains between marks, and in colour on a terminal."""
    text = Text()
    for piece in example.pieces:
        if piece.trains:
            text.append(f"{MARKS[0]}{piece.text}{MARKS[1]}", "green" if colour else "")
        else:
            text.append(piece.text, "dim" if colour else "")
    return text


def as_json(example: Shown) -> dict[str, Any]:
    return {
        "example": example.number,
        "file": example.file,
        "line": example.line,
        "tokens": example.tokens,
        "targets": example.targets,
        "text": "".join(piece.text for piece in example.pieces),
        "pieces": [{"text": piece.text, "trains": piece.trains} for piece in example.pieces],
    }
