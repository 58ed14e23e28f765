"""Benchmark scores of answers that are known, and what lm-eval is asked for."""

from __future__ import annotations

import argparse
import io
import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.model import LM
from rich.console import Console

from megatron_scalebio.commands import evaluate as cli
from megatron_scalebio.errors import UserError
from megatron_scalebio.evaluate import benchmarks
from megatron_scalebio.evaluate.benchmarks import BenchmarkConfig, run_benchmarks
from megatron_scalebio.evaluate.hf_folder import HfModel, open_folder
from megatron_scalebio.evaluate.results import benchmark_table, write_section

# Right answer, response, is its number behind #### the right one, is its last number?
GSM8K = [
    ("#### 1,234", "So it is #### 1234", 1, 1),
    ("#### 7", "The answer is 7.", 0, 1),
    ("#### -5", "5 less than 0.\n#### -5", 1, 1),
    ("#### 12", "#### 13, or rather 12", 0, 1),
    ("#### 40", "#### 40\nand 3 are left", 1, 0),
    ("#### 18", "#### $18.", 0, 1),
    ("#### 21", "22", 0, 0),
]
MATH = [("\\boxed{2}", "It is $\\boxed{2}$.", 1), ("\\boxed{3}", "3", 0),
        ("\\boxed{\\frac{1}{2}}", "\\boxed{\\frac12}", 1)]  # fmt: skip


class Scripted(LM):
    """Answers each problem, told by its number, with the response that stands in the table."""

    max_length = 2048

    def __init__(self, responses: list[str]) -> None:
        super().__init__()
        self.responses, self.asked = responses, []

    def generate_until(self, requests: list[Any], **_: Any) -> list[str]:
        self.asked += [request.args for request in requests]
        return [
            self.responses[int(request.args[0].rpartition("Number ")[2].split(":")[0])]
            for request in requests
        ]

    def loglikelihood(self, requests: list[Any]) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def write(path: Path, problems: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return path


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    gsm8k = [
        {"question": f"Number {k}: how many?", "answer": f"Thus.\n{answer}"}
        for k, (answer, *_) in enumerate(GSM8K)
    ]
    problems = [
        {"problem": f"Number {k}: what?", "solution": f"So ${answer}$."}
        for k, (answer, *_) in enumerate(MATH)
    ]
    return {
        "gsm8k": write(tmp_path / "g.jsonl", gsm8k), "math": write(tmp_path / "m.jsonl", problems)
    }  # fmt: skip


def scored(
    config: BenchmarkConfig, responses: list[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], list[Any]]:
    lm = Scripted(responses)
    monkeypatch.setattr(benchmarks, "_language_model", lambda config, opened: lm)
    opened = HfModel(None, SimpleNamespace(chat_template=None), 2048)
    results, _ = run_benchmarks(config, opened)
    return results, lm.asked


def share_right(right: list[int]) -> dict[str, Any]:
    """The mean of n zeros and ones, and its standard error √(p (1 − p) / (n − 1))."""
    p = sum(right) / len(right)
    error = math.sqrt(p * (1 - p) / (len(right) - 1))
    return {"value": pytest.approx(p), "stderr": pytest.approx(error)}


def test_gsm8k_counts_right_numbers(data: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    responses = [response for _, response, *_ in GSM8K]
    results, asked = scored(BenchmarkConfig(("gsm8k",), data), responses, monkeypatch)
    found = results["gsm8k"]
    assert found["scores"] == {
        "exact_match (strict-match)": share_right([strict for *_, strict, _ in GSM8K]),
        "exact_match (flexible-extract)": share_right([last for *_, last in GSM8K]),
    }
    assert found["problems"] == len(GSM8K) and found["data"] == str(data["gsm8k"])
    for prompt, options in asked:
        assert prompt.count("####") == 1 + 4, "that of the task, and four worked examples"
        assert options["max_gen_toks"] == 512 and options["do_sample"] is False
        assert options["until"] == ["Question:", "</s>", "<|im_end|>"]


def test_math_counts_right_boxes_and_options_reach_lm_eval(
    data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = [response for _, response, _ in MATH]
    results, asked = scored(BenchmarkConfig(("math",), data), responses, monkeypatch)
    assert results["math"]["scores"] == {"exact_match": share_right([r for *_, r in MATH])}
    assert asked[0][1]["max_gen_toks"] == 1024
    config = BenchmarkConfig(("math",), data, limit=2, num_fewshot=3, max_new_tokens=9)
    results, asked = scored(config, responses, monkeypatch)
    assert results["math"]["scores"] == {"exact_match": share_right([1, 0])}
    assert len(asked) == results["math"]["problems"] == 2
    assert results["math"]["num_fewshot"] == 3 and not results["math"]["chat_template"]
    for prompt, options in asked:
        assert prompt.count("\\boxed{") == 1 + 3 and options["max_gen_toks"] == 9
    assert results["math"]["first_prompt"] == asked[0][0]


def test_an_answer_leaves_room_for_the_problem(
    data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = [response for _, response, *_ in GSM8K]
    for length in (2048, 2047):  # of the model's 2048
        config = BenchmarkConfig(("gsm8k",), data, max_new_tokens=length)
        refused = length == 2048
        with pytest.raises(UserError, match="leave no room") if refused else nullcontext():
            scored(config, responses, monkeypatch)


def test_the_language_model_is_the_folder_s(hf_folder: Path) -> None:
    opened = open_folder(hf_folder)._replace(max_length=321)
    lm = benchmarks._language_model(BenchmarkConfig((), batch_size=3), opened)
    assert (lm.batch_size, lm.max_length) == (3, 321)
    assert lm.model is opened.model and lm.tokenizer is opened.tokenizer


def test_options_of_the_command_line_reach_the_benchmarks_and_the_judge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    words = "--tasks math gsm8k math --data gsm8k=a.jsonl --limit 7 --num-fewshot 2 --no-chat"
    words += " --max-new-tokens 33 --batch-size 5 --allow-download"
    words += " --judge-url http://host/v1 --judge-model grader --judge-key-env A_KEY"
    args = parser.parse_args(words.split())
    assert cli._benchmark_config(args) == BenchmarkConfig(
        tasks=("math", "gsm8k"), data={"gsm8k": Path("a.jsonl")}, limit=7, num_fewshot=2,
        chat=False, max_new_tokens=33, batch_size=5, allow_download=True,
    )  # fmt: skip
    monkeypatch.setenv("A_KEY", "x")
    said = io.StringIO()
    client = cli._client(args, Console(file=said))
    assert client is not None
    client.tell("host says [busy]")
    assert said.getvalue() == "warning: host says [busy]\n"
    assert (client.url, client.model, client.key_variable) == ("http://host/v1", "grader", "A_KEY")


def test_the_table_shows_scores_and_how_they_were_asked_for() -> None:
    one = {"value": 0.61239, "stderr": 0.01347}
    results = {
        "gsm8k": {"scores": {"strict": one}, "problems": 1319, "num_fewshot": 3,
                  "chat_template": True},
        "math": {"scores": {"all": {"value": 0.25, "stderr": None}}, "problems": 2,
                 "num_fewshot": 0, "chat_template": False},
    }  # fmt: skip
    screen = io.StringIO()
    Console(file=screen, width=100).print(benchmark_table(results))
    lines = [line.split() for line in screen.getvalue().splitlines()]
    assert ["gsm8k", "strict", "0.6124", "0.0135", "1,319", "3", "chat", "template"] in lines
    assert ["math", "all", "0.2500", "-", "2", "0", "plain"] in lines


def test_a_section_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    for section, content in (("benchmarks", {"a": 1}), ("mt_bench", 2), ("benchmarks", {"b": 3})):
        write_section(tmp_path, section, content)
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found == {"benchmarks": {"b": 3}, "mt_bench": 2}
