"""Resume equals never stopping: after kill -9, under LISA, in bf16, and under another layout."""

from __future__ import annotations

import html
import json
import random
import shlex
import shutil
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.commands import (
    command,
    metrics,
    note,
    noted,
    the_only_line,
    write_config,
)
from tests.distributed.harness import run_distributed, started
from tests.markov import write_problem

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS, SAVED, KEPT = 12, 3, 2
TP2, PP2 = ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]
CP2 = ["--context-parallel-size", 2]
LISA = ["--lisa-layers", 1, "--lisa-interval", 4]
BF16 = ["--bf16", "--use-distributed-optimizer"]
DROPOUT = ["--hidden-dropout", 0.1, "--attention-dropout", 0.1]

# Killed while they run, and started again with the same words: name: (ranks, flags)
KILLED: dict[str, tuple[int, list]] = {
    "plain": (1, DROPOUT),
    "lisa": (1, LISA),
    "pp2-lisa-async": (2, [*PP2, *LISA, *DROPOUT, "--async-save"]),
}
# Resumed from step 6 of a shorter run, in a new folder: name: (ranks, flags)
SHORT = ["--train-iters", 9, "--save-interval", 6]
RESUMED: dict[str, tuple[int, list]] = {
    "bf16 lisa adamw": (1, [*BF16, *LISA, "--mixture-optimizer", "adamw", "--loss-mean", "token"]),
    "bf16 dp2": (2, BF16),
    "bf16 cp2": (2, [*BF16, *CP2]),
    "tp2": (2, [*TP2, "--packing"]),  # and on others without
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume of runs")
    sources, validation = write_problem(
        folder / "data", [0.5, 0.3, 0.2], 0, length=17, examples=30, validation=40
    )
    write_config(
        folder / "x.yaml", sources, validation,
        train={"train_iters": STEPS}, bilevel={"resync_interval": 5},
        checkpoint={"save_interval": SAVED, "keep_last": KEPT},
    )  # fmt: skip
    for name, (ranks, flags) in KILLED.items():
        kill_on_the_way(folder, name, ranks, flags)
    for ranks in (2, 1):
        run_distributed(on_ranks, ranks, str(folder))
    return folder


def words(folder: Path, output: str, flags: list) -> list:
    return ["reweight", "--config", folder / "x.yaml", "--output", folder / output, *flags]


def kill_on_the_way(folder: Path, name: str, ranks: int, flags: list) -> None:
    """kill -9 of all ranks at a step drawn at random, wherever in that step they are."""
    step = random.Random(name).randint(SAVED + 2, STEPS - 3)
    log = folder / f"{name}-killed" / "metrics.jsonl"
    with started(command, ranks, *words(folder, f"{name}-killed", flags)) as (context, _):
        deadline = time.monotonic() + 180
        while not log.exists() or log.read_bytes().count(b"\n") < step:
            assert not context.join(timeout=0) and time.monotonic() < deadline
            time.sleep(0.005)
    reached = log.read_bytes().count(b"\n")
    assert reached < STEPS, "it was over before it was killed"
    shutil.copy(log, folder / f"{name}-left.jsonl")


def on_ranks(folder_name: str) -> None:
    """Whole runs; killed runs started again; runs resumed from their step 6."""
    folder = Path(folder_name)
    dist.init_process_group("gloo")
    here = dist.get_world_size()
    for name, (ranks, flags) in KILLED.items():
        if ranks == here:
            run(folder, f"{name}-whole", flags)
            run(folder, f"{name}-killed", flags)
    for name, (ranks, flags) in RESUMED.items():
        if ranks == here:
            run(folder, f"{name}-whole", [*flags, *SHORT])
            resume(folder, name, f"{name}-resumed", flags)
    if here == 2:
        resume(folder, "tp2", "tp2-on-pp2", PP2)
        resume(folder, "tp2", "tp2-on-cp2", CP2)
    else:
        resume(folder, "tp2", "tp2-on-one", [])
        again = [*SHORT, "--load", folder / "tp2-on-one-from"]
        note(folder / "noted", "again", command(*words(folder, "tp2-on-one", again)))
        for goal in ("goal", "validation"):
            flags = [*SHORT, "--validation", f"{goal}={folder / 'data' / 's0'}"]
            note(folder / "noted", goal, command(*words(folder, "tp2-on-one", flags)))
        shutil.copytree(folder / "tp2-on-one", folder / "ended")
        other = ["--lr", 0.02, "--tolerance", 0.01]
        run(folder, "ended", [*SHORT, *other])
        longer = words(folder, "ended", ["--train-iters", 10, *other])
        note(folder / "noted", "longer", command(*longer))


def run(folder: Path, output: str, flags: list) -> None:
    note(folder / "noted", output, command(*words(folder, output, flags)))


def resume(folder: Path, name: str, output: str, flags: list) -> None:
    load = folder / f"{output}-from"
    if dist.get_rank() == 0:
        step = Path("checkpoints") / "iter_0000006"
        shutil.copytree(folder / f"{name}-whole" / step, load / step.name)
    dist.barrier()
    run(folder, output, [*flags, *SHORT, "--load", load])


def ended_well(runs: Path, name: str) -> str:
    code, said = noted(runs / "noted", name)
    assert code == 0, said
    return said


@pytest.mark.parametrize("name", KILLED)
def test_killed_and_started_again_equals_never_stopping(runs: Path, name: str) -> None:
    ended_well(runs, f"{name}-whole")
    said = ended_well(runs, f"{name}-killed")
    assert "resumed" in said and "from step " in said
    whole, killed = (metrics(runs / f"{name}-{kind}") for kind in ("whole", "killed"))
    assert [record["step"] for record in whole] == list(range(1, STEPS + 1))
    assert killed == whole
    left = [json.loads(line) for line in (runs / f"{name}-left.jsonl").read_text().splitlines()]
    assert len(left) > int(said.partition("from step ")[2].split()[0]), "some steps were redone"
    for file in ("weights.json", "blend.txt", "blend.json"):
        contents = [(runs / f"{name}-{kind}" / file).read_text() for kind in ("whole", "killed")]
        assert contents[0] == contents[1]


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_from_a_checkpoint_equals_never_stopping(runs: Path, name: str) -> None:
    ended_well(runs, f"{name}-whole")
    assert "from step 6" in ended_well(runs, f"{name}-resumed")
    assert metrics(runs / f"{name}-resumed") == metrics(runs / f"{name}-whole")[6:]


@pytest.mark.parametrize("other", ["tp2-on-pp2", "tp2-on-cp2", "tp2-on-one"])
def test_resumes_under_another_layout(runs: Path, other: str) -> None:
    assert "from step 6" in ended_well(runs, other)
    for got, want in zip(metrics(runs / other), metrics(runs / "tp2-whole")[6:], strict=True):
        for field in ("weights", "loss_w", "loss_u", "validation_losses"):
            assert got[field] == pytest.approx(want[field], abs=1e-4), (got["step"], field)


def test_its_own_checkpoints_go_before_those_it_was_told_to_load(runs: Path) -> None:
    assert "from step 9" in ended_well(runs, "again")


def test_a_run_does_not_go_on_towards_another_goal(runs: Path) -> None:
    code, said = noted(runs / "noted", "goal")
    words = "other validation: validation no longer there; goal not there before"
    assert code == 2 and words in the_only_line(said)
    code, said = noted(runs / "noted", "validation")
    assert code == 2 and "was made for other validation sets, other data" in the_only_line(said)


def test_other_settings_are_told_and_not_written_over_an_ended_run(runs: Path) -> None:
    code, said = noted(runs / "noted", "ended")
    change = "optimizer.lr 0.0003 -> 0.02, optimizer.min_lr 3e-05 -> 0.002"
    line = the_only_line(said)
    assert code == 2 and f"is the end of a run of other settings: {change} (" in line
    said = ended_well(runs, "longer")
    assert f"warning: continues with other settings: {change}\n" in said
    [kept] = json.loads((runs / "ended" / "weights.json").read_text())["settings_changed"]
    assert kept.endswith(f" on: {change}") and kept.startswith("from step ")
    assert f"warning: learned with other settings {kept}\n" in said
    assert html.escape(kept) in (runs / "ended" / "report.html").read_text()


def test_last_checkpoints_are_kept(runs: Path) -> None:
    for kind in ("whole", "killed"):
        save = runs / f"lisa-{kind}" / "checkpoints"
        assert sorted(path.name for path in save.iterdir()) == [
            "iter_0000009",
            "iter_0000012",
            "latest_checkpointed_iteration.txt",
        ]
        assert (save / "latest_checkpointed_iteration.txt").read_text() == "12"


def test_outputs_are_what_others_read(runs: Path) -> None:
    """weights.json adds up to one; Megatron's own parser reads the blend."""
    from megatron.core.datasets.utils import get_blend_from_list

    run = runs / "plain-whole"
    content = json.loads((run / "weights.json").read_text())
    weights = {entry["path"]: entry["weight"] for entry in content["sources"]}
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)
    assert content["step"] == STEPS and content["converged"] is False
    for entry in content["sources"]:
        assert entry["ci_low"] is entry["ci_high"] is None, "of so few steps"
        assert entry["initial_weight"] == pytest.approx(1 / 3) and entry["examples"] == 30
    blended = get_blend_from_list(shlex.split((run / "blend.txt").read_text()))
    assert blended is not None and blended[1] is not None
    prefixes, shares = blended
    assert dict(zip(prefixes, shares, strict=True)) == pytest.approx(weights, abs=1e-5)
    assert all(Path(f"{prefix}.idx").is_file() for prefix in prefixes)
    splits = json.loads((run / "blend.json").read_text())
    assert splits["train"] == shlex.split((run / "blend.txt").read_text())
    assert set(splits) == {"train", "valid", "test"}
    prefixes, _ = get_blend_from_list(splits["valid"])
    assert all(Path(f"{prefix}.bin").is_file() for prefix in prefixes)
    assert (run / "report.html").stat().st_size > 1000
