from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from megatron_scalebio.commands import evaluate as cli
from megatron_scalebio.errors import UserError
from megatron_scalebio.evaluate.benchmarks import BenchmarkConfig, read_problems, run_benchmarks
from megatron_scalebio.evaluate.hf_folder import HfModel, open_folder
from megatron_scalebio.evaluate.math_answers import boxed, score
from tests.smollm2 import smollm2_folder

EVAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval"
GSM8K = [{"question": f"What is {k} + 1?", "answer": f"{k} + 1 = {k + 1}\n#### {k + 1}"}
         for k in range(5)]  # fmt: skip
MATH = [{"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$."}]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_math_answers() -> None:
    solution = "So it is $\\boxed{\\frac{1}{2}}$."
    for response, right in (
        ("$\\boxed{\\frac12}$", 1),
        ("first \\boxed{3}, no: \\boxed{ \\frac{1}{2} }.", 1),
        ("\\boxed{0.5}", 1),
        ("\\boxed{2}", 0),
        ("\\frac{1}{2}", 0),
        ("\\boxed{\\frac{1}{2}", 0),
        ("\\fbox{\\frac{1}{2}}", 0),
        ("", 0),
    ):
        assert score({"solution": solution}, [response]) == {"exact_match": right}, response
    assert boxed("\\boxed{a} and \\boxed{b{c}}") == "b{c}"


def test_every_math_solution_is_its_own_answer() -> None:
    path = EVAL_DATA / "math_test_500.jsonl"
    if not path.is_file():
        pytest.skip("needs ../shared/data/eval")
    problems = read_problems("math", path)
    right = [score(problem, [problem["solution"]])["exact_match"] for problem in problems]
    assert len(right) == 500 and all(right)


def reference(opened: HfModel, prompt: str, tokens: int, stops: list[str]) -> str:
    """Greedy generation by transformers alone, cut at the first stop."""
    inputs = opened.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = opened.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    text = opened.tokenizer.decode(new, skip_special_tokens=True)
    for stop in stops:
        text = text.split(stop)[0]
    return text


def check_generations(folder: Path, gsm8k: Path, limit: int, tokens: int) -> None:
    opened = open_folder(folder)
    config = BenchmarkConfig(("gsm8k",), {"gsm8k": gsm8k}, limit=limit, max_new_tokens=tokens)
    results, samples = run_benchmarks(config, opened)
    found = [entry for entry in samples["gsm8k"] if entry["filter"] == "flexible-extract"]
    assert len(found) == limit == results["gsm8k"]["problems"]
    stops = results["gsm8k"]["generation"]["until"]
    for entry in found:
        assert entry["response"] == reference(opened, entry["prompt"], tokens, stops)
    assert any(entry["response"] for entry in found)


def test_generations_are_those_of_transformers(tmp_path: Path, hf_folder: Path) -> None:
    check_generations(hf_folder, write(tmp_path / "g.jsonl", GSM8K), 3, 12)


@pytest.mark.slow
def test_generations_of_smollm2_are_those_of_transformers(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if not EVAL_DATA.is_dir():
        pytest.skip("needs ../shared/data/eval")
    folder = smollm2_folder(tmp_path_factory.getbasetemp())
    check_generations(folder, EVAL_DATA / "gsm8k_test.jsonl", 3, 16)


def evaluate(*words: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in words]))


def test_command_line(tmp_path: Path, hf_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = (
        f"gsm8k={write(tmp_path / 'g.jsonl', GSM8K)}",
        f"math={write(tmp_path / 'm.jsonl', MATH)}",
    )
    output = tmp_path / "out"
    output.mkdir()
    (output / "evaluation.json").write_text('{"held_out": {"loss": 1.5}}')
    words = ("--hf", hf_folder, "--output", output, "--limit", 2, "--max-new-tokens", 4)
    assert evaluate(*words, "--tasks", "gsm8k", "math", "--data", *data, "--num-fewshot", 1) == 0
    found = json.loads((output / "evaluation.json").read_text())
    assert found["held_out"] == {"loss": 1.5}
    gsm8k, math = found["benchmarks"]["gsm8k"], found["benchmarks"]["math"]
    assert set(gsm8k["scores"]) == {"exact_match (strict-match)", "exact_match (flexible-extract)"}
    assert gsm8k["scores"]["exact_match (strict-match)"] == {"value": 0.0, "stderr": 0.0}
    assert math["scores"] == {"exact_match": {"value": 0.0, "stderr": None}}
    assert (gsm8k["problems"], math["problems"]) == (2, 1)
    assert gsm8k["chat_template"] and gsm8k["generation"]["max_gen_toks"] == 4
    prompt = gsm8k["first_prompt"]
    assert prompt.startswith("<|im_start|>system\nSolve the problem step by step.")
    assert prompt.endswith("Question: What is 0 + 1?\nAnswer:<|im_end|>\n<|im_start|>assistant\n")
    assert prompt.count("Question:") == 2
    lines = (output / "samples_gsm8k.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[0])["target"] == GSM8K[0]["answer"]
    assert "chat template" in capsys.readouterr().out
    assert evaluate(*words, "--tasks", "gsm8k", "--data", data[0], "--no-chat") == 0
    found = json.loads((output / "evaluation.json").read_text())["benchmarks"]["gsm8k"]
    assert found["first_prompt"].startswith("Solve the problem") and not found["chat_template"]
    assert found["num_fewshot"] == 4 and found["first_prompt"].count("####") == 5


def test_refusals(tmp_path: Path, hf_folder: Path) -> None:
    good = write(tmp_path / "g.jsonl", GSM8K)
    bad = write(tmp_path / "bad.jsonl", [GSM8K[0], {"question": "?"}])
    empty = write(tmp_path / "empty.jsonl", [])
    always = ("--hf", hf_folder, "--output", tmp_path / "out", "--tasks")
    for message, words in (
        (r"unknown task 'mmlu'", ("mmlu",)),
        (r"no data for 'gsm8k' .*--allow-download", ("gsm8k",)),
        (r"--data: 'g.jsonl' names no task", ("gsm8k", "--data", "g.jsonl")),
        (r"bad.jsonl:2: no text in field 'answer'", ("gsm8k", "--data", f"gsm8k={bad}")),
        (r"empty.jsonl: holds no problem", ("gsm8k", "--data", f"gsm8k={empty}")),
        (r"gone.jsonl: cannot read", ("gsm8k", "--data", "gsm8k=gone.jsonl")),
        (r"--num-fewshot: is 9", ("gsm8k", "--data", f"gsm8k={good}", "--num-fewshot", 9)),
        (r"--max-new-tokens: answers of 4096",
         ("gsm8k", "--data", f"gsm8k={good}", "--max-new-tokens", 4096)),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            evaluate(*always, *words)
