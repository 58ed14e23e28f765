"""Small real tokenizers, trained here on text that every Python ships; sources to sample from."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.sample_world import World

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return [text[:3000] for _, text in sorted(topics.items())][:40]


@pytest.fixture(scope="session")
def tokenizer_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def _save(tokenizer: Tokenizer, path: Path, template: str | None) -> Path:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    wrapped.chat_template = template
    wrapped.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def byte_level(tokenizer_root: Path, corpus: list[str]) -> Path:
    """GPT-2's kind of BPE, with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return _save(tokenizer, tokenizer_root / "byte_level", CHATML)


@pytest.fixture(scope="session")
def border_merging(tokenizer_root: Path) -> Path:
    """A BPE that splits nowhere, so that its merges cross the borders of turns."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        ["### Response:\nHello", "ponse:\nHe", "assistant: Hi"] * 9, trainer
    )
    return _save(tokenizer, tokenizer_root / "border_merging", None)


@pytest.fixture(scope="session")
def metaspace(tokenizer_root: Path, corpus: list[str]) -> Path:
    """Llama-2's kind of BPE: a space is put before the first word of a text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=["<unk>", *SPECIAL, *fallback], show_progress=False
    )
    words = [line.replace(" ", "▁") for text in corpus for line in text.split("\n") if line]
    tokenizer.train_from_iterator(words, trainer)
    path = _save(tokenizer, tokenizer_root / "metaspace", None)
    # Byte pieces are ordinary tokens: as special ones, "<0x0A>" in a text would be parsed.
    content = json.loads((path / "tokenizer.json").read_text())
    content["added_tokens"] = [
        t for t in content["added_tokens"] if not t["content"].startswith("<0x")
    ]
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def _train_sentencepiece(path: Path, corpus: list[str], dummy_prefix: bool) -> Path:
    with open(path, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=writer,
            model_type="bpe",
            vocab_size=700,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=dummy_prefix,
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    return path


@pytest.fixture(scope="session")
def sentence_piece(tokenizer_root: Path, corpus: list[str]) -> Path:
    return _train_sentencepiece(tokenizer_root / "plain.model", corpus, False)


@pytest.fixture(scope="session")
def sentence_piece_dummy_prefix(tokenizer_root: Path, corpus: list[str]) -> Path:
    return _train_sentencepiece(tokenizer_root / "dummy.model", corpus, True)


@pytest.fixture
def world(tmp_path: Path, byte_level: Path) -> World:
    return World(tmp_path, byte_level)
