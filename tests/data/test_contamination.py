from __future__ import annotations

import pytest

from megatron_scalebio.data.examples import Dialogue, Text
from megatron_scalebio.sample.contamination import (
    EXACT,
    NGRAM,
    PROMPT,
    EvaluationIndex,
    WordIds,
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
    ids, index = WordIds(), EvaluationIndex(ngram)
    for example in evaluation:
        index.add(*ids.learn(whole_text(example), prompt_text(example)))
    index.close()
    return [index.kind(*ids.of(whole_text(row), prompt_text(row))) for row in rows]


def test_words_and_prompts() -> None:
    assert words("It's 3.14, and_so—on") == ["it", "s", "3", "14", "and_so", "on"]
    assert words("日本語 is かな") == ["日", "本", "語", "is", "か", "な"]
    assert prompt_text(dialogue("Hi", "you")) == "Hi" and prompt_text(Text("Hi")) == ""
    assert prompt_text(Dialogue((("user", "alone"),))) == ""


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
