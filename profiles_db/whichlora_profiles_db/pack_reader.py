"""Packs of others, read by processes of their own and checked row by row."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import BadPack
from .pack_checks import MOST_KEPT, Rejected
from .pack_stage import MOST_FILE_BYTES, PACK, STAGED
from .packs import Manifest, file_sha256

#: Rows that one process checks before it says how far it is.
ROWS_A_REQUEST = 20_000
_START = "import sys; sys.path[:] = sys.argv[1:]; from whichlora_profiles_db.pack_worker import main; main()"
_ASK = "Ask whoever made it to export it again with whichlora profiles export."
OnRows = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPack:
    """A pack whose form is right, in clean tables, and which of its rows may not enter a store.

    `rejected` has up to ten thousand of these in full; `rejected_rows` has the places of all.
    """

    folder: Path
    sha256: str
    manifest: Manifest
    rejected_rows: tuple[int, ...]

    @property
    def staged(self) -> Path:
        """The DuckDB file with the pack's rows."""
        return self.folder / STAGED

    def lines(self) -> Iterator[str]:
        """Yield the first rejected rows of the pack, up to MOST_KEPT: one JSON object a line, with reasons and content."""
        files = self.folder.glob("rejected-*.jsonl")
        left = MOST_KEPT
        for path in sorted(files, key=lambda path: int(path.stem.partition("-")[2])):
            with path.open(encoding="utf-8") as file:
                for line in islice(file, left):
                    yield line
                    left -= 1

    def rejected(self, limit: int) -> list[Rejected]:
        """Return the first rejected rows."""
        found = (json.loads(line) for line, _ in zip(self.lines(), range(limit), strict=False))
        return [Rejected(row=one["row"], id=str(one["id"]), reasons=tuple(one["reasons"])) for one in found]


class PackReader:
    """Reads packs in processes of their own; several packs one after the other, rows of a large one side by side."""

    def __init__(self, *, jobs: int | None = None) -> None:
        self._jobs = jobs or min(8, os.cpu_count() or 1)
        self._idle: queue.LifoQueue[_Process] = queue.LifoQueue()
        self._all: list[_Process] = []

    def __enter__(self) -> PackReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes."""
        for process in self._all:
            process.end()

    @contextlib.contextmanager
    def read(self, pack: Path, *, on_rows: OnRows | None = None) -> Iterator[ReadPack]:
        """Check a pack; what it holds is there until the block ends. `on_rows` hears how many of how many are checked.

        It is copied first, so that what was checked is what is used. Raises BadPack for one that has no right form.
        """
        import tempfile

        with tempfile.TemporaryDirectory(prefix="whichlora-pack-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            sha256 = _copied(pack, folder / PACK)
            rows = self._ask({"do": "stage", "folder": name}, pack)["rows"]
            fields = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            rejected = self._check(folder, rows, pack, on_rows)
            yield ReadPack(
                folder=folder, sha256=sha256, manifest=Manifest(**fields), rejected_rows=tuple(sorted(rejected))
            )

    def _check(self, folder: Path, rows: int, pack: Path, on_rows: OnRows | None) -> list[int]:
        from concurrent.futures import ThreadPoolExecutor, as_completed

        spans = [(first, min(first + ROWS_A_REQUEST, rows)) for first in range(0, rows, ROWS_A_REQUEST)]
        rejected: list[int] = []
        done = 0
        with ThreadPoolExecutor(max_workers=min(self._jobs, len(spans))) as pool:
            asked = {
                pool.submit(self._ask, {"do": "check", "folder": str(folder), "first": first, "last": last}, pack): last
                - first
                for first, last in spans
            }
            try:
                for future in as_completed(asked):
                    rejected += future.result()["rejected"]
                    done += asked[future]
                    if on_rows:
                        on_rows(done, rows)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return rejected

    def _ask(self, request: dict[str, Any], pack: Path) -> dict[str, Any]:
        """Have one of the processes answer. Raises BadPack for what it finds, and where it dies of the pack."""
        try:
            process = self._idle.get_nowait()
        except queue.Empty:
            process = _Process()
            self._all.append(process)
        answer = process.ask(request)
        if answer is None:
            process.end()
            raise BadPack("the pack broke the process that read it", value=str(pack), todo=_ASK)
        self._idle.put(process)
        if "error" in answer:
            value = f"{pack.name}: {answer['value']}" if answer.get("value") else pack.name
            raise BadPack(answer["error"], value=value, todo=answer.get("todo") or _ASK)
        return answer


class _Process:
    """One reading process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        import subprocess
        import tempfile

        self._running = subprocess.Popen(
            [sys.executable, "-c", _START, *(str(Path(entry).absolute()) for entry in sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=tempfile.gettempdir(),
            text=True,
            encoding="utf-8",
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Return the answer, None where the process is gone."""
        assert self._running.stdin
        assert self._running.stdout
        try:
            self._running.stdin.write(json.dumps(request) + "\n")
            self._running.stdin.flush()
            line = self._running.stdout.readline()
        except OSError:
            return None
        answer: dict[str, Any] | None = json.loads(line) if line else None
        return answer

    def end(self) -> None:
        """End the process: it has nothing to lose."""
        self._running.kill()
        self._running.communicate()


def pack_sha256(pack: Path) -> str:
    """Return the SHA-256 of a regular file of a size that a pack may have. Raises BadPack."""
    try:
        if not pack.is_file():
            raise BadPack("no file" if pack.exists() else "no such pack", value=str(pack), todo="Check the path.")
        if (size := pack.stat().st_size) > MOST_FILE_BYTES:
            raise BadPack("a pack larger than any may be", value=size, todo=f"At most {MOST_FILE_BYTES} bytes.")
        return file_sha256(pack)
    except OSError as error:
        raise BadPack("the pack cannot be read", value=str(pack), todo=f"{error.strerror}.") from error


def _copied(pack: Path, to: Path) -> str:
    pack_sha256(pack)
    try:
        shutil.copyfile(pack, to)
    except OSError as error:
        raise BadPack("the pack cannot be copied", value=str(pack), todo=f"{error.strerror}.") from error
    return file_sha256(to)
