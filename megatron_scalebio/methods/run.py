"""What `reweight` does: finds a mixture by ScaleBiO, or by the rival that `--method` names.

Every method is a module with `find(config, job) -> Found | None` (None: a signal stopped it, what
it has is saved, and the same command continues).
"""

import importlib
from pathlib import Path

from megatron_scalebio import runtime
from megatron_scalebio.config import Config
from megatron_scalebio.config_loader import config_text
from megatron_scalebio.data.blend_schedule import SCHEDULE_FILE
from megatron_scalebio.data.example_weights import EXAMPLE_WEIGHTS_FILE
from megatron_scalebio.data.sources import has_prompts
from megatron_scalebio.data.weights_file import SELECTED_FILE, WEIGHTS_FILE
from megatron_scalebio.engine import outputs
from megatron_scalebio.engine.start import Job, start_job
from megatron_scalebio.errors import EXIT_OK, EXIT_SIGNALLED, UserError
from megatron_scalebio.formatting import few
from megatron_scalebio.logs.console import RunConsole, SourceLine
from megatron_scalebio.logs.interactions import INTERACTION_FILE
from megatron_scalebio.logs.records import METRICS_FILE
from megatron_scalebio.methods import fixed
from megatron_scalebio.methods.bounds import refuse_bounds
from megatron_scalebio.methods.found import Found, write_found
from megatron_scalebio.methods.interactions import FEWEST_WINDOWS
from megatron_scalebio.report.html import write_report
from megatron_scalebio.report.learning import stood_still
from megatron_scalebio.report.load import load_run
from megatron_scalebio.whole_files import write_text

FIXED = ("uniform", "natural", "manual")  # the others have modules of their names


def find_mixture(config: Config) -> int:
    """A whole run of a valid configuration, resumed where there is one; its exit code."""
    method = config.baseline.method
    if method == "manual":
        fixed.require_weights(config)
    if method != "scalebio":
        refuse_bounds(config)
        if config.bilevel.level != "source":
            raise UserError(
                f"bilevel.level: {method} does not score single examples beside its weights (drop "
                "it, or use --method scalebio)"
            )
        if config.bilevel.group_sources is not None:
            raise UserError(f"bilevel.group_sources: {method} does not use groups (drop it)")
    name = "fixed" if method in FIXED else method
    module = importlib.import_module(f"megatron_scalebio.methods.{name}")
    with start_job(config) as job:
        found: Found | None = module.find(config, job)
        if found is not None:
            runtime.on_main(lambda: _finish(config, found, job))
    return EXIT_OK if found and found.complete else EXIT_SIGNALLED


def _finish(config: Config, found: Found, job: Job) -> None:
    """Writes the weights and the report, and says where everything is."""
    folder = job.folder
    write_text(folder / "config.yaml", config_text(config))
    content, left_out = write_found(folder, found, config)
    places = {"weights": folder / WEIGHTS_FILE, "blend": folder / "blend.txt"}
    if len(found.stages) > 1:
        places["schedule"] = folder / SCHEDULE_FILE
    if found.selected_S is not None:
        places["selected"] = folder / SELECTED_FILE
    still = ""
    if (folder / METRICS_FILE).exists():  # it trained: there is something to draw
        places["report"] = write_report(folder)
        still = stood_still(load_run(folder).history)
        places["tensorboard"] = Path(config.logging.tensorboard_dir or folder / "tensorboard")
    natural = outputs.natural_shares(found.sources)
    shares = zip(found.sources, natural, found.initial_S, strict=True)
    lines = [SourceLine(s.name, len(s), s.tokens, share, p) for s, share, p in shares]
    console = RunConsole(lines, config.train.train_iters, config.logging.log_interval)
    if found.interaction is not None:
        places["interaction"] = folder / INTERACTION_FILE
        console.interaction(found.interaction, found.weight_S)
    elif config.bilevel.interactions:
        console.warn(
            f"interactions: too few steps to estimate them ({FEWEST_WINDOWS} resets or more)"
        )
    if "example_scores" in content:
        places["examples"] = folder / EXAMPLE_WEIGHTS_FILE
        console.note(content["example_scores"]["told"])
    console.result(content, places, config.data.known_weights)
    for change in content.get("settings_changed", []):
        console.warn(f"learned with other settings {change}")
    if still and found.complete:
        console.warn(still)
    if any(map(has_prompts, found.sources)):
        console.note(
            "Megatron-LM reads blend.txt packed and without loss masks, so that prompts train too; "
            "`megatron-scalebio train` trains on what the weights were learned for"
        )
    if job.trackers and (lost := job.trackers.finish()):
        console.warn(lost)
    if left_out:
        floor = outputs.blend_floor(config)
        console.warn(
            f"weight below {floor:g}, on which Megatron-LM may fail; left out of blend.txt and "
            f"blend.json: {few(left_out)}; `sample` and `train` still draw by their weights"
        )
