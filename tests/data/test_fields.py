"""Every field of a record that says something is rendered, honoured or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_scalebio.commands.prepare import remarks
from megatron_scalebio.data.dialogue import ExampleEncoder
from megatron_scalebio.data.examples import (
    AS_ITS_ROLE,
    AS_PROMPT,
    Dialogue,
    RecordError,
    Text,
    Turn,
)
from megatron_scalebio.data.formats import detect_format, parse_record, read_examples
from megatron_scalebio.data.load_tokenizer import load_tokenizer
from megatron_scalebio.data.prepare import prepare
from megatron_scalebio.data.record_fields import RecordOptions, parse_columns
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.errors import UserError
from tests.data.preparing import config, write_jsonl

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"in": "Rome"}},
}
# As Qwen: tools in front, calls behind the content, thoughts before it.
TOOL_TEMPLATE = """{%- if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>{%- endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- if m.tool_calls %}{%- for c in m.tool_calls %}<call>{{ c.function.name }}
{{- c.function.arguments | tojson }}{%- endfor %}{%- endif %}<|im_end|>{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As Llama 3.1: a turn with calls has no content.
CALLS_ALONE = """{%- if tools %}{{ tools | tojson }}{%- endif %}{%- for m in messages %}
{%- if m.tool_calls %}<|im_start|>assistant {{ m.tool_calls[0].function.name }}<|im_end|>
{%- else %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant {% endif %}"""
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"


@pytest.fixture
def tokenizer(byte_level: Path) -> Tokenizer:
    return load_tokenizer(byte_level)


def marked(tokenizer: Tokenizer, template: str | None, record: dict[str, Any], **how: Any) -> str:
    """The example of a record, what trains between ⟦ and ⟧."""
    tokenizer.chat_template = template
    options = RecordOptions(**{k: v for k, v in how.items() if k != "train_on_prompt"})
    example = parse_record(record, detect_format(record, "f:1", options), "f:1", options)
    encoder = ExampleEncoder(tokenizer, train_on_prompt=how.get("train_on_prompt", False))
    ids, mask = encoder.encode(example, "f:1")
    text, at = "", 0
    while at < len(ids):
        end = at
        while end < len(ids) and mask[end] == mask[at]:
            end += 1
        piece = tokenizer.decode(ids[at:end])
        text += f"⟦{piece}⟧" if mask[at] else piece
        at = end
    return text.replace("<|im_start|>", "<").replace("<|im_end|>", ">")


def chat(*turns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": list(turns), **more}


USER = {"role": "user", "content": "Rome?"}


def answer(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize("content", ["", None, "Let me see. "])
def test_tool_calls_and_tools_are_rendered_and_train(
    tokenizer: Tokenizer, content: str | None
) -> None:
    turns = (USER, answer(content, tool_calls=[CALL]), {"role": "tool", "content": "hot"})
    record = chat(*turns, answer("It is hot."), tools=TOOLS)
    called = f'⟦{content or ""}<call>weather{{"in": "Rome"}}>⟧'
    assert marked(tokenizer, TOOL_TEMPLATE, record) == (
        f"<tools {json.dumps(TOOLS)}><user\nRome?><assistant\n{called}"
        "<tool\nhot><assistant\n⟦It is hot.>⟧"
    )
    found = marked(tokenizer, CALLS_ALONE, record)
    assert found.endswith("<user Rome?><assistant ⟦weather>⟧<tool hot><assistant ⟦It is hot.>⟧")
    alone = marked(tokenizer, TOOL_TEMPLATE, chat(*turns[:2], tools=json.dumps(TOOLS)))
    assert alone.endswith(f"<assistant\n{called}")


@pytest.mark.parametrize(
    ("written", "text", "found"),
    [
        ("{{ a | tojson }}", '{"in":"Rome"}', '{"in": "Rome"}'),
        (
            "{{ c.function | tojson }}",
            '{"in":"Rome"}',
            '{"name": "w", "arguments": {"in": "Rome"}}',
        ),
        ("{{ a if a is string else a | tojson }}", '{"in":"Rome"}', '{"in":"Rome"}'),
        ("{{ 'call ' + a }}", '{"in":"Rome"}', 'call {"in":"Rome"}'),
        ("{{ a | tojson }}", "", "{}"),
        ("{% for k, v in a.items() %}{{ k }}={{ v }}{% endfor %}", '{"in":"Rome"}', "in=Rome"),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_arguments_as_json_text_are_what_the_template_is_written_for(
    tokenizer: Tokenizer, written: str, text: str, found: str, flat: bool
) -> None:
    """OpenAI's logs have text where most templates want the object. Other fields stay."""
    template = "{%- for m in messages %}<|im_start|>{{ m.role }} {{ m.content or '' }}"
    template += "{{ m.reasoning_content or '' }}"
    template += "{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}"
    template += f"{written}{{% endfor %}}<|im_end|>{{%- endfor %}}"
    template += "{%- if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    call = {"function": {"name": "w", "arguments": text}}
    if flat:
        template, call = template.replace("c.function", "c"), call["function"]
    record = chat(USER, answer("", reasoning_content="So: ", tool_calls=[call]))
    assert marked(tokenizer, template, record) == f"<user Rome?><assistant ⟦So: {found}>⟧"


@pytest.mark.parametrize("text", ["Rome", "[1]", '"Rome"', "{"])
def test_arguments_that_are_no_object_are_refused(tokenizer: Tokenizer, text: str) -> None:
    record = chat(USER, answer("", tool_calls=[{"function": {"name": "w", "arguments": text}}]))
    with pytest.raises(RecordError, match=r"f:1: the chat template takes an object as arguments"):
        marked(tokenizer, TOOL_TEMPLATE, record)


def test_what_a_template_refuses_for_another_reason_is_said(tokenizer: Tokenizer) -> None:
    template = "{{ raise_exception('no tools here') }}{{ messages[0].tool_calls }}"
    record = chat(USER, answer("", tool_calls=[{"function": {"name": "w", "arguments": "Rome"}}]))
    with pytest.raises(RecordError, match="no tools here"):
        marked(tokenizer, template, record)


def test_reasoning_is_rendered_and_trains(tokenizer: Tokenizer) -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        record = chat(USER, answer("hot", **{name: "It is July."}))
        assert marked(tokenizer, TOOL_TEMPLATE, record) == (
            "<user\nRome?><assistant\n⟦<think>It is July.</think>hot>⟧"
        )


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (chat(USER, answer("", tool_calls=[CALL])), "tool_calls"),
        (chat(USER, answer("x"), tools=TOOLS), "tools"),
        (chat(USER, answer("x"), documents=[{"text": "d"}]), "documents"),
        (chat(USER, answer("x", reasoning_content="r")), "reasoning_content"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused_by_name(
    tokenizer: Tokenizer, record: dict[str, Any], field: str
) -> None:
    for template in (CHAT, None):
        with pytest.raises(RecordError, match=f"^f:1: the .* template has no place for '{field}'"):
            marked(tokenizer, template, record)
    kept = chat(USER, answer("x", **{k: v for k, v in record["messages"][1].items() if k == field}))
    kept |= {k: v for k, v in record.items() if k == field}
    assert marked(tokenizer, CHAT, kept, ignore_fields=(field,)).endswith("⟦x>⟧")


def test_every_field_that_would_be_lost_is_named_at_once(tokenizer: Tokenizer) -> None:
    record = chat(USER, answer("x", mood="bad"), choices=[1], rank=2)
    with pytest.raises(RecordError) as refused:
        marked(tokenizer, CHAT, record)
    assert str(refused.value) == (
        "f:1: messages[1]: fields 'mood', 'choices', 'rank' are not known in format messages, and "
        "would be lost (--ignore-fields mood choices rank leaves them out, --map reads one as "
        "another)"
    )
    assert refused.value.reason == "unknown fields mood, choices, rank"
    assert marked(tokenizer, CHAT, record, ignore_fields=("mood", "choices", "rank")) == (
        "<user Rome?><assistant ⟦x>⟧"
    )
    record = chat(USER, answer("", tool_calls=[CALL]), tools=TOOLS)
    with pytest.raises(RecordError, match=r"'tools' and 'tool_calls' \(.*fields tools tool_calls"):
        marked(tokenizer, CHAT, record)


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}]
)
@pytest.mark.parametrize("template", [CHAT, None, "tagged"])
def test_an_answer_that_is_not_to_train_does_not(
    tokenizer: Tokenizer, flag: dict[str, Any], template: str | None
) -> None:
    if template == "tagged":
        said = "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        said += "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        template = CHAT.replace("{{ m.content }}<|im_end|>", said)
    record = chat(USER, answer("bad", **flag), USER, answer("good", weight=1))
    found = marked(tokenizer, template, record)
    assert found.split("⟦")[-1].lstrip().startswith("good") and found.count("⟦") == 1
    assert "bad" in found
    everything = marked(tokenizer, template, record, train_on_prompt=True)
    assert everything.count("bad") == 1 and "bad" not in "".join(
        part.split("⟧")[0] for part in everything.split("⟦")[1:]
    )


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ((USER, answer("x", weight=0.5)), "'weight' is 0.5, not 0, 1, true or false"),
        ((USER, answer("x", weight="0")), "'weight' is '0'"),
        ((USER, answer("x", weight=1, train=False)), "'weight' and 'train' contradict each other"),
        (({**USER, "train": True}, answer("x")), "a user turn is to train, and only answers do"),
        ((USER, answer("x", mood="bad")), "field 'mood' is not known in format messages"),
        ((USER, answer("x", function_call={"name": "f"})), "field 'function_call' is not known"),
    ],
)
def test_what_turns_say_is_understood_or_refused(turns: Any, words: str) -> None:
    with pytest.raises(RecordError) as error:
        parse_record(chat(*turns), "messages", "f:1")
    assert words in str(error.value) and str(error.value).startswith("f:1: messages[")


def test_null_and_empty_fields_say_nothing() -> None:
    turn = answer("x", weight=None, tool_calls=None, name=None, mood="")
    record = chat(USER, turn, system=None, tools=[], choices=None)
    assert parse_record(record, "messages", "f:1") == Dialogue(
        (("user", "Rome?"), ("assistant", "x"))
    )


def test_a_system_column_is_a_system_turn() -> None:
    expected = Dialogue((("system", "Be brief."), ("user", "Rome?"), ("assistant", "x")))
    for name in ("system", "system_prompt"):
        for record in (
            chat(USER, answer("x"), **{name: "Be brief."}),
            {"question": "Rome?", "answer": "x", name: "Be brief."},
            {"instruction": "Rome?", "output": "x", name: "Be brief."},
            {"conversations": [{"from": "human", "value": "Rome?"}, {"from": "gpt", "value": "x"}],
             name: "Be brief."},
        ):  # fmt: skip
            assert parse_record(record, detect_format(record, "f:1"), "f:1") == expected
    twice = chat({"role": "system", "content": "Be long."}, USER, answer("x"), system="Be brief.")
    with pytest.raises(RecordError, match="tells two system prompts"):
        parse_record(twice, "messages", "f:1")


def test_the_history_of_an_alpaca_record_is_earlier_turns(tokenizer: Tokenizer) -> None:
    record = {"instruction": "And Rome?", "output": "Hot.", "history": [["Paris?", "Cold."]]}
    example = parse_record(record, "alpaca", "f:1")
    assert example == Dialogue((Turn("user", "Paris?"), Turn("assistant", "Cold.", AS_PROMPT),
                                Turn("user", "And Rome?"), Turn("assistant", "Hot.")))  # fmt: skip
    assert marked(tokenizer, CHAT, record) == (
        "<user Paris?><assistant Cold.><user And Rome?><assistant ⟦Hot.>⟧"
    )
    assert "⟧" not in marked(tokenizer, CHAT, record, train_on_prompt=True)[:-1]
    with pytest.raises(RecordError, match=r"history\[0\]: is not a pair"):
        parse_record({**record, "history": ["Paris?"]}, "alpaca", "f:1")


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1.5, "1.5"), (10**30, "1" + "0" * 30)])
def test_a_number_as_input_stays(value: float, text: str) -> None:
    record = {"instruction": "double it", "input": value, "output": "x"}
    example = parse_record(record, "alpaca", "f:1")
    assert example == Dialogue((("user", f"double it\n\n{text}"), ("assistant", "x")))


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"question": "q", "answer": "a", "context": "c"}, "context"),
        ({"question": "q", "answer": "a", "choices": ["a", "b"]}, "choices"),
        ({"question": "q", "answer": "a", "prompt": "p"}, "question"),
        ({"instruction": "i", "output": "mine", "text": "another"}, "text"),
        ({"text": "t", "title": "T"}, "title"),
        (chat(USER, answer("x"), functions=[{}]), "functions"),
    ],
)
def test_a_field_that_would_be_lost_is_refused_or_counted(
    record: dict[str, Any], field: str
) -> None:
    name = detect_format(record, "f:1")
    with pytest.raises(RecordError, match=f"^f:1: field '{field}' is not known in format {name}"):
        parse_record(record, name, "f:1")
    for names in ((field,), ("*",)):
        example = parse_record(record, name, "f:1", RecordOptions(ignore_fields=names))
        assert example.ignored == (field,)
    assert parse_record({"text": "t", "id": 3, "url": "u"}, "text", "f:1").ignored == ("id", "url")


def test_columns_have_the_names_that_users_give_them() -> None:
    columns = parse_columns(["prompt=q", "answer=out,system=sys"])
    options = RecordOptions(columns=columns)
    record = {"q": "Rome?", "out": "x", "sys": "Be brief."}
    assert detect_format(record, "f:1", options) == "pairs"
    expected = Dialogue((("system", "Be brief."), ("user", "Rome?"), ("assistant", "x")))
    assert parse_record(record, "pairs", "f:1", options) == expected
    with pytest.raises(RecordError, match=r"--map prompt=q would replace the column 'prompt'"):
        parse_record({**record, "prompt": "lost"}, "pairs", "f:1", options)
    for value in ("prompt", "=x", "wish=x", "prompt="):
        with pytest.raises(UserError, match="--map"):
            parse_columns([value])


def test_halves_of_letters_are_mended_wherever_they_stand(tokenizer: Tokenizer) -> None:
    call = {"function": {"name": "f", "arguments": {"x\ud83d": ["\ud83d"]}}}
    record = chat(USER, answer("cut \ud83d", tool_calls=[call]), tools=[{"name": "\ud83d"}])
    found = marked(tokenizer, TOOL_TEMPLATE, record)
    assert found.count("\ufffd") == 4 and "\ud83d" not in found


def test_preference_pairs_are_refused_with_what_to_do() -> None:
    record = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    with pytest.raises(RecordError, match=r"preference pair.*--map answer=chosen"):
        detect_format(record, "f:1")
    options = RecordOptions(columns=parse_columns(["answer=chosen"]), ignore_fields=("rejected",))
    found = parse_record(record, detect_format(record, "f:1", options), "f:1", options)
    assert found == Dialogue((("user", "q"), ("assistant", "good")))


def test_prompt_and_completion_may_be_messages() -> None:
    record = {"prompt": [USER, answer("hot"), USER], "completion": [answer("cold")]}
    found = parse_record(record, detect_format(record, "f:1"), "f:1")
    assert isinstance(found, Dialogue)
    trains = [turn.trains for turn in found.turns if turn.role == "assistant"]
    assert trains == [AS_PROMPT, AS_ITS_ROLE]


def test_named_templates_without_a_default_are_asked_for(byte_level: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(byte_level)
    theirs.chat_template = {"rag": CHAT, "tool_use": TOOL_TEMPLATE}
    theirs.save_pretrained(tmp_path)
    dialogue = Dialogue((("user", "Rome?"), ("assistant", "x")))
    with pytest.raises(UserError, match="templates are rag, tool_use, none is the default"):
        ExampleEncoder(load_tokenizer(tmp_path)).encode(dialogue)
    assert ExampleEncoder(load_tokenizer(tmp_path)).encode(Text("x"))[0]
    named = load_tokenizer(tmp_path, chat_template="rag")
    assert named.chat_template == CHAT
    theirs.chat_template = {"default": CHAT, "tool_use": TOOL_TEMPLATE}
    theirs.save_pretrained(tmp_path)
    with_tools = Dialogue(dialogue.turns, {"tools": TOOLS})
    for example, beginning in ((dialogue, "<|im_start|>user R"), (with_tools, "<|im_start|>tools")):
        ids, _ = ExampleEncoder(load_tokenizer(tmp_path)).encode(example)
        assert named.decode(ids).startswith(beginning)


def test_a_template_writes_the_date_that_it_is_given(byte_level: Path, tmp_path: Path) -> None:
    path = tmp_path / "dated.jinja"
    path.write_text("{{ strftime_now('%d %b %Y') }} " + CHAT)
    dialogue = Dialogue((("user", "Rome?"), ("assistant", "x")))
    for date, text in (("2024-02-29", "29 Feb 2024 "), ("2031-12-01", "01 Dec 2031 ")):
        tokenizer = load_tokenizer(byte_level, chat_template=str(path), date=date)
        ids, _ = ExampleEncoder(tokenizer).encode(dialogue)
        assert tokenizer.decode(ids).startswith(text)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("thought", [0, False, ["so"], {"text": "so"}, 1.5])
def test_a_thought_that_is_no_text_is_refused(name: str, thought: Any) -> None:
    with pytest.raises(RecordError, match=rf"^f:1: messages\[1\]: field '{name}' is .*not a str"):
        parse_record(chat(USER, answer("x", **{name: thought})), "messages", "f:1")


def test_one_turn_thinks_once_and_only_answers_think_or_call() -> None:
    same = chat(USER, answer("x", reasoning_content="so", thinking="so"))
    assert isinstance(parse_record(same, "messages", "f:1"), Dialogue)
    two = chat(USER, answer("x", reasoning_content="so", thinking="thus"))
    with pytest.raises(RecordError, match="'reasoning_content' and 'thinking' tell two thoughts"):
        parse_record(two, "messages", "f:1")
    for role in ("user", "system", "tool"):
        for field in ({"tool_calls": [CALL]}, {"reasoning": "so"}):
            record = chat({"role": role, "content": "q", **field}, answer("x"))
            with pytest.raises(RecordError, match=f"a {role} turn has '.*', and only answers do"):
                parse_record(record, "messages", "f:1")


@pytest.mark.parametrize("nothing", [0, False, 0.0])
@pytest.mark.parametrize("name", ["system", "tools", "documents", "chat_template_kwargs"])
def test_a_field_of_another_type_is_refused_even_if_it_is_false(name: str, nothing: Any) -> None:
    with pytest.raises(RecordError, match=f"^f:1: field '{name}' is "):
        parse_record(chat(USER, answer("x"), **{name: nothing}), "messages", "f:1")
    with pytest.raises(RecordError, match="field 'tool_calls' is not a list of objects"):
        parse_record(chat(USER, answer("x", tool_calls=nothing)), "messages", "f:1")
    with pytest.raises(RecordError, match="field 'name' is "):
        parse_record(chat(USER, answer("x", name=nothing)), "messages", "f:1")
    alpaca = {"instruction": "i", "output": "o", "history": nothing}
    with pytest.raises(RecordError, match="field 'history' is not a list"):
        parse_record(alpaca, "alpaca", "f:1")


def test_tool_calls_may_be_their_json_text(tokenizer: Tokenizer) -> None:
    as_text = chat(USER, answer("", tool_calls=json.dumps([CALL])))
    whole = chat(USER, answer("", tool_calls=[CALL]))
    assert marked(tokenizer, TOOL_TEMPLATE, as_text) == marked(tokenizer, TOOL_TEMPLATE, whole)
    for wrong in ("x", "[1]", "{}x", [1]):
        with pytest.raises(RecordError, match="'tool_calls' is not"):
            parse_record(chat(USER, answer("", tool_calls=wrong)), "messages", "f:1")


@pytest.mark.parametrize("more", ["conversations", "items"])
def test_two_dialogues_in_a_record_are_refused(more: str) -> None:
    turns = [USER, answer("x")]
    shared = [{"from": "human", "value": "Rome?"}, {"from": "gpt", "value": "x"}]
    one = Dialogue((("user", "Rome?"), ("assistant", "x")))
    for first, second in ((turns, turns), (turns, shared)):
        record: dict[str, Any] = {"messages": first, more: second}
        with pytest.raises(RecordError, match=f"holds two dialogues, 'messages' and '{more}'"):
            parse_record(record, detect_format(record, "f:1"), "f:1")
        for name in record:
            options = RecordOptions(ignore_fields=(name,))
            record_format = detect_format(record, "f:1", options)
            if not (first == second and (name, more) == ("messages", "items")):
                assert parse_record(record, record_format, "f:1", options) == one
    record = {"conversations": shared, "items": shared}
    with pytest.raises(RecordError, match="holds two dialogues, 'conversations' and 'items'"):
        parse_record(record, detect_format(record, "f:1"), "f:1")
    for nothing in (None, []):
        record = {"messages": nothing, "conversations": shared}
        assert parse_record(record, detect_format(record, "f:1"), "f:1") == one


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_know_are_refused_where_they_are_used(
    tmp_path: Path, number: str
) -> None:
    call = '{"role": "assistant", "tool_calls": [{"function": {"arguments": {"x": NUMBER}}}]}'
    for text in (
        '{"instruction": "i", "input": NUMBER, "output": "o"}',
        '{"messages": [{"role": "user", "content": "q"}, ' + call + "]}",
        '{"question": "q", "answer": "a", "tools": [{"x": NUMBER}]}',
    ):
        path = tmp_path / "a.jsonl"
        path.write_text(text.replace("NUMBER", number))
        with pytest.raises(RecordError, match=r"has the number .*, which JSON does not know"):
            list(read_examples(path))
    path.write_text(f'{{"text": "t", "id": {number}}}')
    assert list(read_examples(path)) == [Text("t")]


@pytest.mark.parametrize(
    ("number", "right"),
    [("1.5", True), ("-0.25", True), ("7", True), ("1.10", False), ("1e5", False),
     ("12345678901234567890.5", False)],
)  # fmt: skip
def test_a_number_is_written_as_in_the_file_or_refused(
    tmp_path: Path, number: str, right: bool
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"instruction": "i", "input": {number}, "output": "o"}}')
    if right:
        expected = Dialogue((("user", f"i\n\n{number}"), ("assistant", "o")))
        assert list(read_examples(path)) == [expected]
    else:
        with pytest.raises(RecordError, match=f"'input' is {number}, which as a number would be"):
            list(read_examples(path))


def test_replaced_halves_of_letters_are_counted(tmp_path: Path, byte_level: Path) -> None:
    texts = ["whole", "cut \ud83d", "\U0001f600"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    made = config(tmp_path / "out", byte_level, path)
    reports = prepare(made)
    assert reports[0]["replaced_letters"] == 1
    assert "src: 1 records held halves of letters" in "\n".join(remarks(reports, made))
