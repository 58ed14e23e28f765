"""What of an answer trains where it has tool calls, reasoning or a weight, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from megatron_scalebio.data.dialogue import ExampleEncoder
from megatron_scalebio.data.examples import RecordError
from megatron_scalebio.data.formats import parse_record
from megatron_scalebio.data.load_tokenizer import load_tokenizer
from megatron_scalebio.data.tokenizer import Tokenizer
from tests.data.chat_templates import bare
from tests.data.test_fields import CALL, CHAT, TOOL_TEMPLATE, TOOLS, USER, answer, chat, marked

DIALOGUES = 30  # of every shape

_OTHERS = "<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>"
_TURNS = "{% for m in messages %}{% if m.role != 'assistant' %}" + _OTHERS + "{% else %}"
_PROMPT = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<s>{% endif %}"
_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
_CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
_THOUGHT = "{% if m.reasoning_content %}<t>{{ m.reasoning_content }}</t>{% endif %}"
_SAID = "{{ m.content or '' }}"
_HEAD = "<|im_start|>assistant<s>"  # a border that no token crosses


def _shape(said: str, head: str = _HEAD, turns: str = _TURNS, prompt: str = _PROMPT) -> str:
    said = "{% generation %}" + said + "{% endgeneration %}"
    return _TOOLS + turns + head + said + prompt


_RESULTS = (
    "{% for m in messages %}{% if m.role == 'tool' %}<r>{{ m.content }}</r>"
    "{% elif m.role != 'assistant' %}" + _OTHERS + "{% else %}"
)
_LAST_THOUGHT = "{% if loop.last %}<t>{{ m.reasoning_content or '' }}</t>{% endif %}"
SHAPES = {
    "calls behind the content": _shape(_THOUGHT + _SAID + _CALLS + "<|im_end|>"),
    "calls before the content": _shape(_CALLS + _THOUGHT + _SAID + "<|im_end|>"),
    "calls between, trimmed": _shape(
        _THOUGHT + _CALLS + "{{ (m.content or '') | trim }}" + "<|im_end|>"
    ),
    "a list of calls, and no content beside them": _shape(
        "{% if m.tool_calls %}[{% for c in m.tool_calls %}{{ c.function | tojson }}"
        "{% if not loop.last %}, {% endif %}{% endfor %}]{% else %}" + _THOUGHT + _SAID
        + "{% endif %}<|im_end|>"
    ),
    "a line before calls where there is content": _shape(
        _THOUGHT + _SAID + "{% if m.tool_calls and m.content %}\n\n{% endif %}" + _CALLS
        + "<|im_end|>"
    ),
    "results without a turn of their own": _shape(
        _THOUGHT + _SAID + _CALLS + "<|im_end|>", turns=_RESULTS
    ),
    "a thought in the last turn alone": _shape(_LAST_THOUGHT + _SAID + _CALLS + "<|im_end|>"),
    "a thought opened by the prompt alone": _shape(
        _THOUGHT + _SAID + _CALLS + "<|im_end|>",
        prompt=_PROMPT.replace("<s>", "<s><think>\n"),
    ),
    "no generation prompt": _shape(
        _THOUGHT + _SAID + _CALLS + "<|im_end|>", prompt="{% endif %}{% endfor %}"
    ),
    "an end of document marked by itself": _shape(
        _THOUGHT + _SAID + _CALLS + "<|im_end|>",
        prompt="{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>"
        "assistant<s>{% elif "
        "messages[-1].role == 'assistant' %}{% generation %}<|endoftext|>{% endgeneration %}"
        "{% endif %}",
    ),
}  # fmt: skip
WORDS = ["a", "Hello!", "Yes", " Yes", "\n", "<call>", "</call>", "<t>", "assistant", "18 C", "{}",
         "<|im_end|>", "é", '"}', "scalebiosentinel"]  # fmt: skip


def _some(rng: random.Random, at_least: int = 1) -> str:
    return "".join(rng.choices(WORDS, k=rng.randint(at_least, 3)))


def _call(rng: random.Random) -> dict[str, Any]:
    values = [_some(rng), 3, None, True, [1, "x"], {}]
    arguments = {key: rng.choice(values) for key in rng.sample(["in", "n"], rng.randint(0, 2))}
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def _dialogue(rng: random.Random) -> dict[str, Any]:
    """Questions, calls with results, and answers, some of weight 0."""
    turns: list[dict[str, Any]] = []
    for _ in range(rng.randint(1, 3)):
        turns.append({"role": "user", "content": _some(rng)})
        if rng.random() < 0.6:
            calls = [_call(rng) for _ in range(rng.randint(1, 2))]
            turns.append(answer(rng.choice(["", None, _some(rng) + "."]), tool_calls=calls))
            turns += [{"role": "tool", "content": _some(rng)} for _ in calls]
        turns.append(answer(_some(rng) + "."))
    for turn in turns:
        if turn["role"] == "assistant":
            turn |= {"weight": 0} if rng.random() < 0.3 else {}
            thinks = turn is turns[-1] or rng.random() < 0.3
            turn |= {"reasoning_content": _some(rng) + "."} if thinks else {}
    return chat(*turns, tools=TOOLS)


@pytest.mark.parametrize("name", SHAPES)
def test_calls_thoughts_and_weights_train_as_the_marks_say(byte_level: Path, name: str) -> None:
    rng, ours = random.Random(name), load_tokenizer(byte_level)
    template, compared = SHAPES[name], 0
    for _ in range(DIALOGUES):
        record = _dialogue(rng)
        if name.startswith("a list") and any(
            turn.get("tool_calls") and turn.get("reasoning_content") for turn in record["messages"]
        ):
            continue  # refused: the thought may be lost
        messages = [{k: v for k, v in m.items() if v is not None} for m in record["messages"]]
        (text,), (spans,) = render_jinja_template(
            [messages], tools=TOOLS, chat_template=template, return_assistant_tokens_mask=True
        )
        answers = [m for m in record["messages"] if m["role"] == "assistant"]
        joined = spans if len(spans) == len(answers) else [*spans[:-2], (spans[-2][0], len(text))]
        trained = [
            text[low:high]
            for (low, high), turn in zip(joined, answers, strict=True)
            if turn.get("weight", 1)
        ]
        compared += bool(trained)
        for ours.chat_template in (template, bare(template)):
            ids, mask = ExampleEncoder(ours).encode(parse_record(record, "messages", "f:1"))
            where = (name, record, ours.chat_template)
            assert text.startswith(ours.decode(ids)), where
            found = ours.decode([i for i, m in zip(ids, mask, strict=True) if m])
            assert found == "".join(trained), where
    assert compared > DIALOGUES // 5


@pytest.fixture
def tokenizer(byte_level: Path) -> Tokenizer:
    return load_tokenizer(byte_level)


RESULT = {"role": "tool", "content": "hot"}
CALLED = (USER, answer("", tool_calls=[CALL]), RESULT, answer("It is."))


def test_a_tool_result_never_trains(tokenizer: Tokenizer) -> None:
    """Neither where a mark reaches over it, nor where it stands inside an answer."""
    over = "{% for m in messages %}{% if m.role == 'user' %}" + _OTHERS + "{% elif m.role == "
    over += "'assistant' %}{% if m.tool_calls %}{% generation %}" + _CALLS
    over += "<r>{{ messages[loop.index].content }}</r>{{ messages[loop.index + 1].content }}"
    over += "<|im_end|>{% endgeneration %}{% endif %}{% endif %}{% endfor %}"
    template = over + "{% if add_generation_prompt %}{% endif %}"
    try:
        found = marked(tokenizer, template, chat(*CALLED))
    except RecordError as error:
        found = str(error)
    assert "hot" not in "".join(part.split("⟧")[0] for part in found.split("⟦")[1:])
    inside = "{% for m in messages %}{% if m.role == 'user' %}" + _OTHERS + "{% elif m.role == "
    inside += "'assistant' %}<|im_start|>assistant {% if m.tool_calls %}" + _CALLS
    inside += "<r>{{ messages[loop.index].content }}</r>{% endif %}{{ m.content }}<|im_end|>"
    inside += (
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    turns = (USER, answer("Look. ", tool_calls=[CALL]), *CALLED[2:])
    with pytest.raises(RecordError, match="puts another turn into assistant turn 1"):
        marked(tokenizer, inside, chat(*turns))


@pytest.mark.parametrize("name", ["reasoning_content", "tools", "documents", "tool_calls"])
def test_a_field_that_a_template_only_names_is_refused(tokenizer: Tokenizer, name: str) -> None:
    template = CHAT + "{# no reasoning_content, tools, documents or tool_calls #}"
    template += "{% if messages[1].reasoning_content and tools and documents %}{% endif %}"
    record = {
        "reasoning_content": chat(USER, answer("x", reasoning_content="r")),
        "tools": chat(USER, answer("x"), tools=TOOLS),
        "documents": chat(USER, answer("x"), documents=[{"title": "t", "text": "d"}]),
        "tool_calls": chat(USER, answer("x", tool_calls=[CALL])),
    }[name]
    with pytest.raises(RecordError, match=f"^f:1: the chat template has no place for '{name}'"):
        marked(tokenizer, template, record)


def test_a_second_call_that_is_lost_is_refused(tokenizer: Tokenizer) -> None:
    template = TOOL_TEMPLATE.replace("for c in m.tool_calls", "for c in m.tool_calls[:1]")
    assert "weather" in marked(tokenizer, template, chat(*CALLED))
    twice = chat(USER, answer("", tool_calls=[CALL, CALL]), RESULT, answer("It is."))
    with pytest.raises(RecordError, match="no place for 'tool_calls'"):
        marked(tokenizer, template, twice)


@pytest.mark.parametrize("role", ["system", "tool", "user"])
def test_a_turn_that_a_template_leaves_out_is_refused(tokenizer: Tokenizer, role: str) -> None:
    template = "{% for m in messages if m.role != '" + role + "' %}" + _OTHERS + "{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    record = chat({"role": role, "content": "x"}, answer("x"))
    with pytest.raises(RecordError, match=f"leaves out or changes {role} turn 0"):
        marked(tokenizer, template, record)


def test_earlier_thoughts_may_be_left_out_and_the_last_may_not(tokenizer: Tokenizer) -> None:
    template = SHAPES["a thought in the last turn alone"]
    turns = (USER, answer("a", reasoning_content="one"), USER, answer("b", reasoning_content="two"))
    assert marked(tokenizer, template, chat(*turns)) == (
        "<user Rome?><assistant<s>⟦a>⟧<user Rome?><assistant<s>⟦<t>two</t>b>⟧"
    )


def test_a_name_is_rendered_or_refused(tokenizer: Tokenizer) -> None:
    record = chat({**USER, "name": "Ann"}, answer("x"))
    for template in (CHAT, None):
        with pytest.raises(RecordError, match="has no place for 'name'"):
            marked(tokenizer, template, record)
    named = CHAT.replace("{{ m.role }}", "{{ m.role }}{{ m.name }}")
    assert marked(tokenizer, named, record) == "<userAnn Rome?><assistant ⟦x>⟧"
    result = {**RESULT, "name": "weather"}  # the call says it
    assert marked(tokenizer, TOOL_TEMPLATE, chat(*CALLED[:2], result, *CALLED[3:]))
    with pytest.raises(RecordError, match="has no place for 'name'"):
        marked(tokenizer, TOOL_TEMPLATE, chat(*CALLED[:2], {**RESULT, "name": "other"}, CALLED[3]))


@pytest.mark.parametrize(
    "name",
    ["continue_final_message", "add_generation_prompt", "tokenize", "messages", "generate", "self",
     "chat_template", "return_assistant_tokens_mask"],
)  # fmt: skip
def test_what_a_caller_decides_is_not_for_a_record(tokenizer: Tokenizer, name: str) -> None:
    record = chat(USER, answer("x"), chat_template_kwargs={name: True})
    with pytest.raises(RecordError, match=f"^f:1: chat_template_kwargs: '{name}' is not for a"):
        marked(tokenizer, CHAT, record)
    assert marked(tokenizer, CHAT, record, ignore_fields=("chat_template_kwargs",))


def test_a_key_that_a_template_does_not_read_is_refused(tokenizer: Tokenizer) -> None:
    template = CHAT.replace("assistant {%", "assistant {{ '/no' if mild is true }}{%")
    for value in (True, False):  # it may be the default, and the prompt alone may say it
        record = chat(USER, answer("x"), chat_template_kwargs={"mild": value})
        assert marked(tokenizer, template, record).endswith("⟦x>⟧")
    record = chat(USER, answer("x"), chat_template_kwargs={"wild": True})
    with pytest.raises(
        RecordError, match=r"no place for 'wild' \(.*--ignore-fields chat_template_"
    ):
        marked(tokenizer, template + "{# wild #}", record)


def test_the_last_turn_has_an_end_though_it_is_only_a_call(tokenizer: Tokenizer) -> None:
    """EOD closes it, unless the template does."""
    record = chat(*CALLED[:2])
    for end in ("", "{% if not loop.last %}<|im_end|>{% endif %}"):
        bare_calls = _shape(_SAID + _CALLS + end).replace("{% generation %}", "")
        bare_calls = bare_calls.replace("{% endgeneration %}", "")
        assert marked(tokenizer, bare_calls, record).endswith("</call><|endoftext|>⟧")
    content = "{% if m.tool_calls %}" + _CALLS + "{% else %}" + _SAID + "<|im_end|>{% endif %}"
    assert marked(tokenizer, bare(_shape(content)), record).endswith("</call><|endoftext|>⟧")
    content = content.replace(_CALLS, _CALLS + "<wait>")
    assert marked(tokenizer, bare(_shape(content)), record).endswith("</call><wait>⟧")


def test_a_template_without_a_generation_prompt_does_not_train_its_header(
    tokenizer: Tokenizer,
) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    template += "{% endfor %}"
    record = chat(USER, answer("a"), USER, answer("b"))
    assert marked(tokenizer, template, record) == (
        "<user\nRome?>\n<assistant\n⟦a>⟧\n<user\nRome?>\n<assistant\n⟦b>⟧"
    )
    always = template + "<|im_start|>assistant{{ '\n' }}"  # asked for or not
    assert marked(tokenizer, always, record) == marked(tokenizer, template, record)


def test_a_system_turn_may_stand_in_the_last_question(tokenizer: Tokenizer) -> None:
    """At inference it stands elsewhere; the answers' targets are the same."""
    template = (
        "{% set s = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}"
        "[INST]{% if loop.index0 >= (messages[1:] | length) - 2 %}{{ s }}\n\n{% endif %}"
        "{{ m.content }}[/INST]{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    system = {"role": "system", "content": "S"}
    record = chat(system, USER, answer("a"), USER, answer("b"))
    assert marked(tokenizer, template, record) == (
        "[INST]Rome?[/INST]⟦a>⟧[INST]S\n\nRome?[/INST]⟦b>⟧"
    )


def test_an_error_of_any_kind_in_a_template_is_the_records(tokenizer: Tokenizer) -> None:
    template = CHAT + "{{ 'x' * wide }}{% for k in odd %}{% endfor %}"
    for value in ({"wide": 10**20}, {"odd": 3}, {"wide": {"a": []}}, {"raise_exception": 1}):
        record = chat(USER, answer("x"), chat_template_kwargs=value)
        with pytest.raises(RecordError, match=r"^f:1: the chat template "):
            marked(tokenizer, template, record)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_calls", 5),
        ("tool_calls", "weather"),
        ("tool_calls", {"function": {}}),
        ("tool_calls", ["weather"]),
        ("tool_calls", [{"function": 5}]),
        ("name", ["weather"]),
        ("reasoning_content", {"text": "r"}),
    ],
)
@pytest.mark.parametrize("template", [TOOL_TEMPLATE, CHAT, None])
def test_fields_of_another_type_are_refused(
    tokenizer: Tokenizer, template: str | None, field: str, value: object
) -> None:
    turns = (USER, answer("a", tool_calls=[CALL]), {**RESULT, "tool_call_id": 3}, answer("x"))
    at = 2 if field == "name" else 3
    record = chat(*turns[:at], {**turns[at], field: value}, *turns[at + 1 :])
    with pytest.raises(RecordError, match=r"^f:1: "):
        marked(tokenizer, template, record)


def test_no_tools_are_no_field_that_is_lost(tokenizer: Tokenizer) -> None:
    record = chat(USER, answer("x"), chat_template_kwargs={"tools": None, "documents": None})
    assert marked(tokenizer, CHAT, record).endswith("⟦x>⟧")
