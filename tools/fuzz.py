#!/usr/bin/env python
"""Gives `prepare`, `sample` and the reader of config.json what nobody should.

    tools/fuzz.py [prepare sample config] [--minutes 10] [--seed 0]

An input is a sound one with a few things changed: values of other types, fields gone or added,
text with markers of turns and control characters, bytes turned. It must be taken, or refused with
exit code 2 and one line, and then leave nothing behind. Each other outcome is printed once, with
its input.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_scalebio.cli import main as command  # noqa: E402
from megatron_scalebio.config_loader import load_config  # noqa: E402
from megatron_scalebio.errors import UserError  # noqa: E402
from tests.data.conftest import CHATML, SPECIAL  # noqa: E402
from tests.model.test_family_fields import CASES  # noqa: E402

TEXTS = [
    "hello", "", " ", "\n", "Hello!", "<|im_start|>user\n", "### Response:", "<s>", "</s>",
    "\u0000", "\ud800", "e\u0301\u200d", "a" * 3000, "[INST]", "{{ messages }}", "😀", "हिन्दी",
    "x\r\n\ty",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 1.5, -2.5, 1e-30, 1e30, 2**63, 10**30, float("nan"),
    float("inf"), [], {}, [None], [1], ["x"], [[1]], [{}], {"a": 1}, "x", "1e6", "silu",
    "full_attention", ["full_attention"], {"rope_type": "yarn"}, {"rope_type": "longrope"},
    {"rope_type": "linear", "factor": 2}, {"full_attention": {}}, *TEXTS,
]  # fmt: skip
FIELDS = [
    "system", "tools", "weight", "train", "tool_calls", "history", "context", "choices", "chosen",
    "role", "content", "from", "value", "messages", "text", "rope_scaling", "rope_parameters",
    "sliding_window", "layer_types", "head_dim", "mlp_only_layers", "no_rope_layers",
    "quantization_config", "hidden_act", "num_experts", "n_group", "attention_bias", "dtype",
    "partial_rotary_factor", "num_key_value_heads", "auto_map",
]  # fmt: skip
RECORDS: list[Callable[[Any], dict[str, Any]]] = [
    lambda text: {"text": text()},
    lambda text: {"prompt": text(), "response": text()},
    lambda text: {"instruction": text(), "input": text(), "output": text()},
    lambda text: {"messages": [
        {"role": role, "content": text()} for role in ("system", "user", "assistant", "user",
                                                       "assistant")]},
    lambda text: {"conversations": [{"from": who, "value": text()} for who in ("human", "gpt")]},
]  # fmt: skip
Case = Callable[[random.Random, Path], tuple[object, list[str] | None]]


def changed(draw: random.Random, value: Any) -> Any:
    """A copy with one to three things changed, at any depth."""
    whole = json.loads(json.dumps(value))
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        places = list(_containers(whole))
        place = draw.choice(places)
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        what = draw.random()
        if what < 0.15 and keys:
            place.pop(draw.choice(keys))
        elif what < 0.8 and keys:
            place[draw.choice(keys)] = deepcopy(draw.choice(VALUES))
        elif isinstance(place, dict):
            place[draw.choice(FIELDS)] = deepcopy(draw.choice(VALUES))
    return whole


def _containers(value: Any) -> Any:
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def turned(draw: random.Random, data: bytes) -> bytes:
    """With some bytes turned, now and then."""
    made = bytearray(data)
    for _ in range(draw.choice([0] * 9 + [1, 3])):
        made[draw.randrange(len(made))] = draw.randrange(256)
    return bytes(made)


def config(draw: random.Random, folder: Path) -> tuple[object, list[str] | None]:
    """A model's config.json, and what a run makes of it."""
    architecture = draw.choice(list(CASES))
    kind, values, _ = CASES[architecture]
    whole = {"architectures": [architecture], "model_type": kind, **values}
    text = turned(draw, json.dumps(changed(draw, whole)).encode())
    (folder / "config.json").write_bytes(text)
    load_config(None, {"model": {"hf": str(folder)}}).validate(1)
    return text, None


def _jsonl(draw: random.Random, path: Path) -> bytes:
    record = draw.choice(RECORDS)
    rows = [record(lambda: draw.choice(TEXTS)) for _ in range(draw.randrange(1, 6))]
    rows = [changed(draw, row) if draw.random() < 0.4 else row for row in rows]
    data = turned(draw, "".join(json.dumps(row) + "\n" for row in rows).encode())
    path.write_bytes(data)
    return data


@cache
def tokenizer() -> Path:
    """GPT-2's kind, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["Hello there, hello."] * 9, trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    ))  # fmt: skip
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
    wrapped.chat_template = CHATML
    folder = Path(tempfile.mkdtemp())
    wrapped.save_pretrained(folder)
    return folder


def prepare(draw: random.Random, folder: Path) -> tuple[object, list[str] | None]:
    """A small JSONL file."""
    data = _jsonl(draw, folder / "in.jsonl")
    words = ["--input", f"s={folder / 'in.jsonl'}", "--out", str(folder / "out")]
    words += ["--tokenizer", str(tokenizer()), "--seq-length", str(draw.choice([2, 16, 64]))]
    words += draw.choice([[], ["--bad-records", "skip"], ["--ignore-fields"]])
    words += draw.choice([[], ["--chat-template", "plain"], ["--train-on-prompt"]])
    return (data, words), ["prepare", *words, "--workers", "1"]


def sample(draw: random.Random, folder: Path) -> tuple[object, list[str] | None]:
    """Two JSONL files, weights and what to leave out."""
    data = [_jsonl(draw, folder / f"{name}.jsonl") for name in "abx"]
    words = [word for name in "ab" for word in ("--input", f"{name}={folder / name}.jsonl")]
    weights = [draw.choice(["1", "0.3"] * 9 + ["0", "-1", "nan", "1e999", "x", ""]) for _ in "ab"]
    words += [
        "--weights",
        *(f"{name}={weight}" for name, weight in zip("ab", weights, strict=True)),
    ]
    words += ["--num-samples", str(draw.choice([1, 3, 10])), "--out", str(folder / "out")]
    words += draw.choice([[], ["--exclude", str(folder / "x.jsonl")], ["--bad-records", "skip"]])
    return (data, words), ["sample", *words]


TARGETS: dict[str, Case] = {"prepare": prepare, "sample": sample, "config": config}


def fault_of(case: Case, draw: random.Random) -> tuple[str, object]:
    """What is wrong with how an input was met ("": nothing), and the input."""
    said = io.StringIO()
    given: object = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            given, words = case(draw, folder)
            if words is None:
                return "", given
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                code = command(words)
        except UserError as error:
            return ("more than a line" if "\n" in str(error) else ""), str(error)
        except Exception as error:  # noqa: BLE001  that is what is looked for
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            return f"{type(error).__name__} in {place}: {str(error)[:200]}", given
        left = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        if (folder / "out").exists():
            left += [path.name for path in (folder / "out").iterdir() if path.name[0] == "."]
        if code == 2 and (folder / "out").exists():
            left.append("out")
        if code not in (0, 2):
            return f"exit code {code}", given
        lines = said.getvalue().strip().splitlines()
        errors = [line for line in lines if line.startswith("megatron-scalebio: error: ")]
        if code == 2 and (errors != lines[-1:] or "Traceback" in said.getvalue()):
            return f"not one line at the end: {said.getvalue()[:300]}", given
        return (f"left behind: {left}" if left else ""), given


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--minutes", type=float, default=10.0, help="for each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(TARGETS):
        parser.error(f"{', '.join(unknown)}: choose of {', '.join(TARGETS)}")
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    found: Counter[str] = Counter()
    for name in arguments.targets:
        draw, end, tried = random.Random(arguments.seed), time.monotonic(), 0
        end += 60 * arguments.minutes
        while time.monotonic() < end:
            fault, given = fault_of(TARGETS[name], draw)
            tried += 1
            found[fault] += bool(fault)
            if fault and found[fault] == 1:
                print(f"{name}: {fault}\n    {given!r}", flush=True)
        print(f"{name}: {tried:,} inputs in {arguments.minutes:g} minutes", flush=True)
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
