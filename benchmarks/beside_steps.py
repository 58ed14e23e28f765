"""What a rank on a CPU costs beside its steps: its start, idle groups, the checkpoints' manager.

The rank's own process imports what it needs only in `main`, as that of the command does: the
manager is spawned, and would import it again.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

IDLE_S = 10.0
ROUNDS = 3
IMPORTS = """
import gc, time
from contextlib import nullcontext
from megatron_scalebio.compat import adapt, light_imports
with {}():
    import megatron_scalebio.methods.run
adapt()
spent = time.process_time()
gc.collect()
print(spent, time.process_time() - spent)
"""


def imports() -> None:
    """Of one process, with the block that the commands import in and without it, in turns."""
    blocks = ("nullcontext", "light_imports")
    found: dict[str, list[list[float]]] = {block: [] for block in blocks}
    for block in blocks * ROUNDS:
        words = [sys.executable, "-W", "ignore", "-c", IMPORTS.format(block)]
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        found[block].append([float(value) for value in said.split()])
    for block, rounds in found.items():
        spent, collected = (statistics.median(values) for values in zip(*rounds, strict=True))
        print(f"imports ({block}): {spent:.1f} s of CPU; then gc.collect(): {collected:.2f} s")


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `tests.markov`

    imports()
    from megatron_scalebio import runtime
    from megatron_scalebio.cli import main as command
    from megatron_scalebio.config_loader import load_config
    from tests.markov import write_two_sources

    runtime.start(load_config(None, {}))
    threads, before = psutil.Process().num_threads(), time.process_time()
    time.sleep(IDLE_S)
    share = (time.process_time() - before) / IDLE_S
    print(f"groups that do nothing: {share:.1%} of a core, {threads} threads")
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nowhere:
        folder = Path(name)
        steps = {"train_iters": 3, "global_batch_size": 4, "micro_batch_size": 2}
        config = write_two_sources(folder, train=steps, checkpoint={"save_interval": 1})
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            assert command(["reweight", "--config", str(config), "--output", f"{name}/run"]) == 0
        for each in psutil.Process().children():
            if "spawn_main" in " ".join(each.cmdline()):
                spent, held = each.cpu_times(), each.memory_full_info()
                print(
                    f"manager of a checkpoint's writers: {spent.user + spent.system:.1f} s of CPU, "
                    f"{held.rss / 2**20:.0f} MiB, {held.uss / 2**20:.0f} of them not shared"
                )


if __name__ == "__main__":
    main()
