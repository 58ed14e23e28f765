"""One small interface over Hugging Face tokenizers and SentencePiece models.

Nothing is downloaded unless asked for, and no code that comes with a tokenizer is run.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_scalebio.errors import UserError

# The names are those of Megatron-LM's --tokenizer-type.
HUGGING_FACE = "HuggingFaceTokenizer"
SENTENCE_PIECE = "SentencePieceTokenizer"

# End-of-document tokens tried, in this order, when a tokenizer does not name its own.
_EOD_CANDIDATES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
# Characters that few merges touch; the first that does not merge with a text goes before it, to
# take the leading space that some tokenizers put there, and is removed again.
_LEADS = ("\n", "\ue000")
# The files that decide how text becomes ids; the first set that is present is the fingerprint.
_CONTENT_FILES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("spiece.model",),
    ("vocab.json", "merges.txt", "added_tokens.json"),
    ("vocab.txt", "added_tokens.json"),
)


class ChatTemplateError(Exception):
    """What a chat template does not do; the message completes "the chat template ..."."""


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        type: Megatron-LM's name of the kind of tokenizer.
        model: the path it was loaded from.
        vocab_size: largest id + 1, added tokens included.
        eod_id: the token that ends a document or, in the built-in template, a turn.
        bos_id: the token that begins a document, or None.
        adds_bos: whether the tokenizer itself begins every document with ``bos_id``.
        chat_template: the Jinja template that renders a dialogue, or None.
        fingerprint: sha256 of the files that define the tokenizer (not of its chat template).
    """

    type: str
    model: str
    vocab_size: int
    eod_id: int
    bos_id: int | None
    adds_bos: bool
    chat_template: str | None
    fingerprint: str
    _leads: list[tuple[str, list[int]]]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of a text that begins a document; no BOS or EOD is added."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included where the tokenizer can spell them."""

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that follows other text.

        Differs from :meth:`encode` for the tokenizers that put a space before a document's
        first word: behind other text that would be a space which nobody wrote.
        """
        for lead, lead_ids in self._leads:
            ids = self.encode(lead + text)
            if ids[: len(lead_ids)] == lead_ids:
                return ids[len(lead_ids) :]
        return self.encode(text)

    def render_chat(self, messages: Sequence[tuple[str, str]], generate: bool) -> str:
        """The chat template's text; ``generate`` appends the header of an assistant turn.

        Raises:
            ChatTemplateError: the template refuses the dialogue, or there is none.
        """
        raise ChatTemplateError("does not exist for this tokenizer")

    def describe(self) -> dict[str, Any]:
        """What ``source.json`` records of a tokenizer."""
        return {
            "type": self.type,
            "model": self.model,
            "vocab_size": self.vocab_size,
            "eod": self.eod_id,
            "fingerprint": self.fingerprint,
        }

    def _find_leads(self) -> list[tuple[str, list[int]]]:
        """The leads that take a leading space of this tokenizer, with their ids; often none."""
        alone = self.encode("a")
        leads = []
        for lead in _LEADS:
            ids, behind = self.encode(lead), self.encode(lead + "a")
            if ids and behind[: len(ids)] == ids and behind != ids + alone:
                leads.append((lead, ids))
        return leads


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file."""

    type = SENTENCE_PIECE

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a SentencePiece model (give a .model file)") from error
        self.model = str(path)
        self.vocab_size = self._processor.get_piece_size()
        self.eod_id = self._processor.eos_id()
        if self.eod_id < 0:
            raise UserError(
                f"{path}: the SentencePiece model has no end-of-sentence piece (train it with an "
                "eos_id)"
            )
        bos_id = self._processor.bos_id()
        self.bos_id = bos_id if bos_id >= 0 else None
        self.adds_bos = False
        self.chat_template = None
        self.fingerprint = _hash_files([path])
        self._leads = self._find_leads()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])


class HuggingFaceTokenizer(Tokenizer):
    """A directory with Hugging Face tokenizer files, or one ``tokenizer.json``."""

    type = HUGGING_FACE

    def __init__(self, path: Path) -> None:
        self.model = str(path)
        self._tokenizer = _load_hugging_face(path)
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            # tokenizer.json may carry the settings of whoever saved it.
            self._backend.no_truncation()
            self._backend.no_padding()
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod_id = self._find_eod(vocabulary)
        self.bos_id = self._tokenizer.bos_token_id
        first = self._tokenizer("a")["input_ids"][:1]
        self.adds_bos = self.bos_id is not None and first == [self.bos_id]
        template = self._tokenizer.chat_template
        self.chat_template = template.get("default") if isinstance(template, dict) else template
        self.fingerprint = _hash_files(_content_files(path))
        self._leads = self._find_leads()

    def encode(self, text: str) -> list[int]:
        if self._backend is not None:
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def render_chat(self, messages: Sequence[tuple[str, str]], generate: bool) -> str:
        import jinja2

        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self._tokenizer.apply_chat_template(
                turns,
                chat_template=self.chat_template,
                tokenize=False,
                add_generation_prompt=generate,
            )
        except jinja2.TemplateError as error:
            # Templates raise this themselves, e.g. for a system turn that the model never had.
            raise ChatTemplateError(f"refuses the dialogue: {error}") from error

    def _find_eod(self, vocabulary: dict[str, int]) -> int:
        if self._tokenizer.eos_token_id is not None:
            return self._tokenizer.eos_token_id
        for token in _EOD_CANDIDATES:
            if token in vocabulary:
                return vocabulary[token]
        raise UserError(
            f'{self.model}: the tokenizer names no eos_token (add "eos_token" to '
            "tokenizer_config.json)"
        )


def load_tokenizer(
    model: str | Path, *, chat_template: str | None = None, allow_download: bool = False
) -> Tokenizer:
    """Loads a tokenizer and never runs code that came with it.

    Args:
        model: a SentencePiece ``.model`` file, a ``tokenizer.json``, a directory with either or
            with other Hugging Face tokenizer files; with ``allow_download`` also the name of a
            model on the Hugging Face Hub.
        chat_template: None for the tokenizer's own template if it has one, ``"plain"`` for the
            built-in one, or the path of a Jinja file.

    Raises:
        UserError: there is no such tokenizer, it cannot be read, or it has no end token.
    """
    path = Path(model)
    if not path.exists() and allow_download:
        path = _download(str(model))
    if not path.exists():
        raise UserError(
            f"{model}: no such tokenizer file or directory (give a .model file, a tokenizer.json "
            "or a directory that holds one)"
        )
    tokenizer = _open(path)
    if chat_template == "plain":
        tokenizer.chat_template = None
    elif chat_template is not None:
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise UserError("--chat-template: a chat template needs a Hugging Face tokenizer")
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{chat_template}: cannot read the chat template: {error.strerror} (give a Jinja "
                "file, or plain)"
            ) from error
        _try_template(tokenizer, chat_template)
    return tokenizer


def _try_template(tokenizer: HuggingFaceTokenizer, where: str) -> None:
    """Refuses a file that is no template before a record is blamed for it."""
    import jinja2

    problem = "" if (tokenizer.chat_template or "").strip() else "it is empty"
    try:
        tokenizer.render_chat([("user", "?")], generate=False)
    except ChatTemplateError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            problem = f"line {error.__cause__.lineno}: {error.__cause__.message}"
    if problem:
        raise UserError(f"{where}: is no chat template: {problem} (give a Jinja file, or plain)")


def _open(path: Path) -> Tokenizer:
    if path.is_file():
        if path.suffix == ".json":
            return HuggingFaceTokenizer(path)
        return SentencePieceTokenizer(path)
    names = {entry.name for entry in path.iterdir()}
    if "tokenizer.model" in names and not names & {"tokenizer.json", "tokenizer_config.json"}:
        return SentencePieceTokenizer(path / "tokenizer.model")
    return HuggingFaceTokenizer(path)


def _load_hugging_face(path: Path) -> Any:
    # Silences a warning about forks, and keeps one worker to one core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    json_file = path / "tokenizer.json" if path.is_dir() else path
    if json_file.exists():
        _check_tokenizer_json(json_file)
        if path.is_file() or not (path / "tokenizer_config.json").exists():
            return PreTrainedTokenizerFast(tokenizer_file=str(json_file))
    try:
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(
            f"{path}: cannot load a tokenizer: {str(error).splitlines()[0]} (the directory needs "
            "tokenizer.json, or tokenizer_config.json with vocabulary)"
        ) from error


def _check_tokenizer_json(path: Path) -> None:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: malformed JSON ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{path}: not a tokenizer.json: it has no field 'model'")


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["tokenizer*", "*.model", "vocab.*", "merges.txt", "*.jinja", "added_tokens.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns, "special_tokens_map.json"]))
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot download the tokenizer: {error}") from error


def _content_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for names in _CONTENT_FILES:
        if (path / names[0]).exists():
            return [path / name for name in names if (path / name).exists()]
    return sorted(entry for entry in path.iterdir() if entry.is_file())


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()
