"""The subcommand ``init``: a commented run.yaml from a folder of data and a model folder."""

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_scalebio.config.checks import require_name
from megatron_scalebio.config_loader import load_config
from megatron_scalebio.data.examples import Dialogue
from megatron_scalebio.data.formats import read_examples
from megatron_scalebio.data.inputs import parse_input, stem
from megatron_scalebio.data.source_writer import SOURCE_FILE
from megatron_scalebio.data.tables import JSON_SUFFIXES, TABLE_SUFFIXES, bare_suffix
from megatron_scalebio.errors import EXIT_OK, UserError, disk_errors_named
from megatron_scalebio.families import read_family

# What people call the set that they aim at, and the one that they measure by.
_GOALS = re.compile(r"(^|[-_.])(val|valid|validation|dev|goal|target|held-?out)($|[-_.])", re.I)
_TESTS = re.compile(r"(^|[-_.])test($|[-_.])", re.I)
_SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES)
# Without a GPU, where 800 steps are to end within minutes, and with one: tokens of an example;
# examples of a step; layers, width and heads of a new model.
_LENGTH = (256, 1024)
_BATCH = (16, 32)
_SIZES = ((2, 128, 4), (12, 768, 12))
# Pieces of a new tokenizer, and of how many bytes of raw files: a small text has not many.
_PIECES = ((5_000_000, 8000), (50_000, 500), (0, 300))
_VOCAB_SIZE = 32000
_TEST = "  test:                   # measured by `train` and `evaluate`, and never learned from"
_NEW_MODEL = """\
  num_layers: {:<12}# a new model, from scratch; for yours: hf: FOLDER in place of these
  hidden_size: {}
  num_attention_heads: {}
"""


@dataclass(frozen=True)
class Found:
    """A set of the data folder.

    Attributes:
        raw: files of records, which `prepare` turns into what a run reads.
        path: what the run reads.
    """

    name: str
    raw: Path | None
    path: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``init``."""
    add = parser.add_argument
    add("data", metavar="DATA", help="folder with a file or folder for each source (JSON, JSONL, "
        "Parquet, Arrow, CSV, TSV), prepared folders, or Megatron .bin/.idx prefixes")  # fmt: skip
    add("--hf", metavar="DIR", help="Hugging Face folder of the model to start from [a new one]")
    add("--validation", nargs="+", default=[], metavar="NAME", help="what stands for your goal "
        "[the names with val, dev, goal or target in them]")  # fmt: skip
    add("--config", default="run.yaml", metavar="FILE", help="file to write [run.yaml]")
    add("--overwrite", action="store_true", help="replace that file")


def run(args: argparse.Namespace) -> int:
    """Writes the file and says what comes next; returns an exit code.

    Raises:
        UserError: the folder holds no two sources and a validation set, or the file is there.
    """
    target, folder = Path(args.config), Path(args.data)
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder), fix="name the folder of your data")
    if target.exists() and not args.overwrite:
        raise UserError("is there already", where=str(target), fix="--overwrite, or --config NAME")
    if args.hf:
        read_family(args.hf)
    prepared = Path("prepared" if folder.resolve() == Path("data").resolve() else "data")
    found = list(_found(folder, prepared))
    sources, goals, tests = _roles(found, args.validation, folder)
    raw = [each for each in found if each.raw is not None]
    if not args.hf:
        _refuse_tools(raw)
    steps = _steps(raw, prepared, args.hf, target)
    with disk_errors_named(target):
        target.write_text(_text(sources, goals, tests, args.hf, steps), encoding="utf-8")
    load_config(str(target))
    for kind, sets in (("sources", sources), ("validation", goals), ("test", tests)):
        if sets:
            print(f"{kind}: {', '.join(each.name for each in sets)}")
    if not args.hf and _of_prefixes(sources):
        print(f"model.vocab_size: {_VOCAB_SIZE} is a guess: give that of your tokenizer")
    print(f"wrote {target}; next:\n")
    print("\n".join(f"    {step}" for step in steps))
    return EXIT_OK


def _found(folder: Path, prepared: Path) -> Iterator[Found]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        bare = path.stem if path.suffix == ".idx" else stem(path.name)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", bare).strip("-._")
        if (path / SOURCE_FILE).is_file():
            yield Found(name, None, path)
        elif path.suffix == ".idx" and path.with_suffix(".bin").is_file():
            yield Found(name, None, path.with_suffix(""))
        elif _holds_records(path):
            yield Found(name, path, prepared / name)


def _holds_records(path: Path) -> bool:
    if path.is_dir():
        return any(bare_suffix(each) in _SUFFIXES for each in path.rglob("*") if each.is_file())
    return bare_suffix(path) in _SUFFIXES


def _instead(folder: Path) -> str:
    """What makes a mixture of a folder in which `init` finds none."""
    held = {path.suffix for path in folder.rglob("*")}
    if ".idx" in held:
        return (
            "Megatron prefixes in its folders are named in a YAML file, under data: "
            f"{{sources: {{glob: '{folder}/*/*.idx', name: '{{parent}}/{{stem}}'}}}}"
        )
    if ".txt" in held:
        return 'plain text is not read: write JSONL, {"text": "..."} a line'
    return "a mixture needs two: a file or folder for each"


def _roles(
    found: Sequence[Found], named: Sequence[str], folder: Path
) -> tuple[list[Found], list[Found], list[Found]]:
    """Sources, validation sets and test sets."""
    for each in found:
        require_name(str(each.raw or each.path), each.name)
    names = [each.name for each in found]
    listed = ", ".join(names) or "nothing"
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two sets are called {twice[0]!r}", where=str(folder), fix="rename one")
    for name in named:
        if name not in names:
            raise UserError(f"{name!r} is not in {folder}", where="--validation", fix=listed)
    goals = [each for each in found if (each.name in named if named else _GOALS.search(each.name))]
    tests = [each for each in found if each not in goals and _TESTS.search(each.name)]
    sources = [each for each in found if each not in goals and each not in tests]
    if not goals and len(found) > 1:
        raise UserError(
            f"no name among {listed} says which set stands for your goal",
            where=str(folder),
            fix="name it: --validation NAME",
        )
    if len(sources) < 2:
        raise UserError(
            f"{'one source alone' if sources else 'no source'} beside the validation and test sets "
            f"(found: {listed})",
            where=str(folder),
            fix=_instead(folder),
        )
    return sources, goals, tests


def _steps(raw: Sequence[Found], prepared: Path, hf: str | None, target: Path) -> list[str]:
    """The commands that come next."""
    words = ["megatron-scalebio", "prepare", "--out", str(prepared)]
    words += ["--seq-length", str(_LENGTH[_has_gpu()])]
    words += ["--tokenizer", hf] if hf else ["--train-sentencepiece", str(_pieces(raw))]
    for each in raw:
        words += ["--input", f"{each.name}={each.raw}"]
    reweight = ["megatron-scalebio", "reweight", "--config", str(target)]
    return [shlex.join(step) for step in ([words] if raw else []) + [reweight]]


def _pieces(raw: Sequence[Found]) -> int:
    """How many pieces a new tokenizer gets."""
    paths = [each.raw for each in raw if each.raw]
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    size = sum(file.stat().st_size for file in files)
    return next(pieces for least, pieces in _PIECES if size >= least)


def _refuse_tools(raw: Sequence[Found]) -> None:
    """A model's chat template renders tools; a new tokenizer has none."""
    for each in raw:
        file = parse_input(f"{each.name}={each.raw}").files[0]
        first = None
        with suppress(UserError):  # of which `prepare` tells
            first = next(read_examples(file), None)
        if isinstance(first, Dialogue) and first.has_tools:
            raise UserError(
                "has tools, which the chat template of a model renders",
                where=f"{file}:1",
                fix="name the model's folder: --hf DIR",
            )


def _text(
    sources: Sequence[Found], goals: Sequence[Found], tests: Sequence[Found], hf: str | None,
    steps: Sequence[str],
) -> str:  # fmt: skip
    lengths = [_seq_length(each.path) for each in (*sources, *goals)]
    length = next((length for length in lengths if length), _LENGTH[_has_gpu()])
    test = f"{_TEST}\n{_listed(tests)}\n" if tests else ""
    model = f"  hf: {_quoted(hf)}\n" if hf else _NEW_MODEL.format(*_SIZES[_has_gpu()])
    prepared = any(lengths) or any(each.raw for each in sources)
    if not hf and _of_prefixes(sources):
        model += f"  vocab_size: {_VOCAB_SIZE}       # a guess: give that of your tokenizer\n"
    return f"""\
# A run of `megatron-scalebio reweight`: which share of the training each source should have.
# Every option: megatron-scalebio reweight --help-all
#
{chr(10).join(f"#   {step}" for step in steps)}

data:
  sources:                # what the model may train on
{_listed(sources)}
  validation:             # what stands for your goal: the weights lower the loss on it
{_listed(goals)}
{test}  seq_length: {length:<12}# tokens of an example{", as prepared" if prepared else ""}

model:
{model}
parallel:
  bf16: {str(_has_gpu()).lower():<18}# true on GPUs
  # tensor_model_parallel_size: 2     start with torchrun --nproc_per_node N -m megatron_scalebio
  # pipeline_model_parallel_size: 2

# lisa: {{lisa_layers: 4}}  # train four layers at a time: a large model in little memory

optimizer:
  lr: {"1.0e-5" if hf else "3.0e-4":<20}# the highest, of the model's training

train:
  train_iters: 800        # or more, for the weights to be judged
  global_batch_size: {_BATCH[_has_gpu()]}
  micro_batch_size: 4     # less where memory is short
  output: runs/first
"""


def _of_prefixes(sources: Sequence[Found]) -> bool:
    """Whether nothing says which tokenizer made a source."""
    return any(s.raw is None and not (s.path / SOURCE_FILE).is_file() for s in sources)


def _has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def _listed(sets: Sequence[Found]) -> str:
    return "\n".join(f"    - {{name: {_quoted(s.name)}, path: {_quoted(s.path)}}}" for s in sets)


def _quoted(text: str | Path) -> str:
    """A name such as 1 or null is text to YAML in quotes only."""
    return json.dumps(str(text), ensure_ascii=False)


def _seq_length(path: Path) -> int | None:
    """That of a prepared folder, None where nothing is prepared or it had none."""
    try:
        value = json.loads((path / SOURCE_FILE).read_text(encoding="utf-8")).get("seq_length")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, int) else None
