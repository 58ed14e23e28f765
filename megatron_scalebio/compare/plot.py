"""The picture of a comparison: held-out loss and cost of every method, and its weights."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from megatron_scalebio.compare.tables import largest

SOURCES_SHOWN = 10
HATCHES = ("", "//", "..", "\\\\", "||", "--", "xx", "++", "oo", "**")  # told apart in grey, too
UNDATED: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}}


def draw(comparison: dict[str, Any], path: Path, kind: str) -> None:
    """Draws it into a PNG or PDF: test loss (each seed a dot) left, mean weights right."""
    methods = comparison["methods"][::-1]
    names = [method["name"] for method in methods]
    figure, (losses, weights) = pyplot.subplots(
        1, 2, figsize=(11, 1.2 + 0.45 * len(methods)), sharey=True, layout="constrained"
    )
    for row, method in enumerate(methods):
        mean, sd = method["test_loss"]["mean"], method["test_loss"]["sd"] or 0.0
        losses.errorbar(mean, row, xerr=sd, fmt="o", color="#1b4f72", capsize=4)
        seeds = [run["test_loss"] for run in method["runs"]]
        losses.plot(seeds, [row - 0.22] * len(seeds), ".", color="#7f8c8d", markersize=6)
    losses.set_yticks(range(len(methods)), names)
    losses.ticklabel_format(axis="x", useOffset=False)
    losses.set_xlabel("test loss (nats), mean ± sd; grey: each seed")
    losses.grid(axis="x", alpha=0.3)
    start = [0.0] * len(methods)
    for number, source in enumerate(largest(comparison, SOURCES_SHOWN)):
        shares = [method["weights"][source]["mean"] for method in methods]
        colour = matplotlib.colormaps["tab10"](number % 10)
        weights.barh(
            range(len(methods)), shares, left=start, label=source, color=colour,
            hatch=HATCHES[number], edgecolor="white",
        )  # fmt: skip
        start = [a + b for a, b in zip(start, shares, strict=True)]
    rest = [1.0 - value for value in start]
    if max(rest) > 1e-6:
        weights.barh(range(len(methods)), rest, left=start, label="others", color="#d5d8dc")
    weights.set_xlabel("weights, mean over seeds")
    weights.set_xlim(0, 1)
    weights.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    figure.savefig(path, dpi=150, format=kind, metadata=UNDATED[kind])
    pyplot.close(figure)
