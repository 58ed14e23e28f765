"""A SLURM of two nodes on this machine: munged, slurmctld and two slurmd, all in one folder.

The nodes are called by loopback addresses, so that the names SLURM hands to a job resolve on any
machine without an entry in /etc/hosts.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.commands import ROOT
from tests.ports import free_ports

NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")

CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits this long, 120 s by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# No cgroups, no systemd, no accounting.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# A lost node is noticed within seconds, and serves again as soon as its slurmd does.
SlurmdTimeout=6
ReturnToService=2
KillWait=60
# Whatever cores this machine has.
SlurmdParameters=config_overrides
MinJobAge=600
SchedulerParameters=sched_interval=2,batch_sched_delay=0
GresTypes=gpu
PartitionName=tests Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeAddr={name} NodeHostname={host} Port={port} CPUs=4 Gres=gpu:2\n"
# Two GPUs a node that jobs can ask for; nothing opens them.
GRES = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


def why_not() -> str | None:
    """What keeps SLURM from starting here, or None."""
    missing = [program for program in PROGRAMS if find(program) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd needs root"


def find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def wait_until(
    what: str,
    true: Callable[[], object],
    timeout_s: float = 60,
    why: Callable[[], str] = str,
) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}\n{why()}"
        time.sleep(0.1)


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        host = socket.gethostname().partition(".")[0]
        ctld_port, *ports = free_ports(1 + len(NODES))
        text = CONF.format(host=host, folder=self.folder, ctld_port=ctld_port)
        for name, port in zip(NODES, ports, strict=True):
            text += NODE.format(name=name, host=host, port=port)
            (self.folder / f"spool-{name}").mkdir()
        (self.folder / "state").mkdir()
        self.conf.write_text(text)
        (self.folder / "gres.conf").write_text(GRES)
        self._start_munge()
        self._start("slurmctld", "-D", "-f", str(self.conf))
        for name in NODES:
            self.start_node(name)
        both_idle = ["idle"] * len(NODES)
        wait_until("idle nodes", lambda: self.node_states() == both_idle, 30, self.complaints)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": self.folder / "munge.socket"}
        for kind in ("log", "pid", "seed"):
            files[f"{kind}-file"] = self.folder / f"munge.{kind}"
        flags = [f"--{name}={path}" for name, path in files.items()]
        # --force: munged dislikes sockets under a folder that only root may enter.
        self._start("munged", "--foreground", "--force", *flags)
        wait_until("munge", (self.folder / "munge.socket").exists)

    def _start(self, program: str, *arguments: str, name: str | None = None) -> None:
        path = find(program)
        assert path
        log = (self.folder / f"{name or program}.stderr").open("ab")
        # setpriv: whatever ends pytest, SIGKILL included, ends the daemons.
        self.daemons[name or program] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", path, *arguments], env=self.environment(),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    def environment(self, **more: str) -> dict[str, str]:
        """What a user of this cluster has in the shell, whichever cluster pytest runs on."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        own |= {"SLURM_CONF": str(self.conf), "PYTHONPATH": str(ROOT)}
        # The activated environment: megatron-scalebio and torchrun are beside this python.
        own["PATH"] = f"{Path(sys.executable).parent}:{own.get('PATH', '')}"
        own.pop("OMP_NUM_THREADS", None)  # reweight.sbatch's own
        return own | more

    def start_node(self, name: str) -> None:
        self._start("slurmd", "-D", "-N", name, "-f", str(self.conf), name=f"slurmd-{name}")

    def kill_node(self, name: str) -> None:
        """Ends everything of a node at once, as a power failure does."""
        self.daemons[f"slurmd-{name}"].kill()
        for process in self.processes():
            if process.environment.get("SLURMD_NODENAME") == name:
                process.kill_with_parent()
        self.daemons.pop(f"slurmd-{name}").wait()

    def processes(self) -> Iterator[Process]:
        """The processes of this cluster's jobs."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                process = Process(int(entry.name))
                if process.environment.get("SLURM_CONF") == str(self.conf):
                    yield process

    def stop(self) -> None:
        if self.daemons.get("slurmctld"):
            self.run("scancel", "--user=root", check=False)
        for daemon in self.daemons.values():
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
        for process in self.processes():
            process.kill_with_parent()

    def complaints(self) -> str:
        """What the daemons have said so far."""
        return "\n".join(path.read_text() for path in self.folder.glob("*.stderr"))

    def run(
        self, *command: object, cwd: Path | None = None, check: bool = True, **environment: str
    ) -> str:
        """Runs a command as a user would and gives what it wrote."""
        done = subprocess.run(
            [str(word) for word in command], env=self.environment(**environment), cwd=cwd,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}"
        return done.stdout

    def node_states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()

    def submit(self, *arguments: object, cwd: Path, **environment: str) -> Job:
        """sbatch, on one core of each of two nodes unless said otherwise."""
        words = ("sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", *arguments)
        return Job(self, self.run(*words, cwd=cwd, **environment).strip(), cwd)


class Job:
    def __init__(self, cluster: Cluster, job_id: str, folder: Path) -> None:
        self.cluster, self.id, self.folder = cluster, job_id, folder

    def __getitem__(self, field: str) -> str:
        """A field of `scontrol show job`."""
        words = self.cluster.run("scontrol", "show", "job", "--oneliner", self.id).split()
        return dict(word.partition("=")[::2] for word in words)[field]

    def wait_for(self, *states: str, timeout_s: float = 300) -> str:
        """Waits until the job is in one of `states`; fails when it ends in another."""
        deadline = time.monotonic() + timeout_s
        while (state := self["JobState"]) not in states:
            ended = state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
            assert not ended and time.monotonic() < deadline, f"{self.id}: {state}\n{self.log()}"
            time.sleep(0.2)
        return state

    def log(self) -> str:
        """What the job and its ranks have written."""
        paths = [*self.folder.glob(f"*-{self.id}.out"), *self.folder.glob(f"logs/*-{self.id}/*")]
        return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(paths))

    def wait_for_steps(self, run: Path, steps: int) -> None:
        wait_until(f"step {steps} in {run}", lambda: logged_steps(run) >= steps, 240, self.log)


def logged_steps(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


class Process:
    """A process of /proc; it may be gone at any time."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            pairs = []
        self.environment = dict(pair.decode(errors="replace").partition("=")[::2] for pair in pairs)

    def kill_with_parent(self) -> None:
        """Kills it, and the slurmstepd that started it."""
        try:
            parent = int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[1])
            if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                os.kill(parent, signal.SIGKILL)
            os.kill(self.pid, signal.SIGKILL)
        except OSError:
            pass
