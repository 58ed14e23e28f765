"""Content in parts: the ids of ``apply_chat_template`` on the whole record, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_scalebio.data.content_parts import check_parts
from megatron_scalebio.data.examples import Dialogue, RecordError
from megatron_scalebio.data.formats import parse_record
from megatron_scalebio.data.load_tokenizer import load_tokenizer
from megatron_scalebio.data.prepare import prepare
from megatron_scalebio.data.record_fields import RecordOptions
from megatron_scalebio.data.tokenizer import Tokenizer
from tests.data.preparing import config, write_jsonl

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }} "
LOOP = "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
JOINS = HEAD + LOOP + "{{ p.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
TRIMS = JOINS.replace("p.text", "p.text | trim").replace("m.content }}", "m.content | trim }}")
SEPARATES = JOINS.replace("p.text", "p.text + '\\n'")
TEXT_ALONE = HEAD + "{{ m.content + '<|im_end|>' }}{% endfor %}"
WRITTEN_AS_LIST = HEAD + "{{ m.content }}<|im_end|>{% endfor %}"
LEFT_OUT = HEAD + "{% if m.content is string %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"


def part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def record(*parts: dict[str, Any]) -> dict[str, Any]:
    user = {"role": "user", "content": list(parts)}
    return {"messages": [user, {"role": "assistant", "content": "a"}]}


@pytest.fixture
def tokenizer(byte_level: Path) -> Tokenizer:
    return load_tokenizer(byte_level)


@pytest.mark.parametrize(
    ("template", "texts", "exact"),
    [
        (JOINS, ("Hello, ", "you "), True),
        (TRIMS, ("Hello,", "you"), True),
        (TRIMS, (" Hello ",), True),
        (TRIMS, ("Hello, ", "you"), False),
        (SEPARATES, ("Hello, ", "you"), False),
        (SEPARATES, ("Hello",), False),
        (TEXT_ALONE, ("Hello, ", "you"), True),
        (WRITTEN_AS_LIST, ("Hello, ", "you"), True),
        (LEFT_OUT, ("Hello, ", "you"), True),
        (None, ("Hello, ", "you"), True),
    ],
)
def test_parts_are_what_the_template_makes_of_them_or_refused(
    tokenizer: Tokenizer, template: str | None, texts: tuple[str, ...], exact: bool
) -> None:
    tokenizer.chat_template = template
    value = record(*map(part, texts))
    dialogue = parse_record(value, "messages", "f:1")
    assert isinstance(dialogue, Dialogue) and dialogue.turns[0].content == "".join(texts)
    if not exact:
        with pytest.raises(RecordError, match=r"^f:1: the chat template does not join the parts"):
            check_parts(dialogue, tokenizer, "f:1")
        return
    check_parts(dialogue, tokenizer, "f:1")
    if template in (JOINS, TRIMS):
        ours = [turn.message() for turn in dialogue.turns]
        theirs = tokenizer.render_chat(value["messages"], False)
        assert tokenizer.render_chat(ours, False) == theirs


@pytest.mark.parametrize("flag", ["weight", "train", "loss", "cache_control"])
def test_what_a_part_says_beside_its_text_is_refused(flag: str) -> None:
    value = record(part("good"), part("bad", **{flag: 0}))
    words = rf"^f:1: messages\[0\]: content\[1\]: field '{flag}' is not known"
    with pytest.raises(RecordError, match=words):
        parse_record(value, "messages", "f:1")
    found = parse_record(value, "messages", "f:1", RecordOptions(ignore_fields=(flag,)))
    assert found.ignored == (flag,)


def test_prepare_leaves_out_what_the_template_does_not_join(
    byte_level: Path, tmp_path: Path
) -> None:
    (tmp_path / "trims.jinja").write_text(TRIMS)
    records = [record(part("Hello, "), part("you")), record(part("Hello,"), part(" you "))]
    path = write_jsonl(tmp_path / "a.jsonl", [*records, record(part("Hello"), part("you"))])
    options = {"chat_template": str(tmp_path / "trims.jinja"), "bad_records": "skip"}
    (report,) = prepare(config(tmp_path / "out", byte_level, path, **options))
    assert (report["examples"], report["skipped"]) == (1, {"content in parts": 2})
