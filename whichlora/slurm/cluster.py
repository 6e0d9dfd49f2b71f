"""What a cluster has: its partitions' GPU types, as `sinfo` tells."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from whichlora_estimators.errors import BadValue, UnknownName, WhichloraError
from whichlora_estimators.gpus import Gpu, find_gpu

from .settings import Cluster

UNTYPED = "gpu"
_GRES = re.compile(r"gpu(?::(?P<type>[^:,()]+))?:(?P<count>\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuType:
    """A GPU type of the cluster: its name there (`gpu` where it has none), our card, and the longest a job may run.

    `limit_s` is the most that a partition with it allows; None: as long as it likes.
    """

    name: str
    gpu: Gpu
    partitions: tuple[str, ...]
    limit_s: int | None

    @property
    def gres(self) -> str:
        """What a job asks for to get one."""
        return "gpu:1" if self.name == UNTYPED else f"gpu:{self.name}:1"


def find_types(cluster: Cluster, *, only: Iterable[str] = ()) -> tuple[GpuType, ...]:
    """Ask `sinfo` for the GPU types of the cluster (of its partition, if one is set), those in `only` if any are given.

    Raises WhichloraError where there is no Slurm or no GPU, UnknownName for a type that the cluster lacks, BadValue for one
    that our data cannot tell.
    """
    found = parse(_sinfo(cluster.partition))
    wanted = tuple(only)
    for name in wanted:
        if name not in found:
            raise UnknownName("GPU type of this cluster", name, found, todo=f"It has: {', '.join(found) or 'none'}.")
    if not found:
        where = f" in partition {cluster.partition}" if cluster.partition else ""
        raise WhichloraError(
            f"sinfo tells of no GPU{where}", todo="Check `sinfo -o '%P %G'`, or name another partition."
        )
    chosen = {name: lines for name, lines in found.items() if not wanted or name in wanted}
    return tuple(_type(name, lines, cluster) for name, lines in sorted(chosen.items()))


def _sinfo(partition: str | None) -> str:
    program = shutil.which("sinfo")
    if program is None:
        todo = "Run this on a login node of the cluster, or load the module that has Slurm's commands."
        raise WhichloraError("there is no sinfo here", todo=todo)
    command = [program, "--noheader", "--format=%R|%l|%a|%G"]
    command += [f"--partition={partition}"] if partition else []
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise WhichloraError("sinfo failed", value=done.stderr.strip()[:300], todo="Ask those who run the cluster.")
    return done.stdout


def parse(text: str) -> dict[str, list[tuple[str, int | None]]]:
    """Read lines of `sinfo --format=%R|%l|%a|%G`: each GPU type's partitions that are up, with their time limits."""
    found: dict[str, list[tuple[str, int | None]]] = {}
    for line in text.splitlines():
        partition, limit, available, gres = (part.strip() for part in line.split("|", 3))
        if available != "up":
            continue
        for match in _GRES.finditer(gres):
            name = match["type"] or UNTYPED
            entry = (partition, parse_time(limit))
            if int(match["count"]) and entry not in found.setdefault(name, []):
                found[name].append(entry)
    return {name: entries for name, entries in found.items() if entries}


def parse_time(text: str) -> int | None:
    """Read Slurm's times: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]; None: infinite."""
    if text in ("infinite", "UNLIMITED", "n/a"):
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        parts += [0] * (3 - len(parts))
    elif len(parts) == 1:
        parts = [0, parts[0], 0]
    elif len(parts) == 2:
        parts = [0, *parts]
    hours, minutes, seconds = parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def format_time(seconds: float) -> str:
    """Write a time limit for `--time`, rounded up to whole minutes."""
    minutes = max(1, -(-int(seconds) // 60))
    return f"{minutes // 60}:{minutes % 60:02d}:00"


def _type(name: str, entries: list[tuple[str, int | None]], cluster: Cluster) -> GpuType:
    limits = [limit for _, limit in entries]
    known = [limit for limit in limits if limit is not None]
    return GpuType(
        name=name,
        gpu=_card(name, cluster),
        partitions=tuple(dict.fromkeys(partition for partition, _ in entries)),
        limit_s=max(known) if len(known) == len(limits) else None,
    )


def _card(name: str, cluster: Cluster) -> Gpu:
    if name in cluster.gpu_types:
        return find_gpu(cluster.gpu_types[name])
    try:
        return find_gpu(name)
    except WhichloraError as error:
        todo = f"Say which card it is: --gpu-type {name}=SLUG, or slurm.gpu_types in the config. {error}"
        raise BadValue("a GPU type that may be several cards, or none that we know", value=name, todo=todo) from None
