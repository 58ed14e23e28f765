"""GSM8K and MATH through EleutherAI's lm-eval, on a Hugging Face folder.

The task files are those in ``tasks/``; the problems come from a local JSONL file, or from the hub
where the user allows it.
"""

import importlib.util
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_scalebio.data.records import RecordReader
from megatron_scalebio.errors import UserError
from megatron_scalebio.evaluate.hf_folder import HfModel

TASKS = {"gsm8k": ("question", "answer"), "math": ("problem", "solution")}
_TASK_FILES = Path(__file__).parent / "tasks"
_METRIC = "exact_match"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to run.

    Attributes:
        tasks: names in ``TASKS``.
        data: a JSON or JSONL file for each task; those without one come from the hub.
        limit: the first problems of each, or None for all.
        num_fewshot: worked examples in the prompt, at most the four of the task files.
        chat: puts the prompt into the tokenizer's chat template; None: where it has one.
        max_new_tokens: of an answer; None for the task file's own.
        batch_size: problems generated at once. Padding can change a token where two are as likely.
    """

    tasks: tuple[str, ...]
    data: dict[str, Path] = field(default_factory=dict)
    limit: int | None = None
    num_fewshot: int = 4
    chat: bool | None = None
    max_new_tokens: int | None = None
    batch_size: int = 1
    allow_download: bool = False

    def __post_init__(self) -> None:
        for name in (*self.tasks, *self.data):
            if name not in TASKS:
                raise UserError(f"--tasks: unknown task {name!r} ({', '.join(TASKS)})")
        for name in self.tasks:
            if name not in self.data and not self.allow_download:
                raise UserError(
                    f"--data: no data for {name!r} (--data {name}=FILE.jsonl, or --allow-download)"
                )
        for flag, value, least, most in (
            ("--limit", self.limit, 1, math.inf),
            ("--num-fewshot", self.num_fewshot, 0, 4),
            ("--max-new-tokens", self.max_new_tokens, 1, math.inf),
            ("--batch-size", self.batch_size, 1, math.inf),
        ):
            if value is not None and not least <= value <= most:
                raise UserError(f"{flag}: is {value} ({least} to {most})")


def read_problems(task: str, path: Path) -> list[dict[str, str]]:
    """A task's problems with the two fields that it needs.

    Raises:
        UserError: the file cannot be read, is empty, or a field is missing.
    """
    problems = []
    for line, record in RecordReader(path):
        for name in TASKS[task]:
            if not isinstance(record.get(name), str):
                raise UserError(
                    f"{path}:{line}: no text in field {name!r} ({task} needs "
                    f"{' and '.join(TASKS[task])})"
                )
        problems.append({name: record[name] for name in TASKS[task]})
    if not problems:
        raise UserError(f"{path}: holds no problem")
    return problems


def require_lm_eval() -> None:
    for package in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--tasks: {package} is not installed (pip install 'megatron-scalebio[evaluate]')"
            )


def run_benchmarks(
    config: BenchmarkConfig, opened: HfModel
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Runs the tasks.

    Returns:
        For each task its scores with standard errors and how it was prompted; and its samples:
        prompt, response and what each filter made of it.

    Raises:
        UserError: data or options are at fault.
    """
    problems = {name: read_problems(name, config.data[name]) for name in config.tasks
                if name in config.data}  # fmt: skip
    chat = config.chat
    if chat is None:
        chat = opened.tokenizer.chat_template is not None
    elif chat and opened.tokenizer.chat_template is None:
        raise UserError("--chat: the tokenizer has no chat template (drop it)")
    results, samples = {}, {}
    lm = _language_model(config, opened)
    for name in config.tasks:
        started = time.monotonic()
        found = _run(lm, name, config, problems.get(name), chat)
        task = f"scalebio_{name}"
        samples[name] = [_sample(entry) for entry in found["samples"][task]]
        results[name] = {
            "scores": _scores(found["results"][task]),
            "problems": len({entry["doc_id"] for entry in samples[name]}),
            "num_fewshot": config.num_fewshot,
            "chat_template": chat,
            "generation": found["configs"][task]["generation_kwargs"],
            "first_prompt": samples[name][0]["prompt"],
            "data": str(config.data.get(name) or found["configs"][task]["dataset_path"]),
            "seconds": round(time.monotonic() - started, 1),
            "versions": {p: version(p) for p in ("lm_eval", "transformers", "torch")},
        }
    return results, samples


def _language_model(config: BenchmarkConfig, opened: HfModel) -> Any:
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(
        pretrained=opened.model,
        tokenizer=opened.tokenizer,
        backend="causal",
        max_length=opened.max_length,
        batch_size=config.batch_size,
    )


def _run(
    lm: Any,
    name: str,
    config: BenchmarkConfig,
    problems: Sequence[dict[str, str]] | None,
    chat: bool,
) -> dict[str, Any]:
    """What lm-eval's ``evaluate`` returns for one task."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks._yaml_loader import load_yaml  # what lm-eval opens its task files with

    settings = load_yaml(_TASK_FILES / f"{name}.yaml")
    if problems is not None:
        rows = Dataset.from_list(list(problems))
        settings["custom_dataset"] = lambda **_: {"test": rows}
    if config.max_new_tokens is not None:
        settings["generation_kwargs"]["max_gen_toks"] = config.max_new_tokens
    asked = settings["generation_kwargs"]["max_gen_toks"]
    if asked >= lm.max_length:
        raise UserError(
            f"--max-new-tokens: answers of {asked} tokens leave no room for the problem: the model "
            f"holds {lm.max_length} (lower it)"
        )
    settings["num_fewshot"] = config.num_fewshot
    try:
        task = ConfigurableTask(config=settings)
    except OSError as error:  # also what datasets raises where the hub has no answer
        raise UserError(
            f"{settings['dataset_path']}: cannot fetch the data: {error} (--data {name}=FILE.jsonl)"
        ) from None
    return evaluate(
        lm=lm,
        task_dict={"tasks": {settings["task"]: task}, "groups": {}, "group_map": {}},
        limit=config.limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )


def _scores(found: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Each metric's value and standard error; lm-eval has ``metric,filter`` for its name."""
    scores = {}
    for key, value in found.items():
        metric, _, filter_name = key.partition(",")
        if metric == _METRIC:
            error = found.get(f"{metric}_stderr,{filter_name}")
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            known = isinstance(error, float) and math.isfinite(error)
            scores[name] = {"value": float(value), "stderr": error if known else None}
    return scores


def _sample(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "doc_id": entry["doc_id"],
        "filter": entry["filter"],
        "prompt": entry["arguments"][0][0],
        "response": entry["resps"][0][0],
        "filtered": entry["filtered_resps"][0],
        "target": entry["target"],
        _METRIC: entry[_METRIC],
    }
