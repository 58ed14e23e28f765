"""Opens a tokenizer, with the chat template that is asked for."""

import contextlib
import datetime
from pathlib import Path
from typing import Any

from megatron_scalebio.compat.transformers import fix_date
from megatron_scalebio.data.targets import ChatTemplateError
from megatron_scalebio.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from megatron_scalebio.data.tokenizer_files import (
    CONTENT_FILES,
    content_files,
    download,
    hash_files,
)
from megatron_scalebio.errors import UserError


def load_tokenizer(
    model: str | Path,
    *,
    chat_template: str | None = None,
    date: str = "",
    allow_download: bool = False,
) -> Tokenizer:
    """Loads a tokenizer and never runs code that came with it.

    Args:
        model: a SentencePiece ``.model`` file, a ``tokenizer.json``, a directory with either or
            with other Hugging Face tokenizer files; with ``allow_download`` also the name of a
            model on the Hugging Face Hub.
        chat_template: None for the tokenizer's own template if it has one, ``"plain"`` for the
            built-in one, the name of one of several that it has, or the path of a Jinja file.
        date: what a template that writes today's date is to write (YYYY-MM-DD); empty: today's.

    Raises:
        UserError: there is no such tokenizer, it cannot be read, or it has no end token.
    """
    path = Path(model)
    if not path.exists() and allow_download:
        path = download(str(model))
    if not path.exists():
        raise UserError(
            f"{model}: no such tokenizer file or directory (give a .model file, a tokenizer.json "
            "or a directory that holds one; prepare --allow-download takes one of the Hugging Face "
            "Hub)"
        )
    tokenizer = _open(path)
    if chat_template is not None:
        tokenizer.template_problem, tokenizer.tool_template = "", None
    if chat_template == "plain":
        tokenizer.chat_template = None
    elif chat_template is not None:
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            raise UserError(
                "--chat-template: a chat template needs a Hugging Face tokenizer (name the folder "
                "of one by --tokenizer, in place of --train-sentencepiece or a .model file)"
            )
        if chat_template in tokenizer.chat_templates:
            tokenizer.chat_template = tokenizer.chat_templates[chat_template]
            return dated(tokenizer, date)
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
            raise UserError(
                f"{chat_template}: cannot read the chat template: {why} (give a Jinja file, or "
                "plain)"
            ) from error
        _try_template(tokenizer, chat_template)
    return dated(tokenizer, date)


def require_ids_of(hf: Path, prepared: dict[str, Any]) -> None:
    """Raises UserError where ids of prepared data mean other text to a Hugging Face model.

    Judged by 512 ids over the vocabulary, where both tokenizers are there and their files differ.

    Args:
        hf: the model's folder; without a tokenizer there is nothing to compare.
        prepared: `Tokenizer.describe` of the data's tokenizer.
    """
    there = any((hf / names[0]).exists() for names in CONTENT_FILES)
    if not (there and Path(prepared["model"]).exists()):
        return
    if hash_files(content_files(hf)) == prepared["fingerprint"]:
        return
    of_data, of_model = load_tokenizer(prepared["model"]), load_tokenizer(hf)
    size = min(of_data.vocab_size, of_model.vocab_size)
    ids = range(0, size, max(1, size // 512))
    other = [i for i in ids if of_data.decode([i]).strip() != of_model.decode([i]).strip()]
    if 2 * len(other) > len(ids):
        one = other[len(other) // 2]
        raise UserError(
            f"model.hf: {hf}: the data were prepared with tokenizer {prepared['model']!r}, in "
            f"which token {one} is {of_data.decode([one])!r}; to this model it is "
            f"{of_model.decode([one])!r} (prepare the data with --tokenizer {hf})"
        )


def dated(tokenizer: Tokenizer, date: str) -> Tokenizer:
    """The tokenizer, whose templates now write this date (in this process); empty: as before."""
    import jinja2

    for template in (tokenizer.chat_template, tokenizer.tool_template):
        if date and template:
            with contextlib.suppress(jinja2.TemplateError):  # its dialogues are refused by name
                fix_date(template, datetime.date.fromisoformat(date))
    return tokenizer


def _try_template(tokenizer: HuggingFaceTokenizer, where: str) -> None:
    """Refuses a file that is no template before a record is blamed for it."""
    import jinja2

    problem = "" if (tokenizer.chat_template or "").strip() else "it is empty"
    try:
        tokenizer.render_chat([{"role": "user", "content": "?"}], generate=False)
    except ChatTemplateError as error:
        if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
            problem = f"line {error.__cause__.lineno}: {error.__cause__.message}"
    if problem:
        raise UserError(f"{where}: is not a chat template: {problem} (give a Jinja file, or plain)")


def _open(path: Path) -> Tokenizer:
    if path.is_file():
        if path.suffix == ".json":
            return HuggingFaceTokenizer(path)
        return SentencePieceTokenizer(path)
    names = {entry.name for entry in path.iterdir()}
    if "tokenizer.model" in names and not names & {"tokenizer.json", "tokenizer_config.json"}:
        return SentencePieceTokenizer(path / "tokenizer.model")
    return HuggingFaceTokenizer(path)
