"""The one owner of a store: it holds the file, takes in one pack after the other, and keeps the packs for others.

All that comes in is a pack, measurements sent as JSON too. A pack is checked and imported whole or not at all, its file
is kept under its name, and only then does whoever sent it hear that it is there. Rows of the store that are in no such
pack (somebody added them before the server had it) go into packs of their own before the packs are listed.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from whichlora_estimators.errors import BadValue, WhichloraError
from whichlora_profiles_db import Imported, Measurement, Store, StoreError, import_pack, open_store, push, write_pack
from whichlora_profiles_db.pack_reader import PackReader
from whichlora_profiles_db.packs import file_sha256
from whichlora_profiles_db.remotes import Folder, pack_name, sha256_of
from whichlora_profiles_db.session import holding

from .tokens import Token, Tokens, submission, tokens_path

T = TypeVar("T")
#: Submissions that may wait for their turn; whoever comes then is asked to come again.
MOST_WAITING = 64


class Full(WhichloraError):
    """Too many submissions wait already."""

    def __init__(self) -> None:
        super().__init__("too many submissions are waiting", todo="Try again in a few seconds.")


class Keeper:
    """Owns a store while it is entered, which is waited for. `jobs` processes check packs."""

    def __init__(self, path: Path, *, jobs: int = 1, wait_s: float | None = None) -> None:
        self.store: Store = open_store(path)
        self._wait_s = self.store.wait_s if wait_s is None else wait_s
        self.packs = Folder(self.store.path.with_name(f"{self.store.path.name}.packs"))
        self.folder = self.store.path.with_name(f"{self.store.path.name}.incoming").resolve()
        self.tokens = Tokens(tokens_path(self.store.path))
        self._reader = PackReader(jobs=jobs)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._guard = threading.Lock()
        self._waiting = self._kept = 0
        self._listed: tuple[tuple[int, int], dict[str, str]] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Keeper:
        """Open the store. Raises StoreBusy while another process has it."""
        with ExitStack() as stack:
            stack.enter_context(holding(self.store.path, self.folder, wait_s=self._wait_s))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            _clear(self.folder, self.packs.path)
            stack.enter_context(_temporary_files_in(self.folder))
            stack.enter_context(self._reader)
            stack.callback(self._writer.shutdown, wait=True)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish every submission that was taken, then close the store."""
        self._stack.close()

    @property
    def waiting(self) -> int:
        """How many submissions wait or are being written."""
        return self._waiting

    def submit(self, pack: Path, token: Token, *, gpu: str | None, month: str | None) -> Future[Imported]:
        """Have a pack's file taken in when its turn comes. Raises Full; the future raises BadPack."""
        return self._in_turn(lambda: self._take(pack, token, gpu=gpu, month=month))

    def submit_measurements(self, measurements: Iterable[Measurement], token: Token) -> Future[Imported]:
        """Have measurements taken in as a pack, without names of hosts and users."""
        given = list(measurements)
        if not given:
            raise BadValue("no measurements", todo="Send one or more.")
        gpus = {one.environment.gpu for one in given}
        months = {f"{one.measured_at:%Y-%m}" if one.measured_at else None for one in given}

        def take() -> Imported:
            path = self.fresh()
            write_pack(given, path)
            return self._take(path, token, gpu=_only(gpus), month=_only(months))

        return self._in_turn(take)

    def fresh(self) -> Path:
        """Return a name of our own for a file to come."""
        with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".incoming", delete=False) as file:
            return Path(file.name)

    def listed(self) -> dict[str, str]:
        """Return the names of all packs by their hashes; every measurement of the store is in one of them."""
        known = self._listed
        if known is None or known[0] != (self.store.count(), self._kept):
            return self._in_turn(self._list).result()
        return known[1]

    def _list(self) -> dict[str, str]:
        push(self.store, self.packs)
        names = {sha256_of(name): name for name in self.packs.list()}
        self._listed = ((self.store.count(), self._kept), names)
        return names

    def _take(self, pack: Path, token: Token, *, gpu: str | None, month: str | None) -> Imported:
        try:
            sha256 = file_sha256(pack)
            done = import_pack(self.store, pack, name=sha256, reader=self._reader)
            self.packs.put(pack_name(gpu, month, sha256), pack)
            self._kept += 1
            self.tokens.note(submission(sha256, token, rows=done.manifest.rows, added=done.added))
            return done
        finally:
            pack.unlink(missing_ok=True)

    def _in_turn(self, work: Callable[[], T]) -> Future[T]:
        with self._guard:
            if self._waiting >= MOST_WAITING:
                raise Full
            self._waiting += 1
        future = self._writer.submit(work)
        future.add_done_callback(self._done)
        return future

    def _done(self, future: Future[T]) -> None:
        with self._guard:
            self._waiting -= 1


def _clear(folder: Path, packs: Path) -> None:
    """Remove what a server of this store left that was killed: who holds the store owns both. Raises StoreError."""
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
        for left in packs.glob("gpu=*/month=*/.*.new"):
            left.unlink()
    except OSError as error:
        todo = f"{error.strerror}. It is the server's, beside its store: move away what lies there."
        raise StoreError("the folder for what comes in cannot be used", value=str(folder), todo=todo) from None


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Put every temporary file of this process into a folder: the only one that SQL reaches."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _only(values: set[str | None]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None
