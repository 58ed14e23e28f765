"""Is the mixture right where validation is not made of the sources? Problems with exact answers.

Sequences are two tokens (a, b), b alone a target, so that a problem is the joint distributions
J_i(a, b) of the sources and v(a, b) of the validation set. A model that can be any conditional,
trained until it changes no more on the mixture p, is

    q_p(b | a) = Σ_i p_i J_i(a, b) / Σ_i p_i m_i(a),      m_i(a) = Σ_b J_i(a, b)

and the best mixture minimises −Σ v(a, b) log q_p(b | a): found here by L-BFGS from many starts. A
small GPT is such a model. The problems, each drawn anew from a seed:

    span5, span20   validation is a mixture of the sources
    noisy           every source is one skill with noise of its own; validation has the clean ones
    shift           validation has one source's answers moved, and a part that no source has
    entropy         two sources contradict each other, one sure and one unsure
    labels          one task with label noise; contexts differ in frequency
    contexts        sources hold different contexts
    rare            validation asks often what the sources hold rarely
    curvature       sharp contexts and open ones
    twins           two sources are equal but for 1 %
    many50          50 sources, noise .2 to .95

Reported per problem, means over seeds: distance Σ|p_i − best_i| to the best mixture; regret (the
validation loss of full training on the found mixture, less that on the best) in thousandths of a
nat, and in % of what the best gains over equal weights; the latter for a final training of
`--final-train-iters` steps against the best mixture for that length (`final_trainings.py`); which
share of the 95 % intervals of sources in use hold the answer; runs called converged; those of them
whose regret is above 2 % and 0.3 thousandths; and ("draw", with `--validation-examples`) the
standard error of a weight that the check after the last step measures for another sample of
validation examples, over the exact one: the median of the sources in use.

`--exact`: the regret of the best mixture by the method's own objective, in which α is finite.

`--start`: from a model that 400 steps at 5e-3 have trained on the first source, on equal weights of
all, or on the validation set.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from common import (
    PUBLISHED,
    add_precision_arguments,
    build,
    learn,
    precision,
    table,
    train_step,
    write_json,
)
from final_trainings import share_after
from scipy.optimize import minimize
from scipy.special import softmax

from megatron_scalebio import runtime
from megatron_scalebio.core.twin import named_parameters
from megatron_scalebio.engine.schedule import Schedule
from tests.markov import write_source

V = 16  # tokens
Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """Joint distributions of (a, b): of the sources, S × V × V, and of validation, V × V."""

    joint_SVV: Array
    validation_VV: Array

    def loss(self, probs_S: Array) -> float:
        """Validation loss, in nats, of a model trained to the end on a mixture."""
        mixed = np.tensordot(probs_S, self.joint_SVV, 1)
        q = mixed / mixed.sum(-1, keepdims=True)
        return float(-(self.validation_VV * np.log(q.clip(1e-300))).sum())

    def _of_logits(self, logits_S: Array) -> tuple[float, Array]:
        p = softmax(logits_S)
        mixed = np.tensordot(p, self.joint_SVV, 1).clip(1e-300)
        contexts = mixed.sum(-1, keepdims=True)
        pull = self.validation_VV.sum(-1, keepdims=True) / contexts - self.validation_VV / mixed
        g = np.tensordot(self.joint_SVV, pull, 2)
        return self.loss(p), p * (g - p @ g)

    def penalised(self, probs_S: Array, alpha: float) -> float:
        """The objective of the method, L1 + α (L2(w) − L2(u)), with w and u trained to the end."""

        def least(joint_VV: Array) -> float:
            return float(-(joint_VV * np.log(joint_VV / joint_VV.sum(-1, keepdims=True))).sum())

        mixed = alpha * np.tensordot(probs_S, self.joint_SVV, 1).clip(1e-300)
        return least(self.validation_VV + mixed) - least(mixed)

    def best_of_alpha(self, alpha: float) -> Array:
        """The mixture that is best by that, next to the best one."""
        z = np.log(self.best() + 1e-4)
        options = {"maxiter": 2000, "maxfun": 10**6, "ftol": 1e-15, "gtol": 1e-9}
        found = minimize(
            lambda z: self.penalised(softmax(z), alpha), z, method="L-BFGS-B", options=options
        )
        return softmax(found.x)

    def best(self, starts: int = 30) -> Array:
        """The mixture of least loss."""
        draw = np.random.default_rng(0)
        S = len(self.joint_SVV)
        tried = [np.zeros(S), *(draw.normal(scale=2.0, size=S) for _ in range(starts))]
        found = [
            minimize(
                self._of_logits,
                z,
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": 3000, "ftol": 1e-15, "gtol": 1e-10},
            )
            for z in tried
        ]
        return softmax(min(found, key=lambda each: each.fun).x)


def drawn_spread(problem: Problem, examples: int) -> Array:
    """Standard deviations of the best mixture over validation sets of so many examples."""
    draw, law_VV = np.random.default_rng(1), problem.validation_VV / problem.validation_VV.sum()
    counts = draw.multinomial(examples, law_VV.ravel(), size=60).reshape(-1, V, V) / examples
    return np.std([Problem(problem.joint_SVV, each).best(starts=2) for each in counts], axis=0)


def rows(draw: np.random.Generator, concentration: float, number: int | None = None) -> Array:
    """Answers to each context, V × V, or so many of them."""
    size = (V,) if number is None else (number, V)
    return draw.dirichlet(np.full(V, concentration), size=size)


def even(answers: Array) -> Array:
    """A joint in which every context is as frequent."""
    return answers / V


def span(truth: list[float]) -> Callable[[np.random.Generator], Problem]:
    def make(draw: np.random.Generator) -> Problem:
        joint = even(rows(draw, 0.3, len(truth)))
        return Problem(joint, np.tensordot(np.array(truth), joint, 1))

    return make


def noisy(draw: np.random.Generator) -> Problem:
    skills, noise = rows(draw, 0.3, 5), rows(draw, 1.0, 5)
    share = np.array([0.15, 0.25, 0.45, 0.3, 0.35])[:, None, None]
    wanted = np.tensordot(np.array([0.4, 0.35, 0.25, 0, 0]), skills, 1)
    return Problem(even((1 - share) * skills + share * noise), even(wanted))


def shift(draw: np.random.Generator) -> Problem:
    sources = rows(draw, 0.3, 5)
    moved = 0.75 * sources[0] + 0.25 * np.roll(sources[0], 1, axis=-1)
    return Problem(even(sources), even(0.5 * moved + 0.25 * sources[1] + 0.25 * rows(draw, 0.3)))


def entropy(draw: np.random.Generator) -> Problem:
    sure, other = rows(draw, 0.1), rows(draw, 0.3)
    unsure = 0.4 * np.roll(sure, 3, axis=-1) + 0.6 * rows(draw, 2.0)
    sources = np.stack([sure, unsure, other, rows(draw, 0.3)])
    return Problem(even(sources), even(0.4 * sure + 0.3 * unsure + 0.2 * other + 0.1 / V))


def labels(draw: np.random.Generator) -> Problem:
    clean = rows(draw, 0.2)
    joint = [
        draw.dirichlet(np.full(V, 2.0))[:, None] * ((1 - e) * clean + e * rows(draw, 0.3))
        for e in (0.25, 0.4, 0.55, 0.7, 0.85)
    ]
    return Problem(np.stack(joint), draw.dirichlet(np.full(V, 2.0))[:, None] * clean)


def contexts(draw: np.random.Generator) -> Problem:
    base = rows(draw, 0.3)
    held = draw.dirichlet(np.full(V, 0.5), size=5) * 0.9 + 0.1 / V
    joint = [each[:, None] * (0.5 * base + 0.5 * rows(draw, 0.3)) for each in held]
    asked = draw.dirichlet(np.ones(V))[:, None] * (0.8 * base + 0.2 * rows(draw, 0.3))
    return Problem(np.stack(joint), asked)


def rare(draw: np.random.Generator) -> Problem:
    base, often = rows(draw, 0.2), np.full(V, 1.0)
    often[: V // 4] = 0.05
    held = np.stack([draw.dirichlet(4 * often) for _ in range(5)]) * 0.98 + 0.02 / V
    joint = [
        h[:, None] * ((1 - e) * base + e * rows(draw, 0.3))
        for h, e in zip(held, (0.1, 0.2, 0.3, 0.5, 0.7), strict=True)
    ]
    asked = np.where(np.arange(V) < V // 4, 3.0, 0.4)
    return Problem(np.stack(joint), (asked / asked.sum())[:, None] * base)


def curvature(draw: np.random.Generator) -> Problem:
    right, open_ = draw.permutation(V), rows(draw, 1.0)
    sharp = np.arange(V) < V // 2

    def answers(peak: float, wrong: float) -> Array:
        certain = np.full((V, V), (1 - peak) / (V - 1))
        certain[np.arange(V), right] = peak
        return np.where(sharp[:, None], certain, (1 - wrong) * open_ + wrong * rows(draw, 1.0))

    kinds = ((0.99, 0.85), (0.8, 0.05), (0.95, 0.5), (0.5, 0.5), (0.2, 0.9))
    return Problem(even(np.stack([answers(*kind) for kind in kinds])), even(answers(0.98, 0.1)))


def twins(draw: np.random.Generator) -> Problem:
    one, *others = rows(draw, 0.3, 4)
    like = 0.99 * one + 0.01 * rows(draw, 0.3)
    wanted = 0.5 * one + 0.3 * others[0] + 0.2 * rows(draw, 0.3)
    return Problem(even(np.stack([one, like, *others])), even(wanted))


def many(draw: np.random.Generator) -> Problem:
    skills = rows(draw, 0.3, 5)
    noise = np.linspace(0.2, 0.95, 50)
    sources = [(1 - e) * skills[i % 5] + e * rows(draw, 0.3) for i, e in enumerate(noise)]
    wanted = 0.4 * skills[0] + 0.25 * skills[1] + 0.15 * skills[2] + 0.2 * rows(draw, 0.3)
    return Problem(even(np.stack(sources)), even(wanted))


# Name: (how it is drawn, sequences of a batch).
PROBLEMS: dict[str, tuple[Callable[[np.random.Generator], Problem], int]] = {
    "span5": (span([0.5, 0.3, 0.2, 0, 0]), 400),
    "span20": (span([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05] + [0.0] * 12), 400),
    "noisy": (noisy, 400), "shift": (shift, 400), "entropy": (entropy, 400),
    "labels": (labels, 400), "contexts": (contexts, 400), "rare": (rare, 400),
    "curvature": (curvature, 400), "twins": (twins, 400), "many50": (many, 800),
}  # fmt: skip
STARTS = ("scratch", "one source", "equal weights", "validation")
TRAINED = (400, 5e-3)  # steps and learning rate of a start
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "whole resets": {"memory_growth": 0.0},
    "never reset": {"resync_interval": None},
    "paper": PUBLISHED,
}


def entries(
    folder: Path, problem: Problem, draw: np.random.Generator, examples: int, validation: int
) -> Any:
    """Prepared sources and validation set of so many sequences from the problem."""

    def write(name: str, joint: Array, number: int) -> dict[str, str]:
        both = draw.choice(V * V, size=number, p=joint.ravel() / joint.sum())
        pairs = [np.array([b // V, b % V]) for b in both]
        masks = [np.array([0, 1])] * number
        return {"name": name, "path": write_source(folder, name, pairs, masks, vocab_size=V)}

    each = examples // len(problem.joint_SVV)
    sources = [write(f"s{i}", joint, each) for i, joint in enumerate(problem.joint_SVV)]
    return sources, [write("validation", problem.validation_VV, validation)]


def trained(given: dict[str, Any], on: str, folder: Path) -> dict[str, Any]:
    """Weights to start from: those of u, which neither a reset nor the validation set has moved."""
    data, (steps, lr) = given["data"], TRAINED
    only = {"one source": data["sources"][0], "validation": data["validation"][0]}.get(on)
    sources = [{**only, "name": name} for name in "ab"] if only else data["sources"]
    state = build({
        **given, "data": {**data, "sources": sources}, "optimizer": {"lr": lr},
        "bilevel": {"lr_lambda": 1e-12, "resync_interval": None},
        "train": {**given["train"], "train_iters": steps},
    }, folder / "start")  # fmt: skip
    for _ in range(steps):
        assert train_step(state).skipped is None
    weights = {name: p.detach().clone() for name, p in named_parameters(state.training.u)}
    state.training.leave_period()
    runtime.stop_model_parallel()
    return weights


def one_run(name: str, rule: str, alpha: float, steps: int, seed: int, args: Any) -> dict[str, Any]:
    make, batch = PROBLEMS[name]
    problem = make(np.random.default_rng((args.problem, 31)))
    best = problem.best()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sources, validation = entries(
            Path(folder), problem, np.random.default_rng((seed, 32)), args.examples,
            args.validation_examples or args.examples,
        )  # fmt: skip
        given = {
            "data": {"seq_length": 16 if args.fp8_recipe else 2,  # FP8 products go by sixteens
                     "sources": sources, "validation": validation},
            "model": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 1,
                      "make_vocab_size_divisible_by": V, "transformer_impl": args.transformer_impl},
            "parallel": precision(args),
            "optimizer": {"lr": args.lr},
            "bilevel": {"alpha": alpha, **RULES[rule]},
            "train": {"train_iters": steps, "global_batch_size": batch, "micro_batch_size": batch,
                      "seed": seed},
        }  # fmt: skip
        start_from = trained(given, args.start, Path(folder)) if args.start != "scratch" else {}
        state = build(given, Path(folder) / "cache")
        for key, parameter in named_parameters(state.training.w):
            if start_from:
                parameter.data.copy_(start_from[key])
        found = learn(state)
    weights = np.array(found["weights"])
    state.config.train.train_iters = args.final_train_iters or steps
    schedule = Schedule(state.config)
    rates = [schedule.at(step).lr_w for step in range(state.config.train.train_iters)]
    regret = problem.loss(weights) - problem.loss(best)
    gain = problem.loss(np.full(len(best), 1 / len(best))) - problem.loss(best)
    used = best > 1e-3
    held = (np.array(found["low"]) <= best) & (best <= np.array(found["high"]))
    draw = None
    if found["draw"] is not None and args.validation_examples:
        exact = drawn_spread(problem, args.validation_examples)
        draw = float(np.median((np.array(found["draw"]) / exact)[used & (weights > 0.01)]))
    return {
        "draw": draw, "problem": name, "rule": rule, "alpha": alpha, "steps": steps, "seed": seed,
        "start": args.start,
        "l1": float(np.abs(weights - best).sum()), "regret_mn": 1e3 * regret,
        "share": regret / gain, "share_after": share_after(
            rates, problem.joint_SVV, problem.validation_VV, weights, best
        ),
        "covered": float(held[used].mean()),
        "converged": found["converged"],
        "reason": found["reason"],
        "wrongly": found["converged"] and regret > max(0.02 * gain, 3e-4),
        "weights": found["weights"], "low": found["low"], "high": found["high"],
        "best": best.tolist(), "seconds": time.perf_counter() - start,
    }  # fmt: skip


def of_alpha(name: str, alpha: float, number: int) -> list[str]:
    problem = PROBLEMS[name][0](np.random.default_rng((number, 31)))
    best, found = problem.best(), problem.best_of_alpha(alpha)
    regret = problem.loss(found) - problem.loss(best)
    gain = problem.loss(np.full(len(best), 1 / len(best))) - problem.loss(best)
    return [name, f"{alpha:g}", f"{np.abs(found - best).sum():.3f}", f"{1e3 * regret:.2f}",
            f"{regret / gain:.1%}"]  # fmt: skip


def row(runs: list[dict[str, Any]]) -> list[str]:
    of = lambda key: mean(float(run[key]) for run in runs)  # noqa: E731
    head = [str(runs[0][key]) for key in ("problem", "rule", "alpha", "steps")]
    draws = [run["draw"] for run in runs if run["draw"] is not None]
    told = f"{mean(draws):.2f}" if draws else "–"
    return [*head, f"{of('l1'):.3f}", f"{of('regret_mn'):.2f}", f"{of('share'):.1%}",
            f"{of('share_after'):.1%}", f"{of('covered'):.2f}",
            f"{sum(r['converged'] for r in runs)}/{len(runs)}",
            str(sum(r["wrongly"] for r in runs)), told, f"{of('seconds'):.0f}"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["default", "whole resets"])
    parser.add_argument("--alphas", nargs="+", type=float, default=[10.0, 100.0])
    parser.add_argument("--steps", nargs="+", type=int, default=[400, 2000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--start", choices=STARTS, default="scratch")
    parser.add_argument(
        "--exact", action="store_true", help="no runs: the regret that α itself causes"
    )
    parser.add_argument("--problem", type=int, default=0, help="seed of the problems themselves")
    parser.add_argument("--examples", type=int, default=200_000, help="of all sources together")
    parser.add_argument("--validation-examples", type=int, help="[as many]")
    parser.add_argument("--final-train-iters", type=int, help="[as many as the search's]")
    add_precision_arguments(parser)
    parser.add_argument("--json", type=Path, help="write the runs here")
    args = parser.parse_args()
    if args.exact:
        told = [of_alpha(n, a, args.problem) for n in args.problems for a in args.alphas]
        print(table(["problem", "alpha", "distance", "regret, 1e-3 nats", "regret, %"], told))
        return
    runs: list[dict[str, Any]] = []
    lines: list[list[str]] = []
    for name in args.problems:
        for steps in args.steps:
            for alpha in args.alphas:
                for rule in args.rules:
                    these = []
                    for seed in args.seeds:
                        these.append(one_run(name, rule, alpha, steps, seed, args))
                        write_json(args.json, runs + these)
                    runs += these
                    lines.append(row(these))
                    print(*lines[-1], flush=True)
    head = ["problem", "rule", "alpha", "steps", "distance", "regret, 1e-3 nats", "regret, %",
            "regret after N steps, %", "intervals that hold the answer", "converged",
            "of these wrongly", "draw", "s"]  # fmt: skip
    print(table(head, lines))


if __name__ == "__main__":
    main()
