"""What a run shows in the terminal: a banner, its progress, and the result as a table.

On a terminal the progress is a live bar; elsewhere (a SLURM log) a plain line every `log_interval`
steps, and every minute where steps are slow.
"""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from megatron_scalebio.formatting import duration, pace, percent, printable, quantity, shorten
from megatron_scalebio.logs.interactions import Interaction

ROWS_SHOWN = 15
SETS_SHOWN = 8
TOP_SHOWN = 3
TOP_NAME_CHARS = 16
LIVE_REFRESH_S = 0.25
LINE_EVERY_S = 60.0


@dataclass(slots=True)
class SourceLine:
    """A source as the banner and the result table show it; shares are fractions of 1."""

    name: str
    examples: int
    tokens: int
    natural: float
    initial: float


class RunConsole:
    """Terminal output of one run. For rank 0 alone.

    Args:
        sources: in the order of the records' "weights".
        train_iters: steps of the whole run.
        log_interval: steps between plain lines, which also come every minute.
        console: where to write [stderr].
    """

    def __init__(
        self,
        sources: Sequence[SourceLine],
        train_iters: int,
        log_interval: int = 10,
        console: RichConsole | None = None,
    ) -> None:
        self.console = console or RichConsole(stderr=True, highlight=False)
        self._sources = list(sources)
        self._train_iters = train_iters
        self._log_interval = log_interval
        self._recent_s: deque[float] = deque(maxlen=50)
        self._progress: Progress | None = None
        self._drawn_at = -math.inf

    def banner(self, facts: Mapping[str, object]) -> None:
        """Shows the sources, then one line a fact (model, layout, steps, output ...)."""
        table = _table("source", "examples", "tokens", "natural", "initial")
        shown = sorted(self._sources, key=lambda source: -source.tokens)[:ROWS_SHOWN]
        for source in shown:
            table.add_row(
                plain(source.name), f"{source.examples:,}", quantity(source.tokens),
                percent(source.natural), percent(source.initial),
            )  # fmt: skip
        self.console.print(table)
        self._note_hidden(len(self._sources) - len(shown))
        self.places(facts)

    def start(self, step: int = 0) -> None:
        """Begins the progress display, at the step that the run resumes from."""
        if not self.console.is_terminal:
            return
        digits = 2 * len(str(self._train_iters)) + 1
        self._progress = Progress(
            BarColumn(bar_width=16, table_column=Column(min_width=10)),
            TextColumn("{task.completed}/{task.total}", table_column=Column(min_width=digits)),
            TextColumn("{task.fields[status]}", markup=False),
            console=self.console,
            auto_refresh=False,  # redrawn from `step`: no thread to take time from the training
        )
        self._progress.start()
        self._progress.add_task("", total=self._train_iters, completed=step, status="")

    def step(self, record: Mapping[str, Any]) -> None:
        """Shows one step, a record of metrics.jsonl: live, or as a line every `log_interval`."""
        step = int(record["step"])
        self._recent_s.append(float(record["step_time_s"]))
        if record.get("skipped"):
            self.warn(f"step {step} was not applied: {record['skipped']}")
        if self._progress is not None:
            now = time.monotonic()
            if now - self._drawn_at < LIVE_REFRESH_S and step < self._train_iters:
                return
            self._drawn_at = now
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=step, status=self._status(record))
            self._progress.refresh()
        elif (
            len(self._recent_s) == 1  # the first one tells how long the others will take
            or step % self._log_interval == 0
            or step == self._train_iters
            or time.monotonic() - self._drawn_at >= LINE_EVERY_S
        ):
            self._drawn_at = time.monotonic()
            self._print(f"step {step}/{self._train_iters}  {self._status(record)}")

    def warn(self, message: str) -> None:
        """One line of warning, above the bar where there is one."""
        self._print(Text("warning: ", style="yellow"), plain(message))

    def stop(self) -> None:
        """Ends the progress display; harmless if there is none."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def result(
        self,
        weights: Mapping[str, Any],
        outputs: Mapping[str, Path],
        known: Mapping[str, float] | None = None,
    ) -> None:
        """Shows the learned weights with their intervals, and where everything lies.

        Args:
            weights: the content of weights.json.
            outputs: what each path is, e.g. {"report": Path("run/report.html")}.
            known: the true mixture, where the configuration gives it.
        """
        self.stop()
        confidence = f"{100 * float(weights.get('confidence', 0.95)):.0f}% interval"
        table = _table(
            "source", "weight", confidence, "initial", "natural", *(["known"] if known else []),
            *(["epochs"] if "epochs" in weights["sources"][0] else []),
        )  # fmt: skip
        natural = {source.name: source.natural for source in self._sources}
        ranked = sorted(weights["sources"], key=lambda entry: -entry["weight"])
        for entry in ranked[:ROWS_SHOWN]:
            name = entry["name"]
            row: list[str | Text] = [
                plain(name), _weight(entry), _interval(entry),
                percent(entry["initial_weight"]), percent(natural.get(name)),
            ]  # fmt: skip
            if known:
                row.append(percent(known.get(name, 0.0)))
            if "epochs" in entry:
                row.append(f"{entry['epochs']:.2g}")
            table.add_row(*row)
        self.console.print(table)
        self._note_hidden(len(ranked) - ROWS_SHOWN)
        if weights.get("validation"):
            self._sets(weights["validation"])
        if known:
            distance = sum(abs(e["weight"] - known.get(e["name"], 0.0)) for e in ranked)
            self._print(
                f"distance from the known mixture: {distance:.3f} (sum of absolute differences)"
            )
        if weights.get("groups"):
            self._groups(weights, confidence)
        if "confidence" in weights:  # of methods that can tell
            of = f"{len(ranked):,} sources, " if weights.get("groups") else ""
            self._verdict(weights, of)
        self.places(outputs)

    def interaction(self, found: Interaction, weights: Sequence[float]) -> None:
        """Which source serves which validation set: of the heaviest sources, what is sure."""
        names, scaled, sure = found.validation[:SETS_SHOWN], found.scaled, found.sure
        table = _table("source serves set", *(shorten(printable(name), 16) for name in names))
        for i in np.argsort(-np.asarray(weights), kind="stable")[:ROWS_SHOWN]:
            shown = zip(scaled[i, : len(names)], sure[i], strict=False)
            cells = (f"{value:+.2f}" if known else "·" for value, known in shown)
            table.add_row(plain(str(found.sources[i])), *cells)
        self.console.print(table)
        self._print(Text("1: largest; below 0: harms; ·: not distinguishable from 0", style="dim"))

    def _sets(self, sets: Sequence[Mapping[str, Any]]) -> None:
        """Validation sets: weights, losses at the start and at the end, what these are held to."""
        table = _table("validation set", "weight", "loss at start", "loss", "compared with")
        for entry in sets[:ROWS_SHOWN]:
            held, reference = entry.get("max_loss"), entry.get("reference_loss")
            table.add_row(
                plain(entry["name"]), percent(entry["weight"]), f"{entry['start_loss']:.4f}",
                "–" if entry["loss"] is None else f"{entry['loss']:.4f}",
                f"at most {held:.4f}" if held is not None
                else "–" if reference is None else f"{reference:.4f}",
            )  # fmt: skip
        self.console.print(table)
        self._note_hidden(len(sets) - ROWS_SHOWN, "validation sets")

    def _groups(self, weights: Mapping[str, Any], confidence: str) -> None:
        """The heaviest groups of each level, and whether the level has converged."""
        for level in weights["levels"]:
            of_level = [g for g in weights["groups"] if g["level"] == level["level"]]
            table = _table("group", "weight", confidence)
            for entry in sorted(of_level, key=lambda entry: -entry["weight"])[:ROWS_SHOWN]:
                table.add_row(plain(entry["name"]), _weight(entry), _interval(entry))
            self.console.print(table)
            self._note_hidden(len(of_level) - ROWS_SHOWN, "groups")
            self._verdict(level, f"{len(of_level):,} groups, ")

    def _verdict(self, weights: Mapping[str, Any], of: str = "") -> None:
        converged = bool(weights["converged"])
        verdict = Text(
            "converged" if converged else "not converged", style="green" if converged else "yellow"
        )
        self._print(of, verdict, plain(f": {weights.get('reason', '')}"))

    def stopped(self, step: int) -> None:
        """Says that a signal ended the run, and that nothing is lost."""
        self.stop()
        self.warn(
            f"stopped by a signal, saved at step {step}; the same command continues from there"
        )

    def note(self, line: str) -> None:
        """One line that stays, above the bar where there is one."""
        self._print(plain(line))

    def losses(self, sets: Sequence[Mapping[str, Any]]) -> None:
        """Shows held-out losses, `HeldOutLoss.as_dict` of each set."""
        table = _table("held-out set", "examples", "loss", "per token", "perplexity")
        for entry in sets:
            table.add_row(
                plain(entry["name"]), f"{entry['examples']:,}", f"{entry['sample_mean']:.4f}",
                f"{entry['token_mean']:.4f}", f"{entry['perplexity']:.5g}",
            )  # fmt: skip
        self.console.print(table)

    def places(self, outputs: Mapping[str, object]) -> None:
        """One line for each thing that was written, or fact."""
        width = max((len(name) for name in outputs), default=0)
        for name, value in outputs.items():
            self._print(Text(f"{name:<{width}}  ", style="dim"), plain(str(value)))

    def _status(self, record: Mapping[str, Any]) -> str:
        loss = record.get("validation_loss")
        usual_s = median(self._recent_s)
        left = duration(round(usual_s * (self._train_iters - int(record["step"]))))
        parts = [f"ETA {left}", pace(usual_s)]
        if loss is None or "weights" not in record:
            parts.insert(0, f"loss {record['train_loss_w']:.4f}")
        else:
            parts.insert(0, f"validation {loss:.3f}" if math.isfinite(loss) else "validation –")
        # The weights come last: a narrow terminal cuts off the end.
        if "weights" in record:
            groups = record.get("group_weights") or {}
            names = list(groups) or [source.name for source in self._sources]
            parts.append(_top_weights(names, list(groups.values()) or record["weights"]))
        return "  ".join(parts)

    def _note_hidden(self, count: int, what: str = "sources") -> None:
        if count > 0:
            self._print(Text(f"... and {count:,} more {what}", style="dim"))

    def _print(self, *parts: str | Text) -> None:
        self.console.print(Text.assemble(*parts), soft_wrap=True)


def _top_weights(names: Sequence[str], weights: Sequence[float]) -> str:
    top = np.argsort(-np.asarray(weights), kind="stable")[:TOP_SHOWN].tolist()
    shown = [shorten(printable(names[i]), TOP_NAME_CHARS) for i in top]
    shares = [f"{100 * weights[i]:.0f}%" for i in top]
    return ", ".join(f"{name} {share}" for name, share in zip(shown, shares, strict=True))


def _weight(entry: Mapping[str, Any]) -> str:
    """With the bound that holds it, if one does."""
    return percent(entry["weight"]) + (f" ({entry['bound']})" if entry.get("bound") else "")


def _interval(entry: Mapping[str, Any]) -> str:
    if entry["ci_low"] is None:
        return "–"
    return f"{percent(entry['ci_low'])} – {percent(entry['ci_high'])}"


def plain(text: str) -> Text:
    """Text that the terminal shows and never obeys: no markup, no control characters."""
    return Text(printable(text))


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column(columns[0], max_width=40, overflow="ellipsis", no_wrap=True)
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table
