"""One small interface over Hugging Face tokenizers and SentencePiece models.

Nothing is downloaded unless asked for, and no code that comes with a tokenizer is run.
"""

import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from megatron_scalebio.compat.transformers import names_read
from megatron_scalebio.data.targets import ChatTemplateError
from megatron_scalebio.data.tokenizer_files import content_files, hash_files, load_hugging_face
from megatron_scalebio.errors import UserError

# The names are those of Megatron-LM's --tokenizer-type.
HUGGING_FACE = "HuggingFaceTokenizer"
SENTENCE_PIECE = "SentencePieceTokenizer"

# End-of-document tokens tried, in this order, when a tokenizer does not name its own.
_EOD_CANDIDATES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
# Where a template says by itself what the model is to write, for transformers' assistant masks.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Characters that few merges touch; the first that does not merge with a text goes before it, to
# take the leading space that some tokenizers put there, and is removed again.
_LEADS = ("\n", "\ue000")
# Characters above which a text is tokenized in parts, and tries to cut it.
_LONG, _CUTS_TRIED = 1 << 19, 50
# Characters looked at before and behind a cut. In a text that repeats itself one merge may lead to
# another, by where it begins: so from several places.
_AROUND = ((400, 400), (397, 401), (386, 389))
# Where a text is cut: behind a line feed, a blank line, before a space, and between a word and a
# sign. (In a run of line feeds or spaces one merge leads to another.)
_CUTS = tuple(
    map(
        re.compile, (r"(?<=\S)\n(?=\S)", r"(?<=\n)(?=\S)", r"(?<=\S)(?= \S)", r"(?<=\w)(?=[^\w\s])")
    )
)


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
        tool_template: the one for dialogues with tools, where they have one of their own.
        template_problem: why there is none although the tokenizer brings some; else empty.
        fingerprint: sha256 of the files that define the tokenizer (not of its chat template).
    """

    type: str
    model: str
    vocab_size: int
    eod_id: int
    bos_id: int | None
    adds_bos: bool
    chat_template: str | None
    tool_template: str | None = None
    template_problem: str = ""
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
        lead, lead_ids = self._lead_of(text)
        return self.encode(lead + text)[len(lead_ids) :]

    def encode_long(self, text: str) -> list[int]:
        """As :meth:`encode`, for a text of any length: tokenizers take 100 bytes a token and more.

        The text is cut where no token reaches over, by what stands around.
        """
        ids: list[int] = []
        start = 0
        while len(text) - start > _LONG:
            end = self._cut_behind(text, start + _LONG)
            if end is None:
                break
            ids += (self.encode_continuation if start else self.encode)(text[start:end])
            start = end
        return ids + (self.encode_continuation if start else self.encode)(text[start:])

    def _cut_behind(self, text: str, at: int) -> int | None:
        """The first good place for a cut at or behind ``at``; None if there is none nearby."""
        for kind in _CUTS:
            for found in islice(kind.finditer(text, at, at + _LONG), _CUTS_TRIED):
                if all(self._is_cut(text, found.end(), *around) for around in _AROUND):
                    return found.end()
        return None

    def _is_cut(self, text: str, at: int, left: int, right: int) -> bool:
        """Whether the parts of a text have the tokens that they have together."""
        before, behind = text[max(0, at - left) : at], text[at : at + right]
        lead, _ = self._lead_of(before)
        ids = self.encode(lead + before) + self.encode_continuation(behind)
        return ids == self.encode(lead + before + behind)

    def _lead_of(self, text: str) -> tuple[str, list[int]]:
        """What is to stand before a text so that it is tokenized as if behind other text."""
        for lead, lead_ids in self._leads:
            if self.encode(lead + text)[: len(lead_ids)] == lead_ids:
                return lead, lead_ids
        return "", []

    def encode_spans(
        self, text: str, spans: Sequence[tuple[int, int]], cut: bool
    ) -> tuple[list[int], list[int]]:
        """Token ids of a text, and 1 for each token of the character spans [start, end).

        Args:
            cut: cuts the text where a token would reach over a border of a span, so that what
                stands before it has the tokens that it has alone; else such a token is the span's,
                as in transformers' masks.
        """
        ids, reach = self.encode_reach(text)
        crossed = _crossed(reach, {at for span in spans for at in span}) if cut else []
        if not crossed:
            return ids, _mask(reach, spans)
        ids, mask = [], []
        for start, end in pairwise([0, *crossed, len(text)]):
            inside = [(max(low, start) - start, min(high, end) - start) for low, high in spans]
            inside = [(low, high) for low, high in inside if low < high]
            lead, lead_ids = self._lead_of(text[start:end]) if start else ("", [])
            more, reach = self.encode_reach(lead + text[start:end])
            reach = [(low - len(lead), high - len(lead)) for low, high in reach[len(lead_ids) :]]
            ids += more[len(lead_ids) :]
            mask += _mask(reach, inside)
        return ids, mask

    def encode_reach(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and from which to which character each token reaches.

        Here for tokenizers that do not tell: by where the beginning of the text has other tokens.
        """
        ids = self.encode(text)
        at, ends = 0, []
        for count in range(1, len(ids) + 1):
            while at < len(text) and self.encode(text[:at])[:count] != ids[:count]:
                at += 1
            ends.append(at)
        return ids, list(pairwise([0, *ends]))

    def template_for(self, tools: bool) -> str | None:
        """The chat template for dialogues with tools, or without."""
        return self.tool_template if tools and self.tool_template else self.chat_template

    def render_chat(
        self, messages: Sequence[dict[str, Any]], generate: bool, **context: Any
    ) -> str:
        """The chat template's text; ``generate`` appends the header of an assistant turn.

        Args:
            messages: as transformers takes them.
            context: ``tools``, ``documents`` and what else the template reads.

        Raises:
            ChatTemplateError: the template refuses the dialogue, or there is none.
        """
        raise ChatTemplateError("does not exist for this tokenizer")

    def marked_spans(
        self, messages: Sequence[dict[str, Any]], **context: Any
    ) -> list[tuple[int, int]] | None:
        """The spans that the template puts into ``{% generation %}``; None where it has none."""
        return None

    def marks_targets(self, tools: bool) -> bool:
        """Whether the template for dialogues with tools, or without, says what is a target."""
        return bool(_GENERATION.search(self.template_for(tools) or ""))

    def template_reads(self, tools: bool) -> frozenset[str]:
        """The names that the template for dialogues with tools, or without, is given."""
        return frozenset()

    def split_special(self, text: str) -> list[str]:
        """The special tokens that a text holds and what stands between them, in order."""
        return [text] if text else []

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
        self.fingerprint = hash_files([path])
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
        self._tokenizer = load_hugging_face(path)
        self._tokenizer.model_max_length = 1 << 62  # of no use here, and not always a number
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
        self.chat_templates = template if isinstance(template, dict) else {}
        for one in self.chat_templates.values() or [template]:
            if not isinstance(one, str | None):
                raise UserError(f"{path}: its chat_template is {one!r:.80}, not text (mend it)")
        self.chat_template = template
        if self.chat_templates:
            self.chat_template = template.get("default")
            self.tool_template = template.get("tool_use")
            if self.chat_template is None:
                self.template_problem = (
                    f"{path}: its chat templates are {', '.join(sorted(template))}, none is "
                    "the default (name one by --chat-template)"
                )
        self._special: re.Pattern[str] | None = None
        self._wide = {
            number: token.content
            for number, token in self._tokenizer.added_tokens_decoder.items()
            if token.lstrip or token.rstrip
        }
        self.fingerprint = hash_files(content_files(path))
        self._leads = self._find_leads()

    def encode(self, text: str) -> list[int]:
        if self._backend is not None:
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def encode_reach(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if self._backend is None:
            return super().encode_reach(text)
        encoding = self._backend.encode(text, add_special_tokens=False)
        if not self._wide:
            return encoding.ids, encoding.offsets
        reach = list(encoding.offsets)
        for number, token in enumerate(encoding.ids):
            if token in self._wide:
                reach[number] = self._without_space(text, token, reach[number])
        return encoding.ids, reach

    def _without_space(self, text: str, token: int, reach: tuple[int, int]) -> tuple[int, int]:
        """A special token may take the white space beside it, which no turn is to be cut at."""
        written = self._wide[token]
        at = text.find(written, *reach)
        return reach if at < 0 else (at, at + len(written))

    def render_chat(
        self, messages: Sequence[dict[str, Any]], generate: bool, **context: Any
    ) -> str:
        return self._render(messages, context, add_generation_prompt=generate)[0]

    def marked_spans(
        self, messages: Sequence[dict[str, Any]], **context: Any
    ) -> list[tuple[int, int]] | None:
        if not self.marks_targets("tools" in context):
            return None
        return self._render(messages, context, return_assistant_tokens_mask=True)[1]

    def template_reads(self, tools: bool) -> frozenset[str]:
        template = self.template_for(tools)
        return names_read(template) if template else frozenset()

    def _render(
        self, messages: Sequence[dict[str, Any]], context: dict[str, Any], **how: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """What ``apply_chat_template`` does to one dialogue before it tokenizes."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # As `apply_chat_template`: a key without a value is no key.
        messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
        template = self.template_for("tools" in context)
        try:
            texts, spans = render_jinja_template(
                [messages],
                chat_template=template,
                **{**self._tokenizer.special_tokens_map, **context},
                **how,
            )
        except Exception as error:
            # Templates raise this themselves, e.g. for a system turn that the model never had.
            raise ChatTemplateError(f"refuses the dialogue: {error}") from error
        return texts[0], spans[0] if spans else []

    def split_special(self, text: str) -> list[str]:
        if self._special is None:
            tokens = {*self._tokenizer.all_special_tokens, *self._tokenizer.added_tokens_encoder}
            listed = sorted(map(re.escape, tokens), key=len, reverse=True)
            self._special = re.compile(f"({'|'.join(listed) or '(?!)'})")
        return [piece for piece in self._special.split(text) if piece]

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


def _crossed(reach: Sequence[tuple[int, int]], borders: set[int]) -> list[int]:
    """The borders that a token reaches over, in order."""
    crossed = []
    ends = [high for _, high in reach]
    for at in sorted(borders):
        number = bisect_right(ends, at)  # the first token that ends behind it
        if number < len(reach) and reach[number][0] < at:
            crossed.append(at)
    return crossed


def _mask(reach: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[int]:
    """1 for each token that has a character in a span; those of no character go with the next."""
    mask = [0] * len(reach)
    spans = sorted(spans)
    at = 0
    for number, (low, high) in enumerate(reach):
        while at < len(spans) and spans[at][1] <= low:
            at += 1
        if at < len(spans):
            start, end = spans[at]
            mask[number] = int(low < end and (high > start or (low == high == start)))
    return mask
