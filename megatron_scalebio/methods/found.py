"""What every method of finding a mixture ends in, and how it is written.

    weights.json    intervals and a verdict are ScaleBiO's alone
    blend.txt, blend.json
    blend_schedule.json  the mixtures that ScaleBiO went through
    interaction.npz which source serves which validation set, where that was asked for
    example_weights.npz  a score of every example, where that was asked for (methods/scalebio.py)
    selected.json   of methods that choose examples: which ones, per source

`sample` takes both files: it draws by the weights, from the selected examples alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_scalebio.config import Config
from megatron_scalebio.data.sources import Source
from megatron_scalebio.data.weights_file import SELECTED_FILE
from megatron_scalebio.engine import outputs
from megatron_scalebio.engine.epochs import epochs, target_examples
from megatron_scalebio.engine.state import TokenCost
from megatron_scalebio.logs.interactions import Interaction
from megatron_scalebio.methods.bounds import BOUNDED
from megatron_scalebio.mixture.confidence import Verdict
from megatron_scalebio.whole_files import write_json


@dataclass(frozen=True)
class Found:
    """The outcome of a method.

    Attributes:
        sources: what the weights are of.
        weight_S: weights of the sources, adding up to 1.
        initial_S: those it began with.
        cost: what went through models until then.
        step: training steps of its last model.
        complete: the method came to its end; otherwise these are the weights so far.
        low_S, high_S: the weights' intervals; None: the method has none.
        verdict: whether they have converged, and why; None: the method can't tell.
        at_bound_S: the bound that holds each weight: "fixed", "min", "max", or none; None: it has
            no bounds.
        kept_S: rows of each source that were offered; None: all.
        selected_S: chosen examples of each source, indices, ascending; None: it chooses none.
        stages: mixtures of a training, each from its step on, where the method has them.
        interaction: which source serves which validation set; None: not asked for, or not known.
        remarks: what speaks against trusting the weights.
        details: what else a reader may want, by name; goes into weights.json.
    """

    sources: Sequence[Source]
    weight_S: list[float]
    initial_S: list[float]
    cost: TokenCost = field(default_factory=TokenCost)
    step: int = 0
    complete: bool = True
    low_S: list[float] | None = None
    high_S: list[float] | None = None
    verdict: Verdict | None = None
    at_bound_S: list[str | None] | None = None
    kept_S: list[int] | None = None
    selected_S: list[list[int]] | None = None
    stages: list[tuple[int, list[float]]] = field(default_factory=list)
    interaction: Interaction | None = None
    remarks: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


def write_found(folder: Path, found: Found, config: Config) -> tuple[dict[str, Any], list[str]]:
    """Writes everything.

    Returns:
        The content of weights.json; the sources that the blend leaves out (`write_weights`).
    """
    method = config.baseline.method
    if found.selected_S is not None:
        chosen = zip(found.sources, found.selected_S, strict=True)
        write_json(
            folder / SELECTED_FILE,
            {
                "method": method,
                "sources": [
                    {"name": s.name, "path": s.prefix, "fingerprint": s.fingerprint, "taken": rows}
                    for s, rows in chosen
                ],
            },
        )
    if found.stages:
        outputs.write_schedule(folder, found.sources, found.stages, config)
    if found.interaction is not None:
        found.interaction.write(folder)
    verdict = found.verdict or Verdict(
        False, "; ".join([f"{method} gives no intervals", *found.remarks])
    )
    nothing = [None] * len(found.sources)
    columns = zip(
        found.sources, found.weight_S, found.low_S or nothing, found.high_S or nothing,
        found.initial_S, strict=True,
    )  # fmt: skip
    entries: list[dict[str, Any]] = [
        {
            "name": source.name,
            "path": source.prefix,
            "examples": len(source),
            "weight": weight,
            "ci_low": low,
            "ci_high": high,
            "initial_weight": initial,
        }
        for source, weight, low, high, initial in columns
    ]
    passes = epochs(config, found.sources, found.weight_S)
    target: dict[str, Any] = {}
    if passes is not None:
        examples = target_examples(config, found.sources, found.weight_S)
        target["target_examples"] = round(examples or 0)
        if method in BOUNDED:
            target["max_epochs"] = config.data.most_epochs
        for entry, times in zip(entries, passes, strict=True):
            entry["epochs"] = times
    for entry, rows in zip(entries, found.kept_S or (), strict=False):
        entry["rows_kept"] = rows
    for entry, bound in zip(entries, found.at_bound_S or (), strict=False):
        entry["bound"] = bound
    content = {
        "method": method,
        "step": found.step,
        "complete": found.complete,
        "converged": verdict.converged,
        "reason": verdict.reason,
        "cost": outputs.cost_entry(found.cost),
        **found.details,
        **target,
        "sources": entries,
    }
    return content, outputs.write_weights(folder, content, found.sources, config)


def normalised(values: Sequence[float]) -> list[float]:
    """Non-negative numbers as shares of their sum."""
    whole = sum(values)
    return [value / whole for value in values]
