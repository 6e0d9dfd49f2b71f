"""A Slurm of our own on this machine: munged, slurmctld and slurmd, with a folder, ports and a key of their own.

One node, four cores (whatever the machine has), and a card each of two types, `gpu:a100` and `gpu:rtx4090`. The cards are
device files that are none, which is enough for Slurm to hand them out as on a cluster. Several may run beside each other.
Needs Debian's packages slurm-wlm and munge.

    from ..slurm.cluster import slurm  # noqa: F401

    def test_something(slurm: Slurm) -> None:
        slurm.run("sbatch", "--gres=gpu:a100:1", "job.sh")
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.waiting import free_ports, until

from .. import programs

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "sinfo", "squeue", "scancel")
_CONF = """
ClusterName=whichlora
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,sched_min_interval=0
GresTypes=gpu
MpiDefault=none
ReturnToService=2
KillWait=2
MinJobAge=600
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory=64000 Gres=gpu:a100:1,gpu:rtx4090:1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
_GRES = "Name=gpu Type=a100 File=/dev/null\nName=gpu Type=rtx4090 File=/dev/zero\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slurm:
    """A running Slurm; `environment` is that of a shell on its login node."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        """Run one of Slurm's commands and return what it prints; fail with what it says where it fails."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def states(self) -> dict[str, str]:
        """Return the state of every job and array task that Slurm remembers, such as RUNNING, by its id."""
        lines = self.run("squeue", "--array", "--noheader", "--states=all", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)


def missing() -> list[str]:
    """Return the programs that a Slurm needs and this machine lacks."""
    return [name for name in PROGRAMS if programs.find(name) is None]


@contextlib.contextmanager
def running(folder: Path, *, cores: int = 4) -> Iterator[Slurm]:
    """Start a Slurm in an empty folder, and end it and all of its jobs afterwards."""
    variables = os.environ | {"PATH": programs.PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    slurm = Slurm(folder=folder, environment=variables)
    _write_settings(folder, cores)
    with contextlib.ExitStack() as stack:
        for command in (_munged(folder), ["slurmctld", "-c", "-D"], ["slurmd", "-D"]):
            stack.enter_context(_daemon(command, slurm))
            if command[0] == "munged":
                _wait(lambda: (folder / "munge.socket").exists(), slurm)
            if command[0] == "slurmctld":
                _wait(lambda: "is UP" in _said(slurm, "scontrol", "ping"), slurm)
        _wait(lambda: _said(slurm, "sinfo", "--noheader", "--format=%t") == "idle", slurm)
        stack.callback(_end_jobs, slurm)
        yield slurm


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Return a running Slurm; skip where it is not installed."""
    if absent := missing():
        pytest.skip(f"Slurm is not installed (apt-get install slurm-wlm munge); missing: {', '.join(absent)}")
    # Not pytest's folder: a socket's path has to be short, and munged wants nobody else to be able to write above it.
    folder = Path("/tmp") / f"slurm-{secrets.token_hex(4)}"
    folder.mkdir(mode=0o755)
    try:
        with running(folder) as started:
            yield started
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_settings(folder: Path, cores: int) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    controller_port, node_port = free_ports(2)
    settings = _CONF.format(
        folder=folder,
        host=socket.gethostname().split(".")[0],
        user=getpass.getuser(),
        cores=cores,
        controller_port=controller_port,
        node_port=node_port,
    )
    (folder / "slurm.conf").write_text(settings, encoding="utf-8")
    (folder / "gres.conf").write_text(_GRES, encoding="utf-8")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n", encoding="utf-8")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def _munged(folder: Path) -> list[str]:
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
    files["seed-file"] = "munged.seed"
    return ["munged", "--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]


@contextlib.contextmanager
def _daemon(command: list[str], slurm: Slurm) -> Iterator[None]:
    with (slurm.folder / f"{command[0]}.out").open("w", encoding="utf-8") as output:
        program = programs.find(command[0])
        assert program
        started = subprocess.Popen(
            [program, *command[1:]], env=slurm.environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        started.send_signal(signal.SIGTERM)
        try:
            started.wait(timeout=10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()


def _end_jobs(slurm: Slurm) -> None:
    with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
        slurm.run("scancel", f"--user={getpass.getuser()}")
        _wait(lambda: not slurm.run("squeue", "--noheader"), slurm)


def _said(slurm: Slurm, *command: str) -> str:
    done = subprocess.run(command, env=slurm.environment, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip()


def _wait(ready: Callable[[], bool], slurm: Slurm, *, seconds: float = 30) -> None:
    def said() -> str:
        logs = slurm.folder.glob("*.[lo][ou][gt]")
        texts = [f"{path.name}:\n{path.read_text(errors='replace')[-2000:]}" for path in logs]
        return "\n".join(["Slurm did not come up", *texts])

    until(ready, said, seconds=seconds)
