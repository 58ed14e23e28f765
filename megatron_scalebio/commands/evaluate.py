"""The subcommand ``evaluate``: held-out losses, benchmarks and MT-Bench, into one results file.

--config / --test NAME=PATH   losses under Megatron's parallelism, of a checkpoint or HF folder
--tasks                       lm-eval on a Hugging Face folder
--mt-bench                    answers of a Hugging Face folder, graded by a judge
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_scalebio import config_loader, launcher
from megatron_scalebio.checkpoint.folder import find_checkpoint
from megatron_scalebio.commands.early import refuse_missing_sets
from megatron_scalebio.compat import light_imports
from megatron_scalebio.config import Config
from megatron_scalebio.config.checks import by_name, require_at_least
from megatron_scalebio.data.scan import prepared_length
from megatron_scalebio.errors import EXIT_OK, UserError, not_a_folder
from megatron_scalebio.evaluate.answers import answer_all
from megatron_scalebio.evaluate.benchmarks import (
    TASKS,
    BenchmarkConfig,
    require_lm_eval,
    run_benchmarks,
)
from megatron_scalebio.evaluate.chat_client import ChatClient
from megatron_scalebio.evaluate.hf_folder import (
    HfModel,
    check_folder,
    fingerprint,
    open_folder,
    use_network,
)
from megatron_scalebio.evaluate.mt_bench import judge_all, summarize
from megatron_scalebio.evaluate.questions import Question, read_questions
from megatron_scalebio.evaluate.records_log import RecordsLog
from megatron_scalebio.evaluate.results import (
    RESULTS_FILE,
    benchmark_table,
    judge_table,
    write_lines,
    write_section,
)
from megatron_scalebio.logs.console import RunConsole

USUAL = (
    "--config", "--test", "--hf", "--seq-length", "--output", "--tasks", "--data", "--limit",
    "--mt-bench", "--judge-url",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``evaluate`` to those of a run's configuration."""
    config_loader.add_arguments(parser)
    add = parser.add_argument
    add("--limit", type=int, metavar="N", help="only the first N problems or questions")
    add("--max-new-tokens", type=int, metavar="N", help="length of an answer at most (default: "
        "512 for gsm8k, 1024 for math and MT-Bench)")  # fmt: skip
    tasks = parser.add_argument_group("benchmarks, by lm-eval")
    tasks.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help=", ".join(TASKS))
    tasks.add_argument("--data", nargs="+", default=[], metavar="TASK=FILE", help="JSON or JSONL "
        "with question and answer (gsm8k), problem and solution (math)")  # fmt: skip
    tasks.add_argument("--num-fewshot", type=int, default=4, metavar="0-4", help="solved examples "
        "in the prompt [4]")  # fmt: skip
    tasks.add_argument("--chat", action=argparse.BooleanOptionalAction, help="prompt in the chat "
        "template (default: where the tokenizer has one)")  # fmt: skip
    tasks.add_argument("--batch-size", type=int, default=1, metavar="N", help="prompts that are "
        "answered at a time [1]")  # fmt: skip
    tasks.add_argument("--allow-download", action="store_true", help="fetch data from the hub")
    bench = parser.add_argument_group("MT-Bench, by an OpenAI-compatible judge")
    bench.add_argument("--mt-bench", metavar="FILE", help="question.jsonl in FastChat's format")
    bench.add_argument("--judge-url", metavar="URL", help="as in https://host/v1; without it the "
        "answers are only generated")  # fmt: skip
    bench.add_argument("--judge-model", metavar="NAME", help="the judge's model, by the name that "
        "its server knows")  # fmt: skip
    bench.add_argument("--judge-key-env", default="", metavar="VARIABLE", help="environment "
        "variable that holds the API key")  # fmt: skip
    bench.add_argument("--judge-price", nargs=2, type=float, metavar=("IN", "OUT"), help="price of "
        "a million input and output tokens, to print the cost")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the evaluations that the arguments name; returns an exit code.

    Raises:
        UserError: an option, a file, the model or the judge is at fault.
    """
    given = vars(args)  # a configuration's flags are under "section.field"
    holds_out = args.config or given.keys() & {"data.validation", "data.test"}
    if not args.tasks and not args.mt_bench and not holds_out:
        raise UserError(
            "evaluate: nothing to evaluate (--config run.yaml, --test NAME=PATH, --tasks gsm8k, or "
            "--mt-bench FILE)"
        )
    config = _run_config(args) if holds_out else None
    hf = given.get("model.hf") or (config.model.hf if config else None)
    output = given.get("train.output") or (config.train.output if config else None)
    if output is None:
        raise UserError("--output: is missing (name a folder for the results)")
    if Path(output).is_file():
        raise not_a_folder(Path(output))
    if config is not None:
        _held_out(config, Path(output))
    if (args.tasks or args.mt_bench) and launcher.is_first_rank():
        _on_hf_folder(args, hf, Path(output))
    return EXIT_OK


def _run_config(args: argparse.Namespace) -> Config:
    """The configuration of the held-out losses, of what is there.

    Where no seq_length is given, it is the one that the sets were prepared with.
    """
    _take_model_of_run(args)
    config = config_loader.config_from_args(args, _refuse_wrong_paths)
    sets = [*config.data.validation, *config.data.test]
    if not sets:
        raise UserError("data.test: names no set (--test NAME=PATH ...)")
    if not (config.checkpoint.load or config.model.hf or config.model.pretrained_checkpoint):
        raise UserError("checkpoint.load: no model (--load CHECKPOINT or --hf DIR)")
    in_file = config_loader.read_yaml(args.config, config_loader.SECTIONS) if args.config else {}
    if "data.seq_length" not in vars(args) and "seq_length" not in (in_file.get("data") or {}):
        lengths = [prepared_length(entry.path) for entry in sets]
        config.data.seq_length = max(filter(None, lengths), default=config.data.seq_length)
    config.validate_layout(launcher.world_size_from_environment())
    return config


def _take_model_of_run(args: argparse.Namespace) -> None:
    """The model section of the run that a checkpoint lies in, where nothing else tells of one."""
    given = vars(args)
    load = given.get("checkpoint.load")
    if args.config or load is None or any(name.startswith("model.") for name in given):
        return
    for folder in (Path(load), *Path(load).absolute().parents[:2]):
        if (folder / "config.yaml").is_file():
            told = config_loader.read_yaml(str(folder / "config.yaml"), config_loader.SECTIONS)
            given.update({f"model.{name}": value for name, value in told["model"].items()})
            return


@launcher.refuses_early
def _refuse_wrong_paths(config: Config) -> None:
    refuse_missing_sets(config)
    if config.checkpoint.load:
        find_checkpoint(Path(config.checkpoint.load))


def _held_out(config: Config, output: Path) -> None:
    with light_imports():
        from megatron_scalebio.evaluate.held_out import evaluate_config  # takes seconds

    losses = [loss.as_dict() for loss in evaluate_config(config)]
    if launcher.is_first_rank():
        write_section(output, "held_out", {"sets": losses})
        console = RunConsole([], 0)
        console.losses(losses)
        console.places({"losses": output / RESULTS_FILE})


def _on_hf_folder(args: argparse.Namespace, hf: str | None, output: Path) -> None:
    if not hf:
        raise UserError("--hf: is missing (give the model's Hugging Face folder)")
    require_at_least("--limit", args.limit, 1)
    require_at_least("--max-new-tokens", args.max_new_tokens, 1)
    folder = Path(hf)
    benchmarks = _benchmark_config(args) if args.tasks else None
    questions = read_questions(Path(args.mt_bench), args.limit) if args.mt_bench else []
    console = Console(highlight=False)
    client = _client(args, console) if args.mt_bench else None
    check_folder(folder)
    use_network(args.allow_download)
    opened = open_folder(folder)
    if benchmarks is not None:
        _benchmarks(benchmarks, opened, output, console)
    if questions:
        _mt_bench(args, folder, questions, client, opened, output, console)
    if benchmarks is not None or client is not None:
        console.print(f"written to {output / RESULTS_FILE}", markup=False, soft_wrap=True)


def _benchmark_config(args: argparse.Namespace) -> BenchmarkConfig:
    require_lm_eval()
    data = {}
    for value in args.data:
        task, separator, path = value.partition("=")
        if not separator:
            raise UserError(f"--data: {value!r} names no task (--data gsm8k=FILE)")
        data[task] = Path(path)
    return BenchmarkConfig(
        tasks=tuple(dict.fromkeys(args.tasks)),
        data=data,
        **by_name(
            args, "limit", "num_fewshot", "chat", "max_new_tokens", "batch_size", "allow_download"
        ),
    )


def _client(args: argparse.Namespace, console: Console) -> ChatClient | None:
    if not args.judge_url and not args.judge_model:
        return None
    for flag, value in (("--judge-url", args.judge_url), ("--judge-model", args.judge_model)):
        if not value:
            raise UserError(f"{flag}: is missing (a judge needs its URL and its model)")

    def warn(line: str) -> None:
        console.print(f"warning: {line}", markup=False, soft_wrap=True)

    return ChatClient(args.judge_url, args.judge_model, args.judge_key_env, tell=warn)


def _benchmarks(config: BenchmarkConfig, opened: HfModel, output: Path, console: Console) -> None:
    results, samples = run_benchmarks(config, opened)
    for task, records in samples.items():
        write_lines(output / f"samples_{task}.jsonl", records)
    write_section(output, "benchmarks", results)
    console.print(benchmark_table(results))


def _mt_bench(
    args: argparse.Namespace,
    folder: Path,
    questions: list[Question],
    client: ChatClient | None,
    opened: HfModel,
    output: Path,
    console: Console,
) -> None:
    answers = RecordsLog(output / "mt_bench" / "answers.jsonl")
    with _bar("answering", [q.id for q in questions], [r["question_id"] for r in answers.records]) \
            as advance:  # fmt: skip
        answer_all(
            questions,
            opened,
            answers,
            name=folder.resolve().name,
            model=fingerprint(folder),
            max_new_tokens=args.max_new_tokens or 1024,
            seed=vars(args).get("train.seed", 1234),
            on_done=lambda question: advance(),
        )
    if client is None:
        said = f"answers in {answers.path}; --judge-url grades them"
        console.print(said, markup=False, soft_wrap=True)
        return
    judgments = RecordsLog(output / "mt_bench" / "judgments.jsonl")
    wanted = [(q.id, turn + 1, client.model) for q in questions for turn in range(len(q.turns))]
    done = [(r["question_id"], r["turn"], r["judge"]) for r in judgments.records]
    with _bar("judging", wanted, done) as advance:
        judge_all(questions, answers, judgments, client, lambda record: advance())
    summary = summarize(questions, judgments, client.model, *(args.judge_price or (None, None)))
    write_section(output, "mt_bench", summary)
    console.print(judge_table(summary))
    cost = "" if summary["cost"] is None else f", cost {summary['cost']:.4f}"
    console.print(
        f"the judge read {summary['prompt_tokens']:,} tokens and wrote "
        f"{summary['completion_tokens']:,}{cost}; "
        f"{summary['without_rating']} verdicts held no rating",
        soft_wrap=True,
    )


@contextmanager
def _bar(what: str, wanted: Sequence[object], done: Sequence[object]) -> Iterator:
    """A progress bar over the pieces of work; yields what advances it by one."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        finished = len(set(wanted) & set(done))
        task = bar.add_task(what, total=len(wanted), completed=finished)
        yield lambda: bar.advance(task)
