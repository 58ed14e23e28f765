"""Tokenizers, and the exactness of the loss mask at the borders of turns."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_scalebio.data.dialogue import ExampleEncoder, plain_segments
from megatron_scalebio.data.examples import Dialogue, Text, Turn
from megatron_scalebio.data.load_tokenizer import load_tokenizer, require_ids_of
from megatron_scalebio.data.tokenizer import Tokenizer
from megatron_scalebio.errors import UserError

KINDS = (
    "byte_level",
    "border_merging",
    "metaspace",
    "sentence_piece",
    "sentence_piece_dummy_prefix",
)
TEMPLATES = {
    # name: (template, text around the answer that is a target)
    "trims": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ("", "<|im_end|>"),
    ),
    "no generation prompt": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}</s>"
        "{% else %}<s>[INST] {{ m['content'] }} [/INST]{% endif %}{% endfor %}",
        (" ", "</s>"),
    ),
    "no end of turn": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        ("", ""),  # but for the last, which EOD closes: inference shows none between turns
    ),
    "thinking in the prompt alone": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        ("", "<|im_end|>"),
    ),
    "thinking in the last answer alone": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}<think></think>\n{% endif %}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        None,
    ),
}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param), chat_template="plain")


def target_runs(tokenizer: Tokenizer, ids: list[int], mask: list[int]) -> list[str]:
    """The decoded text of each unbroken run of targets, in its context."""
    runs, at = [], 0
    while 1 in mask[at:]:
        start = mask.index(1, at)
        at = mask.index(0, start) if 0 in mask[start:] else len(mask)
        before = tokenizer.decode(ids[:start])
        runs.append(tokenizer.decode(ids[:at])[len(before) :])
    return runs


def eod_text(tokenizer: Tokenizer) -> str:
    return tokenizer.decode([tokenizer.eod_id])  # SentencePiece spells control pieces as ""


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in ("Hello there", "a  b\n\n\n   c\té中😀 ", "def f(x):\n    return x\n"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert max(ids) < tokenizer.vocab_size
        assert tokenizer.eod_id not in ids


def test_a_long_text_has_the_tokens_it_has_whole(
    tokenizer: Tokenizer, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_scalebio.data.tokenizer._LONG", 2000)
    sizes = []
    encode = type(tokenizer).encode
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, text: sizes.append(len(text)) or encode(self, text)
    )
    for text in ("\n".join(corpus)[:60_000], "### Response:\nHello" * 900, "\n" * 9000, "x" * 9000):
        sizes.clear()
        assert tokenizer.encode_long(text) == encode(tokenizer, text)
    words = " ".join(corpus).split()
    signs = ",".join(word for word in words if word.isalpha())[:9000]
    for text in (
        "\n".join(corpus),
        "\n\n".join(corpus).replace("\n", "\n\n"),
        " ".join(words),
        "\n\n\n".join(words),
        *([signs] if tokenizer.model.endswith("byte_level") else []),
    ):
        text = text[:60_000]
        whole = encode(tokenizer, text)
        sizes.clear()
        assert tokenizer.encode_long(text) == whole
        assert max(sizes) < 6000 < len(text), "it is cut"


@pytest.mark.parametrize("period", ["x ", "ab, ", "a\n", "x\n\n", "aa "])
def test_a_long_text_that_repeats_itself_has_the_tokens_it_has_whole(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, period: str
) -> None:
    monkeypatch.setattr("megatron_scalebio.data.tokenizer._LONG", 2000)
    for before in ("", "b", "bc", "bcd"):
        text = before + period * 4000
        assert tokenizer.encode_long(text) == tokenizer.encode(text)


def test_only_a_dummy_prefix_needs_a_lead(tokenizer: Tokenizer) -> None:
    behind = tokenizer.encode("x") + tokenizer.encode_continuation("Hello")
    assert tokenizer.decode(behind) == "xHello"
    spaced = tokenizer.decode(tokenizer.encode("x") + tokenizer.encode("Hello"))
    assert (spaced == "x Hello") == bool(tokenizer._leads)


def test_border_tokenizer_does_merge_across_the_border(border_merging: Path) -> None:
    """Else the tests below would show nothing."""
    tokenizer = load_tokenizer(border_merging)
    prompt, answer = (segment.text for segment in plain_segments([Turn("assistant", "Hello")]))
    assert tokenizer.encode(prompt + answer) != tokenizer.encode(prompt) + tokenizer.encode(answer)


turn_text = st.text(alphabet="He lo:\n#Rspn\té中", min_size=1, max_size=12).filter(str.strip)
dialogues = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), turn_text), min_size=1, max_size=6
)
thorough = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)


@thorough
@given(messages=dialogues)
def test_plain_template_targets_are_exactly_the_answers(
    tokenizer: Tokenizer, messages: list[tuple[str, str]]
) -> None:
    ids, mask = ExampleEncoder(tokenizer).encode(Dialogue(tuple(messages)))
    answers = [content for role, content in messages if role == "assistant"]
    end = eod_text(tokenizer)
    assert target_runs(tokenizer, ids, mask) == [answer + end for answer in answers]
    assert sum(m and i == tokenizer.eod_id for i, m in zip(ids, mask, strict=True)) == len(answers)
    assert not answers or (ids[-1] == tokenizer.eod_id and mask[-1] == 1)
    full = "".join(
        segment.text + end * segment.closed
        for segment in plain_segments([Turn(*m) for m in messages])
    )
    assert not answers or full.startswith(tokenizer.decode(ids))


@thorough
@given(messages=dialogues)
def test_chat_template_targets_are_exactly_the_answers(
    byte_level: Path, messages: list[tuple[str, str]]
) -> None:
    tokenizer = load_tokenizer(byte_level)
    ids, mask = ExampleEncoder(tokenizer).encode(Dialogue(tuple(messages)))
    answers = [content for role, content in messages if role == "assistant"]
    assert target_runs(tokenizer, ids, mask) == [answer + "<|im_end|>" for answer in answers]
    if answers:
        rendered = tokenizer.render_chat([Turn(*m).message() for m in messages], False)
        assert rendered.startswith(tokenizer.decode(ids))


def test_chat_template_gives_the_tokens_of_transformers(byte_level: Path) -> None:
    from transformers import AutoTokenizer

    messages = [
        ("user", "What is it?"),
        ("assistant", "A test."),
        ("user", "?"),
        ("assistant", "!"),
    ]
    theirs = AutoTokenizer.from_pretrained(byte_level).apply_chat_template(
        [{"role": r, "content": c} for r, c in messages], return_dict=True
    )["input_ids"]
    ours, _ = ExampleEncoder(load_tokenizer(byte_level)).encode(Dialogue(tuple(messages)))
    assert theirs[: len(ours)] == ours
    assert len(theirs) - len(ours) == 1  # the line feed behind the last end of turn


@pytest.mark.parametrize("name", TEMPLATES)
def test_kinds_of_chat_templates(byte_level: Path, tmp_path: Path, name: str) -> None:
    template, around = TEMPLATES[name]
    (tmp_path / "t.jinja").write_text(template)
    tokenizer = load_tokenizer(byte_level, chat_template=str(tmp_path / "t.jinja"))
    answers = ["Yes", "No\n\nbut", "Yes"]
    messages = [m for a in answers for m in (("user", a), ("assistant", a))]
    ids, mask = ExampleEncoder(tokenizer).encode(Dialogue((*messages, ("user", "Yes"))))
    if around is not None:
        expected = [around[0] + answer + around[1] for answer in answers]
        expected[-1] += "" if around[1] else "<|endoftext|>"
        assert target_runs(tokenizer, ids, mask) == expected
    ids, mask = ExampleEncoder(tokenizer).encode(Dialogue(tuple(messages)))
    expected = [
        "Yes<|im_end|>",
        "No\n\nbut<|im_end|>",
        "<think></think>\nYes<|im_end|>",  # the model must write all behind the header
    ]
    assert around is not None or target_runs(tokenizer, ids, mask) == expected


def test_assistant_speaks_first(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
        + str(tokenizer.chat_template)
    )
    ids, mask = ExampleEncoder(tokenizer).encode(Dialogue((("assistant", "Hi"), ("user", "?"))))
    assert target_runs(tokenizer, ids, mask) == ["Hi<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no system turn') }}", "refuses the dialogue: no system turn"),
        ("{% for m in messages %}{{ m['content'] | upper }};{% endfor %}", "leaves out or changes"),
        (
            "{% for m in messages %}{{ m['content'] }};{{ messages | length }}{% endfor %}",
            "otherwise",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}{{ m['content'] }};{% endfor %}",
            "leaves out or changes assistant turn 1",
        ),
        (
            "{% for m in messages %}{{ m['content'] }};{% endfor %}"
            "{{ messages[-1]['content'] | length }}",
            "renders what follows assistant turn 1 by what the turn says",
        ),
        ("{% for %}", "refuses"),
    ],
)
def test_unusable_chat_templates_are_refused(byte_level: Path, template: str, words: str) -> None:
    tokenizer = load_tokenizer(byte_level)
    tokenizer.chat_template = template
    with pytest.raises(UserError) as error:
        ExampleEncoder(tokenizer).encode(Dialogue((("user", "a"), ("assistant", "Yes"))), "f:3")
    assert str(error.value).startswith("f:3: the chat template ")
    assert words in str(error.value)


def test_blank_answers_are_no_targets(sentence_piece: Path) -> None:
    encoder = ExampleEncoder(load_tokenizer(sentence_piece))
    assert encoder.encode(Dialogue((("user", "a"), ("assistant", " \n")))) == ([], [])
    assert encoder.encode(Dialogue((("user", "a"),))) == ([], [])


def test_train_on_prompt_and_text_make_all_but_the_first_token_targets(
    tokenizer: Tokenizer,
) -> None:
    messages = (("user", "Hello"), ("assistant", "Hi"), ("user", "more"))
    ids, mask = ExampleEncoder(tokenizer, train_on_prompt=True).encode(Dialogue(messages))
    assert mask == [0] + [1] * (len(ids) - 1)
    assert "more" in tokenizer.decode(ids)
    ids, mask = ExampleEncoder(tokenizer).encode(Text("Hello there"))
    assert ids == [*tokenizer.encode("Hello there"), tokenizer.eod_id]
    assert mask == [0] + [1] * (len(ids) - 1)
    ids, _ = ExampleEncoder(tokenizer, append_eod=False).encode(Text("Hello there"))
    assert tokenizer.eod_id not in ids


def test_bos_is_put_where_the_tokenizer_itself_puts_it(byte_level: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Backend.from_file(str(byte_level / "tokenizer.json"))
    bos = backend.token_to_id("<s>")
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    backend.enable_truncation(4)  # whoever saved it; no business of ours
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.adds_bos
    ids, mask = ExampleEncoder(tokenizer).encode(Text("Hello there, truncation"))
    assert tokenizer.decode(ids) == "<s>Hello there, truncation</s>"
    assert mask == [0] + [1] * (len(ids) - 1)


def test_a_tokenizer_json_alone_is_enough(byte_level: Path, tmp_path: Path) -> None:
    whole = load_tokenizer(byte_level)
    shutil.copy(byte_level / "tokenizer.json", tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        alone = load_tokenizer(path)
        assert alone.describe() == {**whole.describe(), "model": str(path)}
        assert alone.chat_template is None
        assert alone.encode("Hello there") == whole.encode("Hello there")


def test_fingerprint_follows_the_content(
    byte_level: Path, sentence_piece: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(byte_level, copy)
    assert load_tokenizer(copy).fingerprint == load_tokenizer(byte_level).fingerprint
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (copy / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(copy).fingerprint != load_tokenizer(byte_level).fingerprint
    shutil.copy(sentence_piece, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path / "tokenizer.model").fingerprint == (
        load_tokenizer(sentence_piece).fingerprint
    )


def test_data_of_another_tokenizer_than_the_models_are_refused(
    byte_level: Path, sentence_piece: Path, tmp_path: Path
) -> None:
    """One with as many ids in another order is; one with more tokens, or other files, is not."""
    content = json.loads((byte_level / "tokenizer.json").read_text())
    vocabulary: dict[str, int] = content["model"]["vocab"]
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    described = load_tokenizer(byte_level).describe()
    require_ids_of(model, described)  # no tokenizer: nothing to compare
    turned = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    grown = {**vocabulary, "<one>": len(vocabulary) + 900}
    for changed, differs in ((vocabulary, False), (turned, True), (grown, False)):
        content["model"]["vocab"] = changed
        (model / "tokenizer.json").write_text(json.dumps(content))
        if differs:
            with pytest.raises(UserError, match=r"prepare the data with --tokenizer .*model"):
                require_ids_of(model, described)
        else:
            require_ids_of(model, described)
    with pytest.raises(UserError, match=r"in which token .* is .*; to this model it is"):
        require_ids_of(model, load_tokenizer(sentence_piece).describe())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.model", None, "no such tokenizer"),
        ("bad.model", "no model", "not a SentencePiece model"),
        ("bad.json", "{", "malformed JSON"),
        ("deep.json", "[" * 100_000, "malformed JSON"),
        ("other.json", '{"a": 1}', "has no field 'model'"),
        ("folder/readme.txt", "", "cannot load a tokenizer"),
    ],
)
def test_bad_tokenizers(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(path if path.suffix != ".txt" else path.parent)
    assert words in str(error.value)


@pytest.mark.parametrize("whole", [True, False])
def test_a_merge_of_no_token_is_refused(byte_level: Path, tmp_path: Path, whole: bool) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(byte_level, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].insert(0, ["a", "nothing"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="`nothing` out of vocabulary"):
        load_tokenizer(folder if whole else folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{% if x %}\n{{ messages }", "line 2: unexpected '}'"),
        ("{% nothing %}", "line 1: Encountered unknown tag 'nothing'"),
        (" \n", "it is empty"),
    ],
)
def test_a_file_that_is_no_template_is_refused(
    byte_level: Path, tmp_path: Path, content: str, words: str
) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text(content)
    with pytest.raises(UserError, match=r"bad\.jinja: is not a chat template: ") as refusal:
        load_tokenizer(byte_level, chat_template=str(path))
    assert words in str(refusal.value)


def test_chat_template_options(byte_level: Path, sentence_piece: Path, tmp_path: Path) -> None:
    assert load_tokenizer(byte_level).chat_template
    assert load_tokenizer(byte_level, chat_template="plain").chat_template is None
    with pytest.raises(UserError, match="cannot read the chat template"):
        load_tokenizer(byte_level, chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(UserError, match="needs a Hugging Face tokenizer"):
        load_tokenizer(sentence_piece, chat_template=str(tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    ("name", "value"), [("model_max_length", "x"), ("chat_template", 5), ("chat_template", [1])]
)
def test_settings_of_another_type_are_no_traceback(
    byte_level: Path, tmp_path: Path, name: str, value: object
) -> None:
    path = tmp_path / "changed"
    shutil.copytree(byte_level, path)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, name: value}))
    with contextlib.suppress(UserError):
        tokenizer = load_tokenizer(path, date="2026-01-01")
        ExampleEncoder(tokenizer).encode(Text("a"))
        ExampleEncoder(tokenizer).encode(Dialogue((("user", "a"), ("assistant", "b"))))


def test_a_template_that_is_not_utf_8_is_refused(byte_level: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_bytes(b"{{ '\xe9' }}")
    with pytest.raises(UserError, match="cannot read the chat template: it is not text in UTF-8"):
        load_tokenizer(byte_level, chat_template=str(tmp_path / "t.jinja"))


def test_a_tokenizer_json_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model":' * 100_000)
    with pytest.raises(UserError, match=r"tokenizer\.json: malformed JSON"):
        load_tokenizer(tmp_path)
