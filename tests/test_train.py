"""`train`: the same under every layout, resumed or not, and its held-out losses are right."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.commands import command, metrics, note, noted, the_only_line, write_config
from tests.distributed.harness import run_distributed
from tests.markov import write_problem

pytestmark = pytest.mark.distributed
STEPS = 9
GATHER = ["--overlap-grad-reduce", "--use-distributed-optimizer", "--overlap-param-gather"]
FLAGS: dict[str, tuple[int, list]] = {
    "one": (1, []),
    "one-lisa": (
        1, ["--lisa-layers", 1, "--lisa-interval", 4, "--save-interval", 1, "--keep-last", STEPS],
    ),
    "tp2": (2, ["--tensor-model-parallel-size", 2]),
    "dp2-distributed-optimizer": (2, ["--use-distributed-optimizer"]),
    "dp2-overlap": (2, ["--overlap-grad-reduce", "--lisa-interval", 4]),
    "dp2-overlap-gather": (
        2, [*GATHER, "--lisa-layers", 1, "--lisa-interval", 4, "--save-interval", 3,
            "--keep-last", 4],
    ),
    "cp2": (2, ["--context-parallel-size", 2]),
    "vpp": (
        2,
        [
            "--num-layers", 4, "--pipeline-model-parallel-size", 2,
            "--num-layers-per-virtual-pipeline-stage", 1, "--loss-mean", "token",
        ],
    ),
    "vpp-packed": (
        2,
        [
            "--num-layers", 4, "--pipeline-model-parallel-size", 2, "--packing",
            "--num-layers-per-virtual-pipeline-stage", 1, "--loss-mean", "token",
        ],
    ),
    "dp2-packed": (2, ["--packing"]),
    "one-deeper": (1, ["--num-layers", 4, "--loss-mean", "token"]),
}  # fmt: skip
NAIVE = {"one": "sample", "one-deeper": "token"}
SAME = [
    ("one", "tp2"),
    ("one", "dp2-distributed-optimizer"),
    ("one", "dp2-overlap"),
    ("one-lisa", "dp2-overlap-gather"),
    ("one", "cp2"),
    ("one-deeper", "vpp"),
    ("one-deeper", "vpp-packed"),
    ("one", "dp2-packed"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    sources, [first] = write_problem(
        folder / "data", [0.6, 0.4], 0, length=17, examples=50, validation=37, even=False
    )
    others = [
        write_problem(folder / name, truth, 0, length=17, examples=1, validation=size, even=False)
        for name, truth, size in (("more", [0.1, 0.9], 29), ("test", [0.6, 0.4], 23))
    ]
    (_, [second]), (_, test) = others
    validation = [{**first, "weight": 3.0}, {**second, "name": "second", "weight": 1.0}]
    learned = {"sources": [{**s, "weight": w} for s, w in zip(sources, (0.7, 0.3), strict=True)]}
    (folder / "weights.json").write_text(json.dumps(learned))
    learned["sources"][0]["name"] = "other"
    (folder / "others.json").write_text(json.dumps(learned))
    write_config(
        folder / "x.yaml", sources, validation,
        data={"test": [{"name": "test", "path": test[0]["path"]}],
              "weights": str(folder / "weights.json")},
        train={"train_iters": STEPS, "eval_interval": 2, "eval_examples": 20},
        model={"init_method_std": 0.1}, optimizer={"lr": 3e-3, "adam_eps": 1e-5},
        checkpoint={"save_interval": 4},
    )  # fmt: skip
    for ranks in (1, 2):
        run_distributed(on_ranks, ranks, str(folder))
    return folder


def on_ranks(folder_name: str) -> None:
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    for name, (ranks, flags) in FLAGS.items():
        if ranks == dist.get_world_size():
            run(folder, name, flags)
    if dist.get_world_size() == 2:
        words = ["--load", folder / "one" / "checkpoints", "--context-parallel-size", 2]
        outcome = command(
            "evaluate", "--config", folder / "x.yaml", "--output", folder / "evaluated", *words
        )
        note(folder / "noted", "evaluated", outcome)
        if dist.get_rank() == 0:  # saved where no evaluation had gathered the weights before
            saved = folder / "dp2-overlap-gather" / "checkpoints" / "iter_0000003"
            shutil.copytree(saved, folder / "from-gather" / saved.name)
        dist.barrier()
        words = [*FLAGS["dp2-overlap-gather"][1], "--load", folder / "from-gather"]
        run(folder, "resumed-gather", words)
        for name in ("one-lisa", "dp2-overlap-gather"):
            load = folder / name / "checkpoints" / "iter_0000003"
            words = [
                "--config",
                folder / "x.yaml",
                "--output",
                folder / f"{name}-3",
                "--load",
                load,
            ]
            note(folder / "noted", f"{name}-3", command("evaluate", *words))
    if dist.get_world_size() == 1:
        part = folder / "from"
        shutil.copytree(folder / "one-lisa" / "checkpoints" / "iter_0000008", part / "iter_0000008")
        run(folder, "resumed", [*FLAGS["one-lisa"][1], "--load", part])
        run(folder, "of-others", ["--weights", folder / "others.json"])
        outcome = command(
            "reweight", "--config", folder / "x.yaml", "--output", folder / "reweighted",
            "--load", part,
        )  # fmt: skip
        note(folder / "noted", "reweight-from-train", outcome)
        for name in NAIVE:
            naive_losses(folder, name)


def run(folder: Path, name: str, flags: list) -> None:
    words = ["train", "--config", folder / "x.yaml", "--output", folder / name, *flags]
    note(folder / "noted", name, command(*words))


def naive_losses(folder: Path, name: str) -> None:
    """Losses of the held-out examples one by one, at a run's last checkpoint; and its own of them.

    Its own under dropout, which is for training alone.
    """
    from megatron_scalebio import runtime
    from megatron_scalebio.checkpoint import saver
    from megatron_scalebio.config_loader import load_config
    from megatron_scalebio.methods.finetune import FinetuneState

    change = {"model": {"hidden_dropout": 0.4, "attention_dropout": 0.4}}
    config = load_config(str(folder / name / "config.yaml"), change)
    runtime.start(config)
    state = FinetuneState(config, folder / "cache")
    saver.load_pretrained(state.training.w, folder / name / "checkpoints", state.data.vocab_size)
    [model] = state.training.w
    model.train()
    own = [loss.as_dict() for loss in state.held_out(test=True)]
    assert model.training and not model.eval().training
    state.held_out()
    assert not model.training
    result = {}
    for source in (*state.data.validation, *state.data.test):
        result[source.name] = []
        for index in range(len(source)):
            tokens, targets = (torch.from_numpy(x.astype("int64")) for x in source.example(index))
            with torch.no_grad():
                logits = model(tokens[None, :-1], torch.arange(len(tokens) - 1)[None], None)[0]
            losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            result[source.name].append(losses[targets[1:] > 0].tolist())
    (folder / f"naive-{name}.json").write_text(json.dumps({"losses": result, "own": own}))
    runtime.stop_model_parallel()


def sample_mean(losses: list[list[float]]) -> float:
    return sum(sum(each) / len(each) for each in losses) / len(losses)


def token_mean(losses: list[list[float]]) -> float:
    return sum(map(sum, losses)) / sum(map(len, losses))


@pytest.mark.parametrize("name", FLAGS)
def test_ends_well_and_learns(runs: Path, name: str) -> None:
    code, said = noted(runs / "noted", name)
    assert code == 0, said
    records = metrics(runs / name)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    evaluated = [r["step"] for r in records if "validation_loss" in r]
    assert evaluated == [2, 4, 6, 8, 9]
    assert records[-1]["validation_loss"] < records[1]["validation_loss"]
    best = min(r["validation_loss"] for r in records if "validation_loss" in r)
    content = json.loads((runs / name / "evaluation.json").read_text())
    assert content["best_validation_loss"] == best
    assert [entry["examples"] for entry in content["sets"]] == [37, 29, 23]
    [kept] = (runs / name / "best").glob("iter_*")
    step = int(kept.name.removeprefix("iter_"))
    assert best == next(r["validation_loss"] for r in records if r["step"] == step)


@pytest.mark.parametrize(("one", "other"), SAME)
def test_does_not_depend_on_the_layout(runs: Path, one: str, other: str) -> None:
    for a, b in zip(metrics(runs / one), metrics(runs / other), strict=True):
        for field in {"train_loss_w", "validation_loss", "grad_norm_w"} & a.keys():
            assert b[field] == pytest.approx(a[field], rel=1e-4), (a["step"], field)
    told = [json.loads((runs / name / "run.json").read_text()) for name in (one, other)]
    assert told[0]["parameters"] == told[1]["parameters"]
    sets = [json.loads((runs / n / "evaluation.json").read_text())["sets"] for n in (one, other)]
    for ours, theirs in zip(*sets, strict=True):
        assert ours["target_tokens"] == theirs["target_tokens"]
        assert ours["token_mean"] == pytest.approx(theirs["token_mean"], rel=1e-4)


def test_resumed_equals_never_stopping(runs: Path) -> None:
    code, said = noted(runs / "noted", "resumed")
    assert code == 0 and "from step 8" in said, said
    assert metrics(runs / "resumed") == metrics(runs / "one-lisa")[8:]


def test_a_checkpoint_waits_for_overlapped_gathering(runs: Path) -> None:
    code, said = noted(runs / "noted", "resumed-gather")
    assert code == 0 and "from step 3" in said, said
    assert metrics(runs / "resumed-gather") == metrics(runs / "dp2-overlap-gather")[3:]
    want, got = (
        json.loads((runs / f"{name}-3" / "evaluation.json").read_text())["held_out"]["sets"]
        for name in ("one-lisa", "dp2-overlap-gather")
    )
    for ours, theirs in zip(got, want, strict=True):
        assert ours["sample_mean"] == pytest.approx(theirs["sample_mean"], rel=1e-5)


@pytest.mark.parametrize(("name", "mean"), NAIVE.items())
def test_held_out_losses_equal_a_naive_evaluation(runs: Path, name: str, mean: str) -> None:
    naive = json.loads((runs / f"naive-{name}.json").read_text())
    losses: dict[str, list[list[float]]] = naive["losses"]
    content = json.loads((runs / name / "evaluation.json").read_text())
    want = [
        {
            "name": each,
            "sample_mean": pytest.approx(sample_mean(losses[each]), rel=1e-5),
            "token_mean": pytest.approx(token_mean(losses[each]), rel=1e-5),
            "perplexity": pytest.approx(math.exp(token_mean(losses[each])), rel=1e-4),
            "examples": len(losses[each]),
            "target_tokens": sum(map(len, losses[each])),
        }
        for each in ("validation", "second", "test")
    ]
    assert content["sets"] == want and naive["own"] == want
    last = metrics(runs / name)[-1]
    of = {"sample": sample_mean, "token": token_mean}[mean]
    first, second = (of(losses[each][:20]) for each in ("validation", "second"))
    assert last["validation_losses"] == pytest.approx([first, second], rel=1e-5)
    assert last["validation_loss"] == pytest.approx((3 * first + second) / 4, rel=1e-5)
    for each in losses.values():
        assert abs(sample_mean(each) / token_mean(each) - 1) > 1e-4, "the means can be told apart"
    assert abs(first - second) > 0.001


def test_the_training_loss_is_the_mixture_s(runs: Path) -> None:
    for record in metrics(runs / "one"):
        first, second = record["loss_w"]
        assert record["train_loss_w"] == pytest.approx(0.7 * first + 0.3 * second)


def test_held_out_losses_do_not_depend_on_how_sequences_are_shared(runs: Path) -> None:
    """A checkpoint of one rank, evaluated by two that hold half of each sequence."""
    code, said = noted(runs / "noted", "evaluated")
    assert code == 0, said
    want = json.loads((runs / "one" / "evaluation.json").read_text())["sets"]
    got = json.loads((runs / "evaluated" / "evaluation.json").read_text())["held_out"]["sets"]
    assert len(got) == len(want) == 3
    for entry in want:
        numbers = (entry[k] for k in ("examples", "sample_mean", "token_mean", "perplexity"))
        shown = [
            form(n)
            for form, n in zip(
                (str, "{:.4f}".format, "{:.4f}".format, "{:.5g}".format), numbers, strict=True
            )
        ]
        assert [entry["name"], *shown] in [line.split() for line in said.splitlines()]
    assert noted(runs / "noted", "evaluated", rank=1) == (0, ""), "the first rank speaks for all"
    for ours, whole in zip(got, want, strict=True):
        assert ours.pop("name") == whole.pop("name")
        assert ours == pytest.approx(whole, rel=1e-6)


def test_mistakes_cost_one_line(runs: Path) -> None:
    code, said = noted(runs / "noted", "of-others")
    assert code == 2 and "others.json" in the_only_line(said)
    code, said = noted(runs / "noted", "reweight-from-train")
    assert code == 2 and "was saved by `train`" in the_only_line(said)
