"""ScaleBiO: the core's step on a run's sources."""

import hashlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.core.scalebio import ScaleBiO, StepReport
from megatron_scalebio.data.sources import repeated_data
from megatron_scalebio.data.weights_file import much_shorter
from megatron_scalebio.engine import outputs
from megatron_scalebio.engine.epochs import kept_rows, target
from megatron_scalebio.engine.loop import logged_steps
from megatron_scalebio.engine.run_log import RunLog
from megatron_scalebio.engine.start import Job, resume_or_start
from megatron_scalebio.engine.state import Record, RunState
from megatron_scalebio.engine.update import with_names
from megatron_scalebio.errors import UserError
from megatron_scalebio.formatting import few, quantity
from megatron_scalebio.logs.source_table import LISTED_SOURCES
from megatron_scalebio.methods.bounds import at_bounds, constraints_of, group_ranges
from megatron_scalebio.methods.end_check import EndCheck, end_check
from megatron_scalebio.methods.example_scores import VISITS_FILE, ExampleVisits
from megatron_scalebio.methods.found import Found
from megatron_scalebio.methods.goals import (
    SetRecord,
    broken_bound,
    goal_told,
    goals_of,
    losses_of_sets,
    settle,
)
from megatron_scalebio.methods.goals import described as described_sets
from megatron_scalebio.methods.groups import (
    Level,
    coarse_weights,
    core_levels,
    described,
    levels_of,
)
from megatron_scalebio.methods.interactions import interactions_of
from megatron_scalebio.methods.similar_sources import similar_sources
from megatron_scalebio.methods.stages import stages_of
from megatron_scalebio.mixture.confidence import RESOLUTION, Verdict, WeightIntervals
from megatron_scalebio.mixture.goals import LEAST
from megatron_scalebio.mixture.objective import hypergradient

FEWEST_AVERAGED = 20  # steps: the wandering of fewer says nothing of an interval
MANY_PASSES = 10  # over a source or a validation set, from which on weights are no longer trusted
# Options of the bilevel section that judge or write what was learned.
_JUDGING = {
    "preset", "average_fraction", "confidence", "tolerance", "early_stop",
    "final_train_iters", "blend_floor", "final_check",
}  # fmt: skip


def find(config: Config, job: Job) -> Found:
    """The weights at the run's end, or so far where a signal has stopped it."""
    state = TrainState(config, job.folder / "cache", similar_sources(config, job))
    warnings = resume_or_start(state, job.folder, job.save_to)
    state.measure_start()
    if config.parallel.fp8_format and config.parallel.fp8_recipe == "delayed":
        warnings.append(
            "fp8_recipe delayed: w and u get scales of their own, and the weights learn from their "
            "noise as well (use tensorwise)"
        )
    warnings += repeated_data(state.data.sources, state.data.validation)
    final = config.bilevel.final_train_iters or config.train.train_iters
    if much_shorter(final, config.train.train_iters):
        warnings.append(
            f"final_train_iters {final}: the search has {config.train.train_iters} steps, and so "
            f"much shorter a training may want another mixture (search with train_iters {final})"
        )
    parameters = outputs.parameter_count(state)
    initial_S = state.training.mixture.initial_S.tolist()
    log = runtime.only_on_main(
        lambda: RunLog(state, job.folder, parameters, initial_S, warnings, _facts(state))
    )
    finished = logged_steps(state, job, log, job.save_to)
    measured = finished and state.sets.is_needed
    sets = described_sets(
        state.training.goals, state.sets, state, losses_of_sets(state) if measured else None
    )
    broken = broken_bound(sets.get("validation", []))
    if finished:
        state.check_weights(
            log.console.note if log else lambda line: None, lambda: job.signals.received
        )
    intervals = state.intervals()
    interaction = None
    if state.interactions is not None:
        interaction = state.interactions.found(state.data, config.bilevel.confidence)
    scored = {"example_scores": state.visits.write_scores(job.folder)} if state.visits else {}
    mixture = state.training.mixture
    averaged = mixture.trajectory.steps * config.bilevel.average_fraction
    known = averaged >= FEWEST_AVERAGED
    return Found(
        sources=state.data.sources,
        weight_S=intervals.weight_S.tolist(),
        initial_S=initial_S,
        cost=state.cost,
        step=state.step,
        kept_S=state.kept_S,
        complete=finished,
        low_S=intervals.low_S.tolist() if known else None,
        high_S=intervals.high_S.tolist() if known else None,
        verdict=Verdict(False, broken) if broken else verdict(state),
        details={
            "confidence": config.bilevel.confidence,
            "final_train_iters": final,
            "indistinguishable": [
                [state.data.sources[i].name for i in group] for group in intervals.lookalikes
            ],
            **described(
                state.training,
                state.levels,
                _is_constant(config),
                state.validation_examples,
                known,
                state.draw_SS,
                group_ranges(config, state.data.sources),
            ),
            **({"final_check": state.check.told(state.training.sources)} if state.check else {}),
            **sets,
            **scored,
            "settings_changed": state.changes,
        },
        at_bound_S=at_bounds(mixture.constraints, intervals.weight_S.tolist()),
        interaction=interaction,
        stages=stages_of(
            mixture.trajectory,
            config.bilevel.tolerance,
            final / config.train.train_iters,
            max(0, mixture.steps - mixture.trajectory.steps),
        ),
    )


class TrainState(RunState):
    """The state of a `reweight` run on this rank.

    Args:
        groups: of the sources [those that their names make].
    """

    training: ScaleBiO
    levels: list[Level]
    check: EndCheck | None = None  # after the last step

    def __init__(self, config: Config, cache: Path, groups: Level | None = None) -> None:
        self._groups = groups
        super().__init__(config, "reweight", cache)
        self.kept_S = kept_rows(config, self.data.sources)
        if self.kept_S is not None:
            self.data.keep(self.kept_S)
        self.sets = SetRecord(config)
        self.interactions = interactions_of(config, self.data)
        self.visits: ExampleVisits | None = None
        if config.bilevel.level == "example":
            path = Path(config.train.output) / VISITS_FILE
            self.visits = ExampleVisits(path, self.data.sources)

    def _training(self) -> ScaleBiO:
        config, data = self.config, self.data
        names = [source.name for source in data.sources]
        self.levels = [self._groups] if self._groups else levels_of(names)
        return ScaleBiO(
            config.bilevel.options(config.data.loss_mean),
            names,
            goals=goals_of(config),
            initial_weights=data.initial_weights(),
            constraints=constraints_of(config, data, config.bilevel.kl_to_prior),
            levels=core_levels(self.levels),
            **self.training_options(),
        )

    def settings(self) -> dict[str, Any]:
        bilevel = asdict(self.config.bilevel)
        return {
            **super().settings(),
            **{f"bilevel.{k}": v for k, v in bilevel.items() if k not in _JUDGING},
            **self._limits(),
        }

    def _limits(self) -> dict[str, Any]:
        """What the mixture keeps to; None where it is nothing, as in runs of earlier versions."""
        data, bilevel = self.config.data, self.config.bilevel
        bounds = [(source.low, source.high) for source in data.sources]
        digest = hashlib.sha256(repr(bounds).encode()).hexdigest()[:8]
        groups = {name: (group.low, group.high) for name, group in sorted(data.groups.items())}
        length = target(self.config)
        held = [(v.reference_loss, v.max_loss, v.max_loss_rise) for v in data.validation]
        return {
            "bilevel.kl_to_prior": bilevel.kl_to_prior or None,
            "bilevel.prior": (bilevel.prior or "natural") if bilevel.kl_to_prior else None,
            "data.target": length,
            "data.max_epochs": data.most_epochs if length else None,
            "data.matched_repetition": data.matched_repetition or None,
            "data.keep_ratios": data.keep_ratios or None,
            "bilevel.objective": bilevel.objective if bilevel.objective != "mean" else None,
            "bilevel.interactions": bilevel.interactions or None,
            "bilevel.level": bilevel.level if bilevel.level != "source" else None,
            "bounds of data.validation": held if set(held) - {(None,) * 3} else None,
            "bounds of data.sources": digest if set(bounds) - {(0.0, 1.0)} else None,
            "bounds of data.groups": groups or None,
        }

    def measure_start(self) -> None:
        """Takes the sets' losses at the start, unless a checkpoint had them. A collective."""
        if self.sets.is_needed:
            self.sets.start_V = self.sets.start_V or losses_of_sets(self)
            settle(self.training.goals, self.config.data.validation, self.sets.start_V)

    @property
    def validation_examples(self) -> float | None:
        """As many as would tell as much if each weighed alike, where sets weigh unequally."""
        share_V = self.sets.weights(self.training.goals, self.config).tolist()
        spread = sum(s**2 / len(v) for s, v in zip(share_V, self.data.validation, strict=True))
        return 1 / spread if spread else None

    def check_weights(self, *asked: Any) -> None:
        """After the last step; the models are not those of the run any more. A collective."""
        share_V = self.sets.weights(self.training.goals, self.config).tolist()
        weight_S = self.training.intervals().weight_S
        self.check = end_check(self, self.training, weight_S, share_V, *asked)

    @property
    def draw_SS(self) -> torch.Tensor | None:
        return self.check.draw_SS if self.check else None

    @property
    def lookalikes(self) -> list[list[int]] | None:
        return self.check.lookalikes if self.check else None

    def intervals(self) -> WeightIntervals:
        known = self.validation_examples, self.draw_SS, self.lookalikes
        return self.training.intervals(*known)

    def common_state(self) -> dict[str, Any]:
        fitted = {"interactions": self.interactions.state_dict()} if self.interactions else {}
        visited = {"visits": self.visits.state_dict()} if self.visits else {}
        grouped = {"groups": self._groups.group_S} if self._groups else {}
        return {
            **super().common_state(), "sets": self.sets.state_dict(),
            **fitted, **visited, **grouped,
        }  # fmt: skip

    def load_common_state(self, state: dict[str, Any]) -> None:
        if state.get("groups") != (self._groups.group_S if self._groups else None):
            raise UserError(
                "bilevel.group_sources: the checkpoint is of a run with other groups of sources, "
                "or with none (choose a new train.output, or the same group_sources)"
            )
        super().load_common_state(state)
        if "sets" in state:  # checkpoints of earlier versions have none
            self.sets.load_state_dict(state["sets"])
        if self.interactions and state.get("interactions"):
            self.interactions.load_state_dict(state["interactions"])
        if self.visits and state.get("visits"):
            self.visits.load_state_dict(state["visits"])

    def make_step(self) -> Record:
        return step_record(self, train_step(self))

    def converged(self) -> bool:
        return self.config.bilevel.early_stop and verdict(self).converged


def train_step(state: TrainState) -> StepReport:
    """One bilevel step of all ranks; advances `state` unless something was not finite or spiked."""
    bio, settings = state.training, state.schedule.at(state.step)
    unswung_V = swing_V = bio.goals.swing_V
    if state.interactions:
        state.interactions.begin_step(state.step, bio.memory)
        bio.goals.swing_V = swing_V = state.interactions.swing(state.step, bio.goals.shares_V)
    with state.clock("data"):
        train, valid, picks, valid_picks = state.data.next(
            bio.mixture.probs_S, bio.goals.shares_V.clamp_min(LEAST)
        )
    report = bio.step(
        train,
        valid,
        settings.lr_w,
        lr_u=settings.lr_u,
        lr_lambda=settings.lr_lambda,
        alpha=bio.grown_alpha(settings.alpha),
        inclusion=picks.inclusion_S,
        validation_inclusion=valid_picks.inclusion_S,
    )
    bio.goals.swing_V = unswung_V
    state.cost.trained += report.losses.tokens
    if report.skipped is None:
        state.sets.path.append(report.shares_V - swing_V)
        if state.visits and not bio.u_is_w:
            state.visits.append(report.step, report.losses, picks, report.weights_S.numpy())
        if state.interactions:
            excess_S = report.losses.w_S - report.losses.u_S
            inclusion_S = torch.from_numpy(picks.inclusion_S)
            state.interactions.append(
                report, hypergradient(excess_S, report.weights_S, inclusion_S, report.alpha)
            )
    return report


def step_record(state: TrainState, report: StepReport) -> Record:
    """A step's record; lists follow the order of sources and validation sets."""
    losses = report.losses
    # Of many sources no step is written as a list, and to make four of them takes time.
    held = torch.Tensor.tolist if len(losses.w_S) <= LISTED_SOURCES else torch.Tensor.numpy
    groups = coarse_weights(state.levels, report.weights_S)
    return {
        **({} if groups is None else {"group_weights": groups}),
        "step": report.step,
        "alpha": report.alpha,
        "outer_round": state.schedule.at(report.step - 1).outer_round,
        "lr_w": report.lr_w,
        "lr_u": report.lr_u,
        "lr_lambda": report.lr_lambda,
        "validation_loss": report.validation_loss,
        "validation_losses": losses.validation_V.tolist(),
        **({"validation_weights": report.shares_V.tolist()} if state.sets.is_needed else {}),
        "train_loss_w": report.train_loss_w,
        "train_loss_u": report.train_loss_u,
        "weights": held(report.weights_S),
        "loss_w": held(losses.w_S),
        "loss_u": held(losses.u_S),
        "excess_loss": held(losses.w_S - losses.u_S),
        "grad_norm_w": report.grad_norms["w"],
        "grad_norm_u": report.grad_norms["u"],
        "grad_norm_lambda": report.grad_norm_lambda,
        "tokens": losses.tokens,
        "memory_bytes": runtime.allocated_bytes(),
        "skipped": report.skipped and with_names(report.skipped, state),
        "active_layers": state.training.active_layers,
    }


def verdict(state: TrainState) -> Verdict:
    """Whether the weights have converged by now, and why."""
    constant = _is_constant(state.config)
    known = state.validation_examples, state.draw_SS, state.lookalikes
    judged = state.training.verdict(constant, *known)
    if judged.converged:
        against = _seen_too_often(state)
        # Once u remembers more steps than the check has, it is the run that sees further.
        if state.check and not against and state.training.memory == 1.0:
            tolerance = state.config.bilevel.tolerance
            against = state.check.objection(state.training.sources, tolerance)
        return Verdict(False, against) if against else judged
    enough = state.training.fewest_steps
    if constant and state.config.train.train_iters < enough < math.inf:
        more = f"set train_iters to {math.ceil(enough)} or more"
        return Verdict(False, f"{judged.reason} ({more})")
    return judged


def _is_constant(config: Config) -> bool:
    return config.bilevel.lr_lambda_decay_style == "constant"


def _seen_too_often(state: TrainState) -> str:
    """What models may have learned by heart, "" if nothing.

    Then the excess loss measures memory: weights that were right drift away from what validation
    wants, for ever slower, which looks like convergence.
    """
    data = state.data
    train, valid = data.sampler, data.validation_sampler
    # Kept rows are repeated as the final training will repeat them.
    used_S = (state.training.weights >= RESOLUTION) & (state.kept_S is None)
    passes = [*(train.drawn_S / train.sizes_S * used_S), *(valid.drawn_S / valid.sizes_S)]
    most = int(np.argmax(passes))
    if passes[most] <= MANY_PASSES:
        return ""
    name = [*data.sources, *data.validation][most].name
    return (
        f"{name} has been gone through {passes[most]:.0f} times: models may know it by heart, "
        "and its loss then tells of that (more data, or fewer steps)"
    )


def _facts(state: TrainState) -> dict[str, object]:
    config = state.config
    train, bilevel = config.train, config.bilevel
    length, unit = target(config), "examples" if config.data.target_examples else "tokens"
    repeated = f"{quantity(length)} {unit}, at most {config.data.most_epochs:g} passes of a source"
    former, groups = state.data.former, ", ".join(f"{len(g.names):,}" for g in state.levels)
    return {
        **({} if former is None else {"weights": former.described()}),
        **({"groups": f"{groups} above the sources"} if groups else {}),
        **goal_told(config),
        **({} if length is None else {"target": repeated}),
        **({} if state.kept_S is None else {"rows": _kept_told(state, state.kept_S)}),
        "steps": f"{train.train_iters} of {train.global_batch_size} training and "
        f"{train.validation_batch_size} validation sequences",
        "mixture": f"{bilevel.mixture_optimizer} lr {bilevel.lr_lambda:g}, alpha {bilevel.alpha:g}",
    }


def _kept_told(state: TrainState, kept_S: list[int]) -> str:
    """The sources of fewest rows first: those wear out."""
    pairs = sorted(zip(kept_S, state.data.sources, strict=True), key=lambda pair: pair[0])
    kept = [f"{source.name} {rows:,} of {len(source):,}" for rows, source in pairs]
    return f"the search repeats them as the final training will: {few(kept)}"
