"""Targets in chat templates: exactly what the template's author says the model is to write."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_scalebio.data.dialogue import ExampleEncoder
from megatron_scalebio.data.examples import Dialogue
from megatron_scalebio.data.load_tokenizer import load_tokenizer
from tests.data.chat_templates import SHAPES, SPECIAL, bare

DIALOGUES = 40  # of every shape; 10,000 dialogues over all shapes found nothing


@pytest.fixture(scope="session")
def special(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A byte-level BPE with the special tokens of `SHAPES`."""
    path = tmp_path_factory.mktemp("special")
    tokenizer = Backend(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*corpus, "### Assistant:\nUser: Hello!"], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>"
    ).save_pretrained(path)
    return path


PIECES = [" ", "\n", "\n\n", "\t", "a", "s", "Hello!", "Yes", " Yes", "Yes ", "How are you?",
          "user", "assistant", "Assistant", "### Assistant:\n", "ASSISTANT:", "User: ", "Bot:",
          "[INST]", " [/INST]", "[A]", "[/A]", "<think>\n", "\n</think>\n\n", "é中", "😀", "1. ",
          "<|", "|>", "\u00a0", "scalebiosentinel", *SPECIAL]  # fmt: skip


def adversarial(rng: random.Random) -> list[tuple[str, str]]:
    """A dialogue whose turns repeat each other, headers, special tokens and white space."""
    said: list[str] = []
    turns = [("system", "Be kind.")] if rng.random() < 0.2 else []
    for k in range(2 * rng.randint(1, 3) + (rng.random() < 0.2)):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 4)))
        if said and rng.random() < 0.4:
            text = rng.choice(["", " ", "\n"]) + rng.choice(said) + rng.choice(["", " ", "\n"])
        said.append(text)
        turns.append(("user" if k % 2 == 0 else "assistant", text))
    return turns


class Stated(NamedTuple):
    """What the author's marks say of a dialogue, by transformers alone.

    ids, mask: of the whole record; text and spans: of the same, in characters;
    closed: whether EOD is to follow, because no mark ends the last answer;
    crossed: whether a token reaches over a border of a span.
    """

    ids: list[int]
    mask: list[int]
    text: str
    spans: list[tuple[int, int]]
    closed: bool
    crossed: bool


def stated(theirs: Any, template: str, marks: str, turns: list[tuple[str, str]]) -> Stated:
    messages = [{"role": role, "content": content} for role, content in turns]
    out = theirs.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    (text,), (spans,) = render_jinja_template(
        [messages],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **theirs.special_tokens_map,
    )
    inside = turns[-1][0] != "assistant"
    ended = {"always": True, "never": False, "at the end": not inside, "inside": inside}[marks]
    offsets = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    borders = {at for span in spans for at in span}
    crossed = any(low < at < high for low, high in offsets for at in borders)
    return Stated(out["input_ids"], out["assistant_masks"], text, spans, not ended, crossed)


def check(path: Path, name: str, seed: int, dialogues: int) -> int:
    """Compares ours with what is stated; how many dialogues were compared."""
    template, marks = SHAPES[name]
    theirs = AutoTokenizer.from_pretrained(path)
    ours = load_tokenizer(path)
    eod = theirs.eos_token
    rng, compared = random.Random(f"{name}{seed}"), 0
    for _ in range(dialogues):
        turns = adversarial(rng)
        if any(role == "assistant" and not text.strip() for role, text in turns):
            continue  # no target of ours, and one by the author's marks
        said = stated(theirs, template, marks, turns)
        opened = "opened by the generation prompt" in name or "deepseek" in name
        if opened and any(said.text[low:].startswith("<think>\n") for low, _ in said.spans):
            continue  # the prompt says it, so ours does not train on it
        compared += 1
        end = said.spans[-1][1]
        for ours.chat_template in (template, bare(template)):
            ids, mask = ExampleEncoder(ours).encode(Dialogue(tuple(turns)))
            where = (name, turns, ours.chat_template)
            # transformers takes the first token alone of a last character that has several.
            alike = not any(ord(said.text[high - 1]) > 127 for _, high in said.spans)
            alike = alike and (not said.crossed or ours.chat_template == template)
            if alike and not said.closed:
                length = len(said.mask) - said.mask[::-1].index(1)
                assert (ids, mask) == (said.ids[:length], said.mask[:length]), where
            if said.crossed and ours.chat_template == template:
                continue  # a token that reaches over a border is the answer's
            assert theirs.decode(ids) == said.text[:end] + eod * said.closed, where
            trained = "".join(said.text[low:high] for low, high in said.spans) + eod * said.closed
            assert theirs.decode([i for i, m in zip(ids, mask, strict=True) if m]) == trained, where
            first = said.spans[0][0]
            prompt = theirs(said.text[:first], add_special_tokens=False)["input_ids"]
            if said.crossed and len(said.spans) == 1:
                assert ids[: mask.index(1)] == prompt, where  # what inference begins with
    return compared


@pytest.mark.parametrize("name", SHAPES)
def test_targets_are_what_the_template_says_they_are(special: Path, name: str) -> None:
    assert check(special, name, 0, DIALOGUES) > DIALOGUES // 3


def _legacy() -> Backend:
    """Llama 2's tokenizer as `legacy: true` has it: a space behind every special token."""
    return _metaspace("always")  # to be trained on words; `_tokenizer` does the rest


def _metaspace(scheme: str, unigram: bool = False) -> Backend:
    model = models.Unigram() if unigram else models.BPE(byte_fallback=True, unk_token="<unk>")
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return backend


def _byte_level(**how: bool) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**how)
    return backend


def _word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


TOKENIZERS = {
    "byte level": lambda: _byte_level(add_prefix_space=False),
    "byte level with a space in front": lambda: _byte_level(add_prefix_space=True),
    "metaspace, first": lambda: _metaspace("first"),
    "metaspace, always": lambda: _metaspace("always"),
    "unigram": lambda: _metaspace("always", unigram=True),
    "legacy": _legacy,
    "word piece": _word_piece,
}


def _tokenizer(kind: str, path: Path, corpus: list[str]) -> Path:
    backend = TOKENIZERS[kind]()
    trainer_of = {"Unigram": trainers.UnigramTrainer, "WordPiece": trainers.WordPieceTrainer}
    trainer = trainer_of.get(type(backend.model).__name__, trainers.BpeTrainer)
    special = ["<unk>", *SPECIAL]
    more = {"unk_token": "<unk>"} if trainer is trainers.UnigramTrainer else {}
    text = [*corpus, "[INST] Is it? [/INST] Yes it is."] * 2
    backend.train_from_iterator(
        text, trainer(vocab_size=700, special_tokens=special, show_progress=False, **more)
    )
    if kind == "legacy":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        content = json.loads(backend.to_str()) | {"pre_tokenizer": None}
        backend = Backend.from_str(json.dumps(content))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path


LLAMA_2 = SHAPES["llama 2"][0]
RECORDS = [
    [("user", "Is it?"), ("assistant", "Yes it is."), ("user", "Sure?"), ("assistant", "I am.")],
    [("user", "Is it?"), ("assistant", "Yes"), ("user", " x  y"), ("assistant", "z\n\n  z")],
]


@pytest.mark.parametrize("shape", ["llama 2", "zephyr", "chatml", "gpt-oss, another mark behind"
                                   " the last", "vicuna"])  # fmt: skip
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_records_have_the_tokens_of_apply_chat_template(
    kind: str, shape: str, tmp_path: Path, corpus: list[str]
) -> None:
    if kind == "word piece" and shape in ("llama 2", "vicuna"):
        pytest.skip("an answer that begins with a space, which this kind drops: no mask of theirs")
    path = _tokenizer(kind, tmp_path, corpus)
    theirs, ours = AutoTokenizer.from_pretrained(path), load_tokenizer(path)
    for turns in RECORDS:
        said = stated(theirs, SHAPES[shape][0], "always", turns)
        length = len(said.mask) - said.mask[::-1].index(1)
        for ours.chat_template in (bare(SHAPES[shape][0]), SHAPES[shape][0]):
            found = ExampleEncoder(ours).encode(Dialogue(tuple(turns)))
            assert found == (said.ids[:length], said.mask[:length])


def test_a_legacy_tokenizer_puts_a_space_behind_special_tokens(
    tmp_path: Path, corpus: list[str]
) -> None:
    """Else the test above would show nothing of it."""
    tokenizer = load_tokenizer(_tokenizer("legacy", tmp_path, corpus))
    tokenizer.chat_template = bare(SHAPES["zephyr"][0]).replace("<|assistant|>\\n", "<|assistant|>")
    ids, mask = ExampleEncoder(tokenizer).encode(
        Dialogue((("user", "Is it?"), ("assistant", "Yes")))
    )
    pieces = tokenizer._tokenizer.convert_ids_to_tokens(ids)
    assert "".join(p for p, m in zip(pieces, mask, strict=True) if m) == "▁Yes</s>"


@pytest.mark.parametrize("side", ["rstrip", "lstrip", "both"])
def test_special_tokens_may_take_the_space_beside_them(special: Path, side: str) -> None:
    """As official Phi 3's: no token more than inference has, and the same trains."""
    theirs = AutoTokenizer.from_pretrained(special)
    how = {"rstrip": side != "lstrip", "lstrip": side != "rstrip"}
    names = ["<|user|>", "<|assistant|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    tokens: Any = [AddedToken(name, special=True, **how) for name in names]
    theirs.add_tokens(tokens, special_tokens=True)
    path = special.parent / side
    theirs.save_pretrained(path)
    theirs, ours = AutoTokenizer.from_pretrained(path), load_tokenizer(path)
    wide = theirs("<|end|>\n<|end|>", add_special_tokens=False)["input_ids"]
    assert len(wide) == 2, "else this test would show nothing"
    for shape in ("phi 3, an end of document behind the last", "chatml"):
        template = SHAPES[shape][0]
        for turns in (*RECORDS, [("user", "a "), ("assistant", " b \n"), *RECORDS[0]]):
            messages = [{"role": role, "content": text} for role, text in turns]
            whole = theirs.apply_chat_template(messages, chat_template=bare(template))["input_ids"]
            ours.chat_template = bare(template)
            ids, mask = ExampleEncoder(ours).encode(Dialogue(tuple(turns)))
            assert ids == whole[: len(ids)]
            found = theirs.decode([i for i, m in zip(ids, mask, strict=True) if m])
            answers = [text for role, text in turns if role == "assistant"]
            assert all(text.strip() in found for text in answers)
            assert found.count("<|user|>") + found.count("<|im_start|>") == 0
            assert found.count("<|end|>") + found.count("<|im_end|>") == len(answers)
