"""MT-Bench from question file to scores, with a small model and a judge behind a real socket."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_scalebio.commands import evaluate as cli
from megatron_scalebio.errors import UserError
from megatron_scalebio.evaluate.answers import answer_all
from megatron_scalebio.evaluate.hf_folder import open_folder
from megatron_scalebio.evaluate.judge_prompts import judge_messages, parse_rating
from megatron_scalebio.evaluate.mt_bench import summarize
from megatron_scalebio.evaluate.questions import Question, read_questions
from megatron_scalebio.evaluate.records_log import RecordsLog

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 101, "category": "math", "turns": ["1+1?", "+1?"], "reference": ["2", "3"]},
    {"question_id": 102, "category": "math", "turns": ["2+2?", "+1?"]},
]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def evaluate(hf_folder: Path, output: Path, *words: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    always = ["--hf", hf_folder, "--output", output, "--max-new-tokens", "8"]
    return cli.run(parser.parse_args([str(word) for word in (*always, *words)]))


@pytest.mark.parametrize(
    ("verdict", "rating"),
    [
        ("Fine. Rating: [[7]]", 7),
        ("[[3]] at first, but then: [[ 8.5 ]]", None),
        ("[[7]] See ref [[2]]", None),
        ("Rating: [[7]] See ref [[2]]", 7),
        ("See [[2]]. **Rating:** [[ 8.5 ]]", 8.5),
        ("Rating: [[3]]. No: Rating: [[4]]", None),
        ("Rating: [[3]], so [[3]].\nRating: [[3]]", 3),
        ("Rating: [6]", None),
        ("Per [1] and [2] it is right. Rating: 9", None),
        ("Per [1] it is right. Rating: [[9]]", 9),
        ("Rating: [[11]]", None),
        ("Rating: [[0]]", None),
        ("Rating: 7", None),
        ("", None),
    ],
)
def test_parse_rating(verdict: str, rating: float | None) -> None:
    assert parse_rating(verdict) == rating


def test_what_the_judge_is_shown() -> None:
    question = Question(1, "math", ("first?", "second?"), ("ref one", "ref two"))
    answers = ["answer one", "answer two"]
    first, second = (judge_messages(question, answers, turn)[1]["content"] for turn in (0, 1))
    assert "[[4]]" in first and "first?" in first and "answer one" in first and "ref one" in first
    assert not any(text in first for text in ("second?", "answer two", "ref two"))
    assert all(text in second for text in ("first?", "answer one", "second?", "answer two"))
    assert "LAST answer" in second and "ref two" in second
    assert (
        "eference" not in judge_messages(question._replace(references=()), answers, 1)[1]["content"]
    )


def test_questions(tmp_path: Path) -> None:
    found = read_questions(write(tmp_path / "q.jsonl", QUESTIONS))
    assert found[1] == Question(101, "math", ("1+1?", "+1?"), ("2", "3"))
    assert len(read_questions(tmp_path / "q.jsonl", 2)) == 2
    for message, record in (
        ("q.jsonl:2: question_id is neither a number", {**QUESTIONS[1], "question_id": None}),
        ("category is not text", {**QUESTIONS[1], "category": 3}),
        ("turns is not a list of texts", {**QUESTIONS[1], "turns": "1+1?"}),
        ("turns is empty", {**QUESTIONS[1], "turns": []}),
        ("question_id 81 stands twice", QUESTIONS[0]),
    ):
        with pytest.raises(UserError, match=message):
            read_questions(write(tmp_path / "q.jsonl", [QUESTIONS[0], record]))


def test_mt_bench(
    tmp_path: Path, hf_folder: Path, judge: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write(tmp_path / "q.jsonl", QUESTIONS)
    judge.script = [f"Rating: [[{k}]]" for k in (2, 4)] + ["No idea."] * 3 + ["[[9]]"]
    words = ("--mt-bench", questions, "--judge-url", judge.url, "--judge-model", "grader",
             "--judge-price", "5", "10")  # fmt: skip
    assert evaluate(hf_folder, tmp_path / "out", *words) == 0
    summary = json.loads((tmp_path / "out/evaluation.json").read_text())["mt_bench"]
    assert summary["by_category"]["writing"] == {"mean": 3.0, "stderr": 1.0, "graded": 2}
    assert summary["by_category"]["math"]["graded"] == 3 and summary["without_rating"] == 1
    assert summary["by_turn"]["1"]["mean"] == (2 + 7) / 2
    assert (summary["prompt_tokens"], summary["completion_tokens"]) == (800, 80)
    assert summary["cost"] == pytest.approx(800 * 5e-6 + 80 * 10e-6)
    printed = capsys.readouterr().out
    assert "MT-Bench, judged by grader" in printed and "cost 0.0048" in printed
    lines = [line.split() for line in printed.splitlines()]
    # Of 2 4 9 7 7: squares of differences to 5.8 add up to 30.8, and √(30.8 / 4 / 5) = 1.24.
    assert ["writing", "3.00", "1.00", "2"] in lines and ["all", "5.80", "1.24", "5"] in lines
    assert ["turn", "1", "4.50", "2.50", "2"] in lines and "1 verdicts held no" in printed
    answers = RecordsLog(tmp_path / "out/mt_bench/answers.jsonl").records
    assert [a["question_id"] for a in answers] == [81, 101, 102]
    assert all(len(a["choices"][0]["turns"]) == 2 for a in answers)
    assert {(a["seed"], a["max_new_tokens"]) for a in answers} == {(1234, 8)}
    assert {a["model_id"] for a in answers} == {hf_folder.name}
    asked = judge.requests[1]["messages"][1]["content"]
    assert answers[0]["choices"][0]["turns"][1] in asked and "Again." in asked
    assert "reference" in judge.requests[2]["messages"][1]["content"]
    # All is done: nothing is asked again.
    assert evaluate(hf_folder, tmp_path / "out", *words) == 0
    assert len(judge.requests) == 8


def test_scores_are_means_of_the_judge_s_ratings(tmp_path: Path) -> None:
    """By hand, of (category, turn, rating); standard errors are s / √n, s² divided by n − 1."""
    log = RecordsLog(tmp_path / "judgments.jsonl")
    for number, category, turn, rating, judge in (
        (1, "math", 1, 2.0, "g"), (1, "math", 2, 9.0, "g"), (2, "math", 1, 4.0, "g"),
        (3, "code", 1, 7.0, "g"), (3, "code", 2, None, "g"), (2, "math", 2, 1.0, "other"),
        (4, "code", 1, 1.0, "g"),
    ):  # fmt: skip
        log.append({
            "question_id": number, "category": category, "turn": turn, "score": rating,
            "judge": judge, "prompt_tokens": 1000 + number, "completion_tokens": 10 * turn,
        })  # fmt: skip
    asked = [Question(k, "", ("?", "?"), ()) for k in (1, 2, 3)]
    found = summarize(asked, log, "g", 3.0, 7.0)
    # 2 9 4 7: squares of differences to 5.5 add up to 29; of 2 9 4 to 5 to 26
    assert found["score"] == {"mean": 5.5, "stderr": pytest.approx((29 / 3 / 4) ** 0.5),
                              "graded": 4}  # fmt: skip
    assert found["by_category"] == {
        "code": {"mean": 7.0, "stderr": None, "graded": 1},
        "math": {"mean": 5.0, "stderr": pytest.approx((26 / 2 / 3) ** 0.5), "graded": 3},
    }
    assert list(found["by_category"]) == ["code", "math"]
    # 2 4 7: to 13 / 3 they add up to 38 / 3
    assert found["by_turn"] == {
        "1": {"mean": pytest.approx(13 / 3), "stderr": pytest.approx((19 / 9) ** 0.5), "graded": 3},
        "2": {"mean": 9.0, "stderr": None, "graded": 1},
    }
    tokens = (2 * 1001 + 1002 + 2 * 1003, 10 + 20 + 10 + 10 + 20)
    assert (found["prompt_tokens"], found["completion_tokens"]) == tokens
    assert found["cost"] == pytest.approx((3 * tokens[0] + 7 * tokens[1]) / 1_000_000)
    assert found["without_rating"] == 1 and found["judge"] == "g"
    assert summarize(asked, log, "g", None, None)["cost"] is None


def test_answers_are_sampled_as_their_category_asks(
    tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Temperatures are those of Zheng et al. 2023; every turn sees the ones before it."""
    opened = open_folder(hf_folder)
    calls: list[dict[str, Any]] = []

    def generate(**options: Any) -> torch.Tensor:
        said = opened.tokenizer.decode(options["input_ids"][0])
        calls.append({**options, "said": said, "seed": torch.initial_seed()})
        return torch.cat([options["input_ids"], torch.tensor([[70 + len(calls)]])], dim=1)

    monkeypatch.setattr(opened.model, "generate", generate)
    wanted = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1, "math": 0.0,
              "coding": 0.0}  # fmt: skip
    questions = [Question(k, name, ("One?", "Two?"), ()) for k, name in enumerate(wanted)]
    log = RecordsLog(tmp_path / "answers.jsonl")
    options = {"name": "m", "model": "f", "max_new_tokens": 11}
    answer_all(questions, opened, log, seed=5, **options)
    assert len(calls) == 12
    for number, call in enumerate(calls):
        record = log.records[number // 2]
        temperature = wanted[questions[number // 2].category]
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
        for key, value in (sampling if temperature else {"do_sample": False}).items():
            assert call[key] == value
        assert record["temperature"] == temperature and record["question_id"] == number // 2
        assert call["max_new_tokens"] == 11
        turns = record["choices"][0]["turns"]
        assert turns[number % 2] == opened.tokenizer.decode([71 + number])
        assert call["said"].count("?") == 1 + number % 2
        assert (f"assistant\n{turns[0]}<|im_end|>" in call["said"]) == bool(number % 2)
    seeds = [call["seed"] for call in calls]
    assert len(set(seeds)) == 12
    again = RecordsLog(tmp_path / "again.jsonl")
    answer_all(questions[:1], opened, again, seed=6, **options)
    assert not set(seeds) & {call["seed"] for call in calls[12:]}
    # Where only three tokens are left, three are asked for, and none where none is left.
    first, second = (calls[12 + k]["input_ids"].shape[1] for k in (0, 1))
    del calls[:]
    for room in (first + 3, first):
        small = opened._replace(max_length=room)
        short = RecordsLog(tmp_path / f"{room}.jsonl")
        answer_all(questions[:1], small, short, seed=6, **options)
    assert [call["max_new_tokens"] for call in calls] == [3] and second > first + 3
    assert short.records[0]["choices"][0]["turns"] == ["", ""]


def test_one_task_of_srun_does_the_work(
    tmp_path: Path, hf_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = write(tmp_path / "q.jsonl", QUESTIONS[:1])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert evaluate(hf_folder, tmp_path / "out", "--mt-bench", questions) == 0
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_goes_on(tmp_path: Path, hf_folder: Path, judge: Any) -> None:
    questions = write(tmp_path / "q.jsonl", QUESTIONS)
    out, whole = tmp_path / "out", tmp_path / "whole"
    words = ("--mt-bench", questions, "--judge-url", judge.url, "--judge-model", "grader")
    evaluate(hf_folder, whole, *words)
    evaluate(hf_folder, out, "--mt-bench", questions, "--limit", 1)
    answers, judgments = (out / f"mt_bench/{name}.jsonl" for name in ("answers", "judgments"))
    assert [each["question_id"] for each in RecordsLog(answers).records] == [
        QUESTIONS[0]["question_id"]
    ]
    with open(answers, "a") as file:
        file.write('{"question_id": 101, "cho')  # the power went out here
    judge.requests.clear()
    judge.script = ["Good. Rating: [[7]]"] * 2 + [(400, {}, "stop")]
    with pytest.raises(UserError, match="HTTP 400: stop"):
        evaluate(hf_folder, out, *words)
    assert len(RecordsLog(judgments).records) == 2
    evaluate(hf_folder, out, *words)
    assert len(judge.requests) == 7
    for name in ("mt_bench/answers.jsonl", "mt_bench/judgments.jsonl", "evaluation.json"):
        assert (out / name).read_text() == (whole / name).read_text()
    # Answers of another model or seed are not taken for this one's.
    with pytest.raises(UserError, match=r"answers.jsonl: holds answers of another model"):
        evaluate(hf_folder, out, *words, "--seed", 7)
    answers.write_text("{nonsense\n")
    with pytest.raises(UserError, match=r"answers.jsonl:1: damaged line"):
        evaluate(hf_folder, out, *words)


def test_refusals(tmp_path: Path, hf_folder: Path, judge: Any) -> None:
    questions = write(tmp_path / "q.jsonl", QUESTIONS[:1])
    out = tmp_path / "out"
    for message, folder, words in (
        ("nothing to evaluate", hf_folder, ()),
        ("--judge-model: is missing", hf_folder, ("--judge-url", judge.url)),
        ("--max-new-tokens: 0 is below 1", hf_folder, ("--max-new-tokens", 0)),
        ("gone: no such folder", tmp_path / "gone", ()),
        ("holds no config.json", tmp_path, ()),
    ):
        bench = ("--mt-bench", questions) if "nothing" not in message else ()
        with pytest.raises(UserError, match=message):
            evaluate(folder, out, *bench, *words)
    judge.script = ["Hm."] * 6
    with pytest.raises(UserError, match="no verdict of the judge holds a rating"):
        evaluate(hf_folder, out, "--mt-bench", questions, "--judge-url", judge.url,
                 "--judge-model", "grader")  # fmt: skip
