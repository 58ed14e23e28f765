"""What `reweight` does: finds a mixture by ScaleBiO, or by the rival that `--method` names.

Every rival is a module with `find(config, begun) -> Found | None` (None: a signal stopped it, what
it has is saved, and the same command goes on).
"""

from __future__ import annotations

import importlib
from pathlib import Path

from megatron_scalebio import runtime
from megatron_scalebio.baselines import fixed
from megatron_scalebio.baselines.found import Found, write_found
from megatron_scalebio.config import Config
from megatron_scalebio.config_loader import config_text
from megatron_scalebio.data.sources import open_sources
from megatron_scalebio.errors import EXIT_OK, EXIT_SIGNALLED
from megatron_scalebio.logs.console import RunConsole, SourceLine
from megatron_scalebio.logs.records import METRICS_FILE
from megatron_scalebio.report.html import write_report
from megatron_scalebio.sample.inputs import SELECTED_FILE
from megatron_scalebio.train import outputs, reweight
from megatron_scalebio.train.start import begin

RIVALS = {
    "uniform": "fixed",
    "natural": "fixed",
    "manual": "fixed",
    "doremi": "doremi",
    "doge": "doge",
    "regmix": "regmix",
    "less": "less",
    "rho_loss": "rho_loss",
}


def run(config: Config) -> int:
    """A whole run of a valid configuration; its exit code."""
    method = config.baseline.method
    if method == "scalebio":
        return reweight.run(config)
    if method == "manual":
        fixed.require_weights(config)
    rival = importlib.import_module(f"megatron_scalebio.baselines.{RIVALS[method]}")
    with begin(config) as begun:
        found = rival.find(config, begun)
        if found is None:
            return EXIT_SIGNALLED
        runtime.on_main(lambda: _finish(config, found, begun.folder))
    return EXIT_OK


def _finish(config: Config, found: Found, folder: Path) -> None:
    sources = open_sources(config.data.sources, config, folder / "cache")
    outputs.write_text(folder / "config.yaml", config_text(config))
    content = write_found(folder, found, sources, config)
    shares = zip(sources, outputs.natural_shares(sources), found.initial_S, strict=True)
    lines = [SourceLine(s.name, len(s), s.tokens, natural, p) for s, natural, p in shares]
    places = {"weights": folder / "weights.json", "blend": folder / "blend.txt"}
    if found.selected_S is not None:
        places["selected"] = folder / SELECTED_FILE
    if (folder / METRICS_FILE).exists():  # it trained: there is something to draw
        places["report"] = write_report(folder)
    console = RunConsole(lines, config.train.train_iters, config.logging.log_interval)
    console.result(content, places, config.data.known_weights)
