from __future__ import annotations

import unicodedata

import pytest

from megatron_scalebio.data.examples import Dialogue, Text
from megatron_scalebio.errors import UserError
from megatron_scalebio.sample.contamination import (
    EXACT,
    NGRAM,
    PROMPT,
    EvaluationIndex,
    WordIds,
    any_texts,
    prompt_text,
    whole_text,
    words,
)

QUESTION = "If a train leaves at noon and travels for three hours how far does it go then?"


def dialogue(prompt: str, answer: str) -> Dialogue:
    return Dialogue((("system", "Be kind."), ("user", prompt), ("assistant", answer)))


def kinds(
    evaluation: list[Text | Dialogue], rows: list[Text | Dialogue], ngram: int = 13
) -> list[str | None]:
    ids = WordIds()
    index = EvaluationIndex(ngram, ids.sizes)
    for example in evaluation:
        index.add(*ids.learn(whole_text(example), prompt_text(example)))
    index.close()
    return [index.kind(*ids.of(whole_text(row), prompt_text(row))) for row in rows]


def test_words_and_prompts() -> None:
    assert words("It's 3.14, and_so—on") == ["it", "s", "3", "14", "and", "so", "on"]
    assert words("日本語 is かな") == ["日", "本", "語", "is", "か", "な"]
    assert prompt_text(dialogue("Hi", "you")) == "Hi" and prompt_text(Text("Hi")) == ""
    assert prompt_text(Dialogue((("user", "alone"),))) == ""


def test_a_benchmarks_own_record_has_the_text_of_all_fields_and_a_questions_as_its_prompt() -> None:
    record = {"prompt": "Think.", "id": 7, "question": "2 + 2?", "choices": {"text": ["4", "5"]}}
    assert any_texts(record) == ("Think.\n2 + 2?\n4\n5", "2 + 2?")
    assert any_texts({"turns": ["Who?", "Why?"]}) == ("Who?\nWhy?", "Who?")
    assert any_texts({"text": "Once."}) == ("Once.", "")


def test_kinds_of_contamination() -> None:
    evaluation: list[Text | Dialogue] = [dialogue(QUESTION, "Far."), dialogue("Short one?", "Yes")]
    assert kinds(
        evaluation,
        [
            dialogue(QUESTION.upper(), "far!"),
            dialogue(QUESTION, "I do not know."),
            dialogue("SHORT, one", "No"),
            Text(f"Here it says: {QUESTION} And so on."),
            dialogue("Another question?", "Far."),
            Text("Short"),
            Text(""),
        ],
    ) == [EXACT, PROMPT, PROMPT, NGRAM, None, None, None]


def test_an_ngram_has_thirteen_words_in_a_row() -> None:
    spoken = words(QUESTION)
    for count, expected in ((13, NGRAM), (12, None)):
        row = Text("Other " + " ".join(spoken[1 : 1 + count]) + " words.")
        assert kinds([Text(QUESTION)], [row]) == [expected]
    broken = [*spoken[:10], "unheard", *spoken[10:]]
    assert kinds([Text(QUESTION)], [Text(" ".join(broken))]) == [None]
    assert kinds([Text(QUESTION)], [Text(" ".join(broken))], ngram=5) == [NGRAM]


def test_phrases_of_the_format_convict_nobody() -> None:
    head = "Below is an instruction that describes a task and you should answer it as best you can "
    numbers = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
               "eleven", "twelve"]  # fmt: skip
    evaluation: list[Text | Dialogue] = [
        Text(head + " ".join(f"{word}{k}" for word in numbers + numbers)) for k in range(12)
    ]
    own = " ".join(f"{word}3" for word in [*numbers, "one"])
    rows: list[Text | Dialogue] = [Text(head + "add"), Text(head + "one3 two3 x"), Text(own)]
    assert kinds(evaluation, rows) == [None, None, NGRAM]
    # In one example alone it is the example's own text.
    assert kinds(evaluation[:1], rows[:1]) == [NGRAM]


@pytest.mark.parametrize("text", ["", "?!"])
def test_examples_without_words(text: str) -> None:
    assert kinds([Text(text)], [Text(text), Text("word")]) == [None, None]


OWN = [f"{letter}word" for letter in "abcdefghijklmn"]


def question(number: int, length: int = 14) -> str:
    """Words of one question alone."""
    return " ".join(f"{word}{number}" for word in (OWN * 5)[:length])


@pytest.mark.parametrize("times", [1, 11, 16, 100])
def test_an_example_that_stands_often_is_one_example(times: int) -> None:
    questions = [question(k) for k in range(30)]
    evaluation = [Text(text) for text in questions for _ in range(times)]
    assert kinds(evaluation, [Text(f"Think. {text} So?") for text in questions]) == [NGRAM] * 30
    # As in a file of several answers to each question.
    several = [dialogue(text, f"answer {k}") for text in questions for k in range(times)]
    assert kinds(several, [Text(f"Think. {text} So?") for text in questions]) == [NGRAM] * 30


def test_a_passage_of_many_questions_is_no_phrase() -> None:
    passage = question(999, 40)
    evaluation = [dialogue(f"{passage}\nWhat is {k}?", "x") for k in range(12)]
    evaluation += [dialogue(question(k), "y") for k in range(12)]
    assert kinds(evaluation, [Text(f"It says: {passage}")]) == [NGRAM]


def test_a_set_of_which_most_would_be_ignored_is_refused() -> None:
    phrase = question(999, 20)
    evaluation = [Text(f"{phrase} and {k}") for k in range(12)]
    with pytest.raises(UserError, match=r"--exclude: 12 of 12 examples say little"):
        kinds(evaluation, [])
    index = EvaluationIndex(13)
    ids = WordIds()
    for example in [*evaluation, *(Text(question(k)) for k in range(12))]:  # one half
        index.add(*ids.learn(whole_text(example), ""))
    index.close()
    assert [(ids.spelled(p.ids), p.examples) for p in index.phrases] == [(f"{phrase} and", 12)]


@pytest.mark.parametrize(
    ("ngram", "length", "found"), [(13, 26, None), (13, 27, NGRAM), (5, 10, None), (5, 11, NGRAM)]
)
def test_a_passage_is_longer_than_two_ngrams(ngram: int, length: int, found: str | None) -> None:
    passage = question(999, length)
    evaluation = [Text(f"{passage} {question(k)}") for k in range(12)]
    evaluation += [Text(question(k)) for k in range(100, 112)]
    assert kinds(evaluation, [Text(f"It says: {passage}")], ngram) == [found]


@pytest.mark.parametrize(("holding", "found"), [(4, None), (3, NGRAM)])
def test_a_phrase_of_few_examples_is_in_more_than_half_of_them(
    holding: int, found: str | None
) -> None:
    phrase = question(999, 13)
    evaluation = [Text(f"{phrase} {question(k)}" * (k < holding) or question(k)) for k in range(6)]
    assert kinds(evaluation, [Text(f"It says: {phrase}")]) == [found]


def test_ngrams_right_beside_a_phrase_are_the_examples_own() -> None:
    phrase, others = question(999, 13), [Text(question(k)) for k in range(100, 113)]
    own = [question(k, 13) for k in range(12)]
    for texts in ([f"{phrase} {text}" for text in own], [f"{text} {phrase}" for text in own]):
        evaluation = [*map(Text, texts), *others]
        assert kinds(evaluation, [Text(f"So: {own[3]}")]) == [NGRAM]


def test_the_three_phrases_that_most_examples_hold_are_told() -> None:
    phrases = [question(900 + j, 13) for j in range(4)]
    ids, index = WordIds(), EvaluationIndex(13)
    for n in range(30):
        held = [f"{question(100 * j + n)} {phrase}" if n < 11 + j else ""
                for j, phrase in enumerate(phrases)]  # fmt: skip
        index.add(*ids.learn(" ".join([question(500 + n), *held]), ""))
    index.close()
    told = [(ids.spelled(phrase.ids), phrase.examples) for phrase in index.phrases]
    assert told == [(phrases[3], 14), (phrases[2], 13), (phrases[1], 12)]


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_words_do_not_depend_on_how_letters_are_written(form: str) -> None:
    text = "L'été dernier, Zoé a déjeuné à ½ prix: ﬁn STRASSE straße, Ａ１ na\u00adïve"
    assert words(unicodedata.normalize(form, text)) == words(text)
    assert words("STRASSE") == words("straße") and words("ﬁn Ａ１") == ["fin", "a1"]


def test_marks_do_not_split_words() -> None:
    assert words("निम्नलिखित प्रश्न का उत्तर") == ["निम्नलिखित", "प्रश्न", "का", "उत्तर"]
    assert words("தமிழ் மொழி") == ["தமிழ்", "மொழி"] and words("مُحَمَّد") == ["محمد"]
    assert words("ที่นี่") == ["ที่", "นี่"]
    assert words("می\u200cخواهم") == words("میخواهم")
    assert words("שָׁלוֹם") == words("שלום") and words("سـلام") == words("سلام")
    assert words("one\u200btwo _three_") == ["one", "two", "three"]


REQUEST = "以下の文章を読んで、質問に日本語で詳しく答えてください。"


def test_in_scripts_without_spaces_a_word_is_several_characters() -> None:
    """A request is 13 characters long, and more, without being 13 words."""
    evaluation = [Text(REQUEST + "富士山の高さは何メートルですか。")]
    evaluation += [Text("短い質問です。"), Text("もう一つの短い質問です。")]
    rows = [REQUEST + "琵琶湖の面積はどのくらいですか。", "問。" + evaluation[0].text + "答。"]
    assert kinds(evaluation, [Text(row) for row in rows]) == [None, NGRAM]


@pytest.mark.parametrize(
    ("letters", "needed"), [("汉字", 26), ("かなカナ", 33), ("กขคง", 65), ("abc", 13)]
)
def test_how_many_characters_make_thirteen_words(letters: str, needed: int) -> None:
    joint = " " if letters == "abc" else ""
    own = [chr(ord(letters[0]) + n) for n in range(13)] if letters == "abc" else list(letters)
    text = joint.join((own * 80)[: needed + 20])
    for count, found in ((needed, NGRAM), (needed - 1, None)):
        part = joint.join((own * 80)[7 : 7 + count])
        assert kinds([Text(text)], [Text(f"Q {part} Q")]) == [found]


@pytest.mark.parametrize(("length", "found"), [(7, None), (8, NGRAM), (12, NGRAM)])
def test_of_a_short_example_all_words_convict(length: int, found: str | None) -> None:
    """As many as the least n of Brown et al.; of fewer, a row that says more is no repetition."""
    evaluation = [Text(question(k, length)) for k in range(30)]
    rows = [Text(f"Please solve: {example.text} Thanks") for example in evaluation]
    assert kinds(evaluation, rows) == [found] * 30
    assert kinds(evaluation, [Text(f"So {question(3, length - 1)} it")]) == [None]
    ids = WordIds()
    index = EvaluationIndex(13, ids.sizes)
    for example in [*evaluation, Text("?!")]:
        index.add(*ids.learn(example.text, ""))
    index.close()
    assert (index.short, index.wordless) == (30 * (found is None), 1)


@pytest.mark.parametrize(("holding", "found"), [(20, NGRAM), (21, None)])
def test_what_more_than_half_of_the_examples_share_is_no_passage(
    holding: int, found: str | None
) -> None:
    shared = question(999, 35)
    evaluation = [Text(f"{shared} {question(k)}" * (k < holding) or question(k)) for k in range(40)]
    rows = [Text(f"{shared} and add"), Text(f"So: {question(5)} it")]
    assert kinds(evaluation, rows) == [found, NGRAM]
