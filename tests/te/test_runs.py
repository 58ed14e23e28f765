"""Runs on Transformer Engine's layers: resumed, moved between layers and optimizers, evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands import command, metrics, note, noted, write_config
from tests.distributed.harness import run_distributed
from tests.te.double import needs_transformer_engine, pretend_card, run_with_te

pytestmark = [needs_transformer_engine, pytest.mark.distributed, pytest.mark.slow]

SAVED, LAST = 2, 4
LOCAL = ["--transformer-impl", "local"]
RECIPES = {
    name: ["--fp8-format", "hybrid", "--fp8-recipe", name]
    for name in ("tensorwise", "delayed", "blockwise", "mxfp8")
} | {"nvfp4": ["--fp4-format", "e2m1"]}
OF_BLACKWELL = ("mxfp8", "nvfp4")
# A resume falls into the first period, whose frozen layers were first cast at scale 1.
LISA = {"": [], "-lisa": ["--lisa-layers", 1, "--lisa-interval", LAST]}
RESUMED = [(recipe, lisa) for recipe in RECIPES for lisa in LISA]
STILL = ["--lr", 1e-30, "--resync-interval", 2, "--train-iters", 3]  # u = w, in every bit
# Optimizers: torch's in a process without Transformer Engine, its own in one with it.
KINDS = {"": [], "-sharded": ["--use-distributed-optimizer"], "-fp32": ["--no-bf16"]}
EXPERTS = ["--num-experts", 4, "--moe-ffn-hidden-size", 48]
OTHERS = {
    "experts": ["reweight", *RECIPES["tensorwise"], *EXPERTS],
    "experts-lisa": ["reweight", *RECIPES["tensorwise"], *EXPERTS, *LISA["-lisa"]],
    "experts-delayed": ["reweight", *RECIPES["delayed"], *EXPERTS],
    "experts-blockwise": ["reweight", *RECIPES["blockwise"], *EXPERTS],
    "sharded": ["reweight", *RECIPES["tensorwise"], *KINDS["-sharded"]],
    "sharded-lisa": ["reweight", *RECIPES["blockwise"], *KINDS["-sharded"], *LISA["-lisa"]],
    "train": ["train", *RECIPES["delayed"], *LISA["-lisa"]],
    "doremi": ["reweight", "--method", "doremi", *RECIPES["delayed"]],
    "doge": ["reweight", "--method", "doge", *RECIPES["tensorwise"], *LISA["-lisa"]],
    "less": ["reweight", "--method", "less", "--less-checkpoints", 1, *RECIPES["tensorwise"]],
    "fastmix": ["reweight", "--method", "fastmix", *RECIPES["delayed"]],
    "rho_loss": ["reweight", "--method", "rho_loss", *RECIPES["delayed"]],
}  # fmt: skip
# from, to: flags of both, in the process with Transformer Engine
MOVES = {
    "local-te": (LOCAL, []),
    "te-local": ([], LOCAL),
    "local-delayed": (LOCAL, RECIPES["delayed"]),
    "delayed-local": (RECIPES["delayed"], LOCAL),
}


def reweight(folder: Path, name: str, *flags: object) -> None:
    words = ["reweight", "--config", folder / "x.yaml", "--output", folder / name, *flags]
    note(folder / "noted", name, command(*words))


def note_steps(folder: Path) -> None:
    """Has every step leave what the tests below read.

    copies.jsonl: the bytes of FP8 copies that are held, beside those of the plan.
    fused.jsonl: active layers; the weights whose gradients matrix products added to DDP's buffers.
    """

    def leave(name: str, line: object) -> None:
        with (folder / f"{name}.jsonl").open("a") as lines:
            lines.write(json.dumps(line) + "\n")

    from megatron_scalebio.core.training import Training
    from megatron_scalebio.plan.holdings import fp8_copies

    update = Training.update
    kinds = (
        "_data", "_transpose", "_scale_inv", "_rowwise_data", "_rowwise_scale_inv",
        "_columnwise_data", "_columnwise_scale_inv", "_amax_rowwise", "_amax_columnwise",
    )  # fmt: skip

    def noting(self: Any, *words: Any, **options: Any) -> Any:
        config = self.model_config
        if (config.fp8 or config.fp4) and self.u is not None:
            modules = [m for model in self.models.values() for c in model for m in c.modules()]
            copies = [c for m in modules for c in getattr(m, "_fp8_workspaces", {}).values()]
            held = [getattr(copy, kind, None) for copy in copies for kind in kinds]
            storages = [tensor.untyped_storage() for tensor in held if tensor is not None]
            real = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
            recipe = config.fp8_recipe if config.fp8 else config.fp4_recipe
            planned = fp8_copies(self.models.values(), recipe)
            experts, whole = config.num_moe_experts, self.active_layers is None
            leave("copies", [recipe, experts, whole, real, planned])
            named = [entry for c in self.w for entry in c.named_parameters()]
            added = [name for name, p in named if getattr(p, "grad_added_to_main_grad", False)]
            leave("fused", [experts, self.active_layers, added])
        return update(self, *words, **options)

    Training.update = noting  # type: ignore[method-assign]


def begin(folder: Path, name: str, *flags: object) -> Path:
    """A whole run; where its checkpoint of step SAVED lies alone, to go on from."""
    reweight(folder, name, *flags)
    alone = folder / f"{name}-saved"
    alone.mkdir()
    step = f"iter_{SAVED:07d}"
    (alone / step).symlink_to(folder / name / "checkpoints" / step)
    return alone


def with_te(folder_name: str) -> None:
    import torch.distributed as dist
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    folder = Path(folder_name)
    dist.init_process_group("gloo")

    def run(name: str, *flags: object) -> None:
        FP8GlobalStateManager.reset()  # as in a process of its own
        reweight(folder, name, *flags)

    note_steps(folder)
    for recipe in OF_BLACKWELL:
        run(f"{recipe}-on-hopper", *RECIPES[recipe])
    for recipe, lisa in RESUMED:
        flags = [*RECIPES[recipe], *LISA[lisa]]
        pretend_card("Blackwell" if recipe in OF_BLACKWELL else "Hopper")
        FP8GlobalStateManager.reset()
        saved = begin(folder, recipe + lisa, *flags)
        run(f"{recipe}{lisa}-resumed", *flags, "--load", saved)
    pretend_card("Hopper")
    for kind, flags in KINDS.items():
        saved = begin(folder, f"te{kind}", *flags)
        run(f"torch-te{kind}", *flags, "--load", folder / f"torch{kind}-saved")
    for move, (ours, theirs) in MOVES.items():
        saved = folder / f"{move.partition('-')[0]}-saved"
        saved = saved if saved.exists() else begin(folder, move.partition("-")[0], *ours)
        run(move, *theirs, "--load", saved)
        weights = folder / move.partition("-")[0] / "checkpoints"
        if move != "local-delayed":
            start = ["--pretrained-checkpoint", weights, "--train-iters", 1]
            run(f"{move}-pretrained", *theirs, *start)
    for recipe, flags in RECIPES.items():
        pretend_card("Blackwell" if recipe in OF_BLACKWELL else "Hopper")
        if recipe != "delayed":
            run(f"still-{recipe}", *flags, *STILL)
        words = ["evaluate", "--config", folder / "x.yaml", "--output", folder / f"on-{recipe}"]
        note(folder / "noted", f"on-{recipe}",
             command(*words, *flags, "--load", folder / "delayed/checkpoints"))  # fmt: skip
    pretend_card("Hopper")
    for name, (stage, *flags) in OTHERS.items():
        FP8GlobalStateManager.reset()
        words = [stage, "--config", folder / "x.yaml", "--output", folder / name]
        note(folder / "noted", name, command(*words, *flags, "--train-iters", 2))


def without_te(folder_name: str, first: bool) -> None:
    import torch.distributed as dist

    folder = Path(folder_name)
    dist.init_process_group("gloo")
    for kind, flags in KINDS.items():
        if first:
            begin(folder, f"torch{kind}", *flags)
        else:
            reweight(folder, f"te-torch{kind}", *flags, "--load", folder / f"te{kind}-saved")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.markov import write_problem

    folder = tmp_path_factory.mktemp("te")
    sources, validation = write_problem(
        folder / "data", [0.6, 0.4], 0, length=33, examples=40, validation=24
    )
    write_config(
        folder / "x.yaml", sources, validation,
        data={"seq_length": 32}, parallel={"bf16": True}, optimizer={"lr": 1e-3},
        model={"hidden_size": 64, "ffn_hidden_size": 128, "make_vocab_size_divisible_by": 32},
        train={"train_iters": LAST, "micro_batch_size": 4}, checkpoint={"save_interval": SAVED},
    )  # fmt: skip
    run_distributed(without_te, 1, str(folder), True)
    run_with_te(with_te, (1, str(folder)))
    run_distributed(without_te, 1, str(folder), False)
    return folder


def losses(run: Path) -> list[float]:
    return [record["train_loss_w"] for record in metrics(run)]


@pytest.mark.parametrize(("recipe", "lisa"), RESUMED)
def test_a_resumed_run_is_the_whole_one(runs: Path, recipe: str, lisa: str) -> None:
    code, said = noted(runs / "noted", f"{recipe}{lisa}-resumed")
    assert code == 0, said
    assert metrics(runs / f"{recipe}{lisa}-resumed") == metrics(runs / f"{recipe}{lisa}")[SAVED:]


def test_copies_take_what_the_plan_says(runs: Path) -> None:
    """u and w share those of frozen layers, except under delayed scaling."""
    noted = [json.loads(line) for line in (runs / "copies.jsonl").read_text().splitlines()]
    assert {recipe for recipe, *_ in noted} == set(RECIPES)
    for recipe, experts, whole, real, planned in noted:
        assert real == planned, (recipe, experts, whole)
    assert {experts for _, experts, *_ in noted} == {None, 4}
    of_u_and_w = {(recipe, experts): real for recipe, experts, whole, real, _ in noted if whole}
    for recipe, experts, whole, real, _ in noted:  # under LISA one of two layers is shared
        share = 3 / 4 if not whole and recipe != "delayed" else 1
        assert real == share * of_u_and_w[recipe, experts]


def test_products_add_gradients_to_the_buffers(runs: Path) -> None:
    """Of the layers that train, every matrix's: Megatron's gradient_accumulation_fusion."""
    for line in (runs / "fused.jsonl").read_text().splitlines():
        experts, active, added = json.loads(line)
        of_a_layer = 4 if experts is None else 2 + 2 * experts
        matrices = [name for name in added if ".linear_" in name and not name.endswith("bias")]
        assert len(matrices) == of_a_layer * (2 if active is None else len(active)), added


@pytest.mark.parametrize("move", MOVES)
def test_a_run_goes_on_under_other_layers(runs: Path, move: str) -> None:
    code, said = noted(runs / "noted", move)
    assert code == 0, said
    before = losses(runs / move.partition("-")[0])
    assert losses(runs / move) == pytest.approx(before[SAVED:], abs=3e-3)


@pytest.mark.parametrize("move", [move for move in MOVES if move != "local-delayed"])
def test_a_run_starts_from_the_weights_of_other_layers(runs: Path, move: str) -> None:
    code, said = noted(runs / "noted", f"{move}-pretrained")
    assert code == 0, said
    before = losses(runs / move.partition("-")[0])
    begun = losses(runs / f"{move}-pretrained")[0]
    assert begun == pytest.approx(before[0], abs=0.2) and begun < before[0] - 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("old", "new"), [("torch", "te"), ("te", "torch")])
def test_adam_goes_on_under_another_adam(runs: Path, old: str, new: str, kind: str) -> None:
    code, said = noted(runs / "noted", f"{old}-{new}{kind}")
    assert code == 0, said
    exact = kind == "-fp32"
    for ours, theirs in zip(
        metrics(runs / f"{old}-{new}{kind}"), metrics(runs / f"{old}{kind}")[SAVED:], strict=True
    ):
        for name in ("train_loss_w", "train_loss_u", "grad_norm_w", "grad_norm_u"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5 if exact else 3e-3), name


def test_scores_take_no_scales_of_a_training(runs: Path) -> None:
    found = {}
    for recipe in RECIPES:
        code, said = noted(runs / "noted", f"on-{recipe}")
        assert code == 0, said
        [found[recipe]] = json.loads((runs / f"on-{recipe}/evaluation.json").read_text())[
            "held_out"
        ]["sets"]
    assert found["delayed"] == found["tensorwise"]
    losses = [one["sample_mean"] for recipe, one in found.items() if recipe != "delayed"]
    # Blocks of 128 and of 32 have powers of two as scales, which change no bit of what they scale.
    assert len(set(losses)) == 3 and found["blockwise"] == found["mxfp8"]


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "delayed"])
def test_where_u_is_w_there_is_no_excess_loss(runs: Path, recipe: str) -> None:
    code, said = noted(runs / "noted", f"still-{recipe}")
    assert code == 0, said
    for record in metrics(runs / f"still-{recipe}"):
        assert record["loss_w"] == record["loss_u"]


@pytest.mark.parametrize("recipe", OF_BLACKWELL)
def test_a_recipe_of_another_card_is_refused(runs: Path, recipe: str) -> None:
    code, said = noted(runs / "noted", f"{recipe}-on-hopper")
    assert code == 2
    assert "compute capability 10.0 or higher required" in said and "tensorwise)" in said


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_that_adds_noise_is_warned_of(runs: Path, recipe: str) -> None:
    _, said = noted(runs / "noted", recipe)
    assert ("use tensorwise" in said) == (recipe == "delayed")


@pytest.mark.parametrize("name", OTHERS)
def test_other_trainings_run(runs: Path, name: str) -> None:
    code, said = noted(runs / "noted", name)
    assert code == 0, said
