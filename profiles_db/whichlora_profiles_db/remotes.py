"""Places where a lab keeps packs: a folder, an object store, anything that fsspec can address.

A remote holds packs and nothing else, each under `gpu=…/month=…/<SHA-256 of its bytes>.parquet`. A pack never changes
and is never replaced, so writers need neither locks nor a server, and what does not hash to its name is no pack.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import quote, unquote

from .errors import BadPack, StoreError
from .packs import SUFFIX

NONE = "none"
_NAME = re.compile(r"gpu=([A-Za-z0-9._%~-]{1,300})/month=(none|[0-9]{4}-[0-9]{2})/([0-9a-f]{64})\.parquet")
#: Where a file appears at once and whole when its upload ends; elsewhere it is renamed into place.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "hf", "abfs", "abfss", "az", "adl", "oci", "oss"}
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface-hub", "abfs": "adlfs"}


class RemoteError(StoreError):
    """A remote that cannot be reached, read or written."""


class Remote(Protocol):
    """What exchanging packs needs of a place. Names are those that `pack_name` makes; all raise RemoteError."""

    @property
    def url(self) -> str:
        """What the place is called."""

    def list(self) -> list[str]:
        """Return the names of the packs that are there, in order."""

    def fetch(self, name: str, to: Path, *, most_bytes: int) -> None:
        """Copy a pack into a new file; refuse one that is larger than `most_bytes`."""

    def put(self, name: str, source: Path) -> None:
        """Copy a file there, to be seen under its name complete or not at all."""


def pack_name(gpu: str | None, month: str | None, sha256: str) -> str:
    """Return the name of a pack with the measurements of one card (its slug) in one month (`2026-03`)."""
    return f"gpu={_as_folder(gpu)}/month={month or NONE}/{sha256}{SUFFIX}"


def is_pack_name(name: str) -> bool:
    """Say whether a name is one that `pack_name` makes: nothing else on a remote is read."""
    return _NAME.fullmatch(name) is not None


def sha256_of(name: str) -> str:
    """Return the hash in a pack's name."""
    return PurePosixPath(name).stem


def partition(name: str) -> tuple[str | None, str | None]:
    """Return the card and the month of a pack's name, None for what is not known."""
    found = _NAME.fullmatch(name)
    assert found
    gpu, month = found[1], found[2]
    return None if gpu == NONE else unquote(gpu), None if month == NONE else month


def month_of(moment: datetime | None) -> str | None:
    """Return `2026-03`."""
    return f"{moment.year:04d}-{moment.month:02d}" if moment else None


def _as_folder(gpu: str | None) -> str:
    """Spell a card as the name of a folder that has one meaning everywhere: no slashes, no dots in front, no case."""
    if gpu is None:
        return NONE
    text = quote(gpu.lower(), safe="")[:200]
    if text == NONE:
        return f"%{ord(NONE[0]):02X}{NONE[1:]}"
    return text.replace(".", "%2E", 1) if text.startswith(".") else text


def open_remote(url: str, **options: Any) -> Remote:
    """Return the remote at a URL: a folder's path or file://, http:// or https:// (a server), what fsspec knows.

    A server takes `token`. Elsewhere `options` go to fsspec's file system; credentials and endpoints come from where
    each of them looks (for S3, the variables and files of AWS). Raises RemoteError for a URL that nothing here understands.
    """
    protocol, separator, rest = url.partition("://")
    if not separator:
        if not url.strip():
            raise RemoteError(
                "a remote without a name", value=url, todo="Give a folder, or a URL such as s3://lab/packs."
            )
        return Folder(Path(url).expanduser())
    if protocol == "file":
        return Folder(Path(unquote(rest)))
    if not rest.strip("/"):
        raise RemoteError("a remote's URL without a place", value=url, todo=f"Add one: {protocol}://bucket/folder.")
    if protocol in ("http", "https"):
        from .http_remote import HttpRemote

        return HttpRemote(url, **options)
    return FsspecRemote(url, protocol, options)


class Folder:
    """A remote in a folder, on this machine or on a network's file system."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @property
    def url(self) -> str:
        """The folder's path."""
        return str(self.path)

    def list(self) -> list[str]:
        """Return the names of the packs that are there, in order."""
        with _as_remote_error(self.url):
            if self.path.exists() and not self.path.is_dir():
                raise RemoteError("a remote that is no folder", value=self.url, todo="Name a folder.")
            found = {
                path.relative_to(self.path).as_posix(): path for path in self.path.glob(f"gpu=*/month=*/*{SUFFIX}")
            }
            return sorted(name for name, path in found.items() if is_pack_name(name) and _is_file(path))

    def fetch(self, name: str, to: Path, *, most_bytes: int) -> None:
        """Copy a pack into a new file."""
        with _as_remote_error(self.url):
            path = self.path / name
            _check_size(name, path.stat().st_size, most_bytes)
            shutil.copyfile(path, to)

    def put(self, name: str, source: Path) -> None:
        """Copy a file beside its place and move it there once it is on disk."""
        path = self.path / name
        fresh = path.with_name(f".{uuid.uuid4().hex}.new")
        with _as_remote_error(self.url):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source, fresh)
                with fresh.open("rb") as file:
                    os.fsync(file.fileno())
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)


class FsspecRemote:
    """A remote that an implementation of fsspec reaches."""

    def __init__(self, url: str, protocol: str, options: dict[str, Any]) -> None:
        import fsspec

        try:
            self.filesystem, root = fsspec.core.url_to_fs(url.rstrip("/"), **options)
        except Exception as error:
            package = _PACKAGES.get(protocol, "the package that fsspec names for it")
            todo = f'Check its spelling, or install {package} (pip install "whichlora[remotes]" for S3). ({error})'
            raise RemoteError("no remote that can be understood here", value=url, todo=todo) from error
        self._url = url
        self._root = root.rstrip("/")
        self._at_once = protocol in _OBJECT_STORES

    @property
    def url(self) -> str:
        """The URL that it was opened with."""
        return self._url

    @property
    def protocol(self) -> str:
        """The beginning of its URLs."""
        return self._url.partition("://")[0]

    def path(self, name: str) -> str:
        """Return where a pack lies, as its file system calls it."""
        return f"{self._root}/{name}"

    def list(self) -> list[str]:
        """Return the names of the packs that are there, in order."""
        with _as_remote_error(self._url):
            self.filesystem.invalidate_cache()
            found = self.filesystem.find(self._root) if self.filesystem.exists(self._root) else []
        names = (path.removeprefix(self._root).lstrip("/") for path in found)
        return sorted(name for name in names if is_pack_name(name))

    def fetch(self, name: str, to: Path, *, most_bytes: int) -> None:
        """Copy a pack into a new file."""
        with _as_remote_error(self._url):
            _check_size(name, int(self.filesystem.size(self.path(name)) or 0), most_bytes)
            self.filesystem.get_file(self.path(name), str(to))

    def put(self, name: str, source: Path) -> None:
        """Upload a file: in one piece where that is how objects appear, else beside its place and moved there."""
        path = self.path(name)
        with _as_remote_error(self._url):
            if self._at_once:
                self.filesystem.put_file(str(source), path)
                return
            folder = path.rpartition("/")[0]
            fresh = f"{folder}/.{uuid.uuid4().hex}.new"
            self.filesystem.makedirs(folder, exist_ok=True)
            self.filesystem.put_file(str(source), fresh)
            self.filesystem.mv(fresh, path)


def _is_file(path: Path) -> bool:
    """Say whether a path is a file itself: a link may lead anywhere, a device never ends."""
    return stat.S_ISREG(path.lstat().st_mode)


def _check_size(name: str, size: int, most_bytes: int) -> None:
    if size > most_bytes:
        raise BadPack(
            f"a pack of {size} bytes, larger than any may be", value=name, todo=f"Up to {most_bytes} are read."
        )


@contextlib.contextmanager
def _as_remote_error(url: str) -> Iterator[None]:
    """Turn whatever a file system's library raises into the one family of errors; each has classes of its own."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        said = "".join(str(error).strip().splitlines()[:1])[:300]
        todo = f"Check that it can be reached and that you may use it. ({type(error).__name__}: {said})"
        raise RemoteError("the remote could not be used", value=url, todo=todo) from error
