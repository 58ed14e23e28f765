#!/usr/bin/env python
"""Changes the library in one place at a time, runs its tests, and lists the changes none notices.

    tools/mutants.py [--module core/flush.py ...] [--lines 40-80] [--jobs 2] [--output mutants]

`mutations.py` says which changes. mutmut, whose operators it uses, can't run them here: it changes
neither a module's constants nor decorated functions, and sees no test that runs in ranks.

pyproject.toml names the modules with their tests, quick ones first, and what is left out and why
([tool.mutants]). Each change is tried in a process forked from one that has imported torch,
Megatron and pytest, and nothing of the package; ranks are forked from that in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import importlib.abc
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mutations import Change, changes_of

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_scalebio"
MOST_SURVIVORS = 0.05  # a share: with more, the exit code is 1
CPU_LIMIT_S = 90  # several times what the slowest tests take
LIMIT_S = 600.0  # a change that takes longer is noticed: `make test` would hang


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Gives the changed text of one file to whoever imports it."""

    def __init__(self, path: Path, code: str) -> None:
        self.path, self.text = path.absolute(), code
        self.name = ".".join(path.with_suffix("").parts)

    def find_spec(self, name: str, *_: Any) -> Any:
        if name == self.name:
            return importlib.util.spec_from_loader(name, self, origin=str(self.path))
        return None

    def get_filename(self, name: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return self.text.encode()

    def path_stats(self, path: str) -> Any:
        raise OSError  # never from, nor into, a file of byte code


def run_tests(tests: list[str], times: Path, path: Path | None = None, code: str = "") -> int:
    """pytest's exit code, in this process, of tests of the package with one file changed."""
    import hypothesis
    import pytest
    import torch.multiprocessing as mp

    if path is not None:
        sys.meta_path.insert(0, _Changed(path, code))
    hypothesis.settings.register_profile(
        "mutants", derandomize=True, database=None, max_examples=25,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )  # fmt: skip
    hypothesis.settings.load_profile("mutants")
    start = mp.start_processes  # ranks must hold the change as well

    def forked(*args: Any, start_method: str = "", **options: Any) -> Any:
        return start(*args, start_method="fork", **options)

    mp.start_processes = forked
    options = ["-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", "-p", "no:warnings"]
    return int(pytest.main([*options, *tests], plugins=[_QuickFirst(times)]))


class _QuickFirst:
    """Sorts tests by the time they took without a change, which it notes if that is not known."""

    def __init__(self, times: Path) -> None:
        self.times = times
        self.known = json.loads(times.read_text()) if times.exists() else {}
        self.took: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.known.get(item.nodeid, 0.0))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.took[report.nodeid] = self.took.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        if not self.known:
            self.times.write_text(json.dumps(self.took))


def in_fork(work: partial[int]) -> int:
    """The id of a forked process that works in silence and ends with what the work returns."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    log = os.open(os.environ.get("MUTANTS_LOG", os.devnull), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        code = work()
    except BaseException:  # noqa: BLE001  nothing may get past here
        traceback.print_exc()
    finally:
        os._exit(code)


def outcomes(works: list[partial[int]], jobs: int) -> Iterator[tuple[int, int | None]]:
    """The number of each work and its exit code, None past LIMIT_S, as they end."""
    waiting = list(enumerate(works))[::-1]
    running: dict[int, tuple[int, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, work = waiting.pop()
                running[in_fork(work)] = (number, time.monotonic() + LIMIT_S)
            time.sleep(0.02)
            for pid, (number, deadline) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done or time.monotonic() > deadline:
                    del running[pid]
                    end(pid)
                    yield number, os.waitstatus_to_exitcode(status) if done else None
    finally:
        for pid in running:
            end(pid)


def end(pid: int) -> None:
    """Ends a forked process, and the ranks it may have left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def warm_up(tests: list[str]) -> None:
    """Imports what the package and its tests import of others."""
    listing = (
        "import sys, importlib; sys.path.insert(0, '.')\n"
        f"for name in {[t.removesuffix('.py').replace('/', '.') for t in tests]}:\n"
        "    importlib.import_module(name)\n"
        f"import {PACKAGE}.methods.scalebio\n"
        "print('\\n'.join(sys.modules))"
    )
    warnings.simplefilter("ignore")
    command = [sys.executable, "-W", "ignore", "-c", listing]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    for name in done.stdout.split():
        if name.split(".")[0] not in (PACKAGE, "tests", "__main__", "__mp_main__"):
            with contextlib.suppress(Exception):  # then it is imported where it is needed
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is not looked at is not copied in forks


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--module", nargs="*", default=[], help="these alone")
    parser.add_argument("--lines", default="1-99999", help="changes in these lines alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=ROOT / "mutants")
    parser.add_argument("--list", action="store_true", help="show the changes, run nothing")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]
    first, last = map(int, arguments.lines.split("-"))
    modules = {
        name: [str(test) for test in tests]
        for name, tests in settings["tests"].items()
        if not arguments.module or name in arguments.module
    }
    planned: list[tuple[str, Change]] = []
    for name in modules:
        for change in changes_of(Path(PACKAGE) / name):
            if first <= change.line <= last and not left_out(change, settings["leave_out"]):
                planned.append((name, change))
    if arguments.list:
        print("\n".join(str(change) for _, change in planned))
        return 0
    warm_up(sorted({test for tests in modules.values() for test in tests}))
    with tempfile.TemporaryDirectory() as folder:
        times = {name: Path(folder) / f"{i}.json" for i, name in enumerate(modules)}
        unchanged = [partial(run_tests, tests, times[name]) for name, tests in modules.items()]
        for number, code in outcomes(unchanged, arguments.jobs):
            if code != 0:
                print(f"the tests of {list(modules)[number]} fail without any change: {code}")
                return 1
        works = [partial(_try, change, modules[name], times[name]) for name, change in planned]
        start = time.monotonic()
        codes: dict[int, int | None] = {}
        for number, code in outcomes(works, arguments.jobs):
            codes[number] = code
            if len(codes) % 25 == 0:
                print(f"{len(codes)} of {len(works)}", file=sys.stderr, flush=True)
    report(list(modules), planned, codes, time.monotonic() - start, arguments.output)
    return int(list(codes.values()).count(0) > MOST_SURVIVORS * len(codes))


def _try(change: Change, tests: list[str], times: Path) -> int:
    return run_tests(tests, times, change.path, change.code())


def left_out(change: Change, rules: list[dict[str, str]]) -> bool:
    """Whether all that one of the rules says fits a change."""
    name = str(change.path.relative_to(PACKAGE))
    text = f"{change.before} → {change.after}"
    return any(
        fnmatch.fnmatch(name, rule.get("module", "*"))
        and ("within" not in rule or rule["within"] in change.within)
        and re.search(rule.get("change", ""), text)
        for rule in rules
    )


def report(
    modules: list[str],
    planned: list[tuple[str, Change]],
    codes: dict[int, int | None],
    took_s: float,
    folder: Path,
) -> None:
    """Prints the table and the survivors, and leaves them in the folder with every outcome."""
    lines = [f"{'module':26}{'mutants':>9}{'killed':>8}{'survived':>10}{'share':>8}"]
    for module in (*modules, "all"):
        its = [codes[i] for i, (name, _) in enumerate(planned) if module in (name, "all")]
        alive = its.count(0)
        lines.append(
            f"{module:26}{len(its):9}{len(its) - alive:8}{alive:10}{alive / max(len(its), 1):8.1%}"
        )
    survivors = [str(change) for number, (_, change) in enumerate(planned) if codes[number] == 0]
    lines += ["", *survivors, "", f"{took_s:.0f} s"]
    print("\n".join(lines))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text("\n".join(lines) + "\n")
    every = [[str(change), codes[number]] for number, (_, change) in enumerate(planned)]
    (folder / "all.json").write_text(json.dumps(every, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
