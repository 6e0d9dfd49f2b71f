"""Who may do what: tokens with a role and a label, kept as hashes beside the store; and a ledger of what came in.

The file is SQLite, so that the command line creates and revokes tokens while a server runs, which asks it at every
request: what is revoked is refused from the next one on.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import IntEnum
from pathlib import Path

from whichlora_estimators.errors import BadValue, UnknownName

PREFIX = "whl"
_TOKEN = re.compile(rf"{PREFIX}_([0-9a-f]{{12}})_([A-Za-z0-9_-]{{43}})")
_LABEL = re.compile(r"[\w][\w .@+-]{0,63}")
_TABLES = """
CREATE TABLE IF NOT EXISTS token (
    id TEXT PRIMARY KEY, hash TEXT NOT NULL, role TEXT NOT NULL, label TEXT NOT NULL,
    created_at TEXT NOT NULL, revoked_at TEXT
);
CREATE TABLE IF NOT EXISTS submission (
    number INTEGER PRIMARY KEY, pack TEXT NOT NULL, token TEXT NOT NULL, label TEXT NOT NULL,
    at TEXT NOT NULL, rows INTEGER NOT NULL, added INTEGER NOT NULL
);
"""


class Role(IntEnum):
    """What a token allows: each role may do what the ones before it may."""

    READER = 1
    CONTRIBUTOR = 2
    ADMIN = 3

    @property
    def title(self) -> str:
        """The role's name."""
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token without its secret. `label` names its holder and goes into the ledger of submissions."""

    id: str
    role: Role
    label: str
    created_at: str
    revoked_at: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """One pack that came in: its SHA-256, by whose token, when, how many measurements it had and how many were new."""

    pack: str
    token: str
    label: str
    at: str
    rows: int
    added: int


def tokens_path(store: Path) -> Path:
    """Return where the tokens of a store's server are kept: beside the store."""
    return store.with_name(f"{store.name}.server.sqlite")


def find_role(name: str) -> Role:
    """Return the role of this name. Raises UnknownName."""
    names = [role.title for role in Role]
    if name not in names:
        raise UnknownName("role", name, names, todo=f"Allowed: {', '.join(names)}.")
    return Role[name.upper()]


class Tokens:
    """The tokens of one server, and what came in with them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with self._open() as connection:
            connection.executescript(_TABLES)

    def create(self, role: Role, label: str) -> str:
        """Make a token and return its text, which is shown once: only its hash is kept. Raises BadValue."""
        if not _LABEL.fullmatch(label):
            todo = "Give 1 to 64 letters, digits, spaces or any of .@+-_, beginning with a letter or digit."
            raise BadValue("not a label", value=label, todo=todo)
        id_, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        with self._open() as connection:
            connection.execute(
                "INSERT INTO token VALUES (?, ?, ?, ?, ?, NULL)", (id_, _hashed(secret), role.title, label, _now())
            )
        return f"{PREFIX}_{id_}_{secret}"

    def all(self) -> list[Token]:
        """Return all tokens, the oldest first."""
        with self._open() as connection:
            rows = connection.execute("SELECT id, role, label, created_at, revoked_at FROM token ORDER BY rowid")
            return [
                Token(id=id_, role=find_role(role), label=label, created_at=created, revoked_at=revoked)
                for id_, role, label, created, revoked in rows.fetchall()
            ]

    def revoke(self, id_: str) -> None:
        """Make a token worthless from now on. Raises BadValue for an id that there is not."""
        with self._open() as connection:
            known = "UPDATE token SET revoked_at = coalesce(revoked_at, ?) WHERE id = ?"
            if connection.execute(known, (_now(), id_)).rowcount == 0:
                raise BadValue("no token has this id", value=id_, todo="`whichlora serve tokens list` shows them.")

    def holder(self, text: str) -> Token | None:
        """Return the token that a text is, None for one that is unknown, wrong or revoked."""
        found = _TOKEN.fullmatch(text)
        if not found:
            return None
        with self._open() as connection:
            query = "SELECT hash, role, label, created_at, revoked_at FROM token WHERE id = ?"
            row = connection.execute(query, (found[1],)).fetchone()
        kept, role, label, created, revoked = row or (_hashed(""), Role.READER.title, "", "", "never made")
        if not hmac.compare_digest(kept, _hashed(found[2])) or revoked is not None:
            return None
        return Token(id=found[1], role=find_role(role), label=label, created_at=created)

    def note(self, submission: Submission) -> None:
        """Write down what came in."""
        with self._open() as connection:
            values = (submission.pack, submission.token, submission.label, submission.at)
            connection.execute(
                "INSERT INTO submission (pack, token, label, at, rows, added) VALUES (?, ?, ?, ?, ?, ?)",
                (*values, submission.rows, submission.added),
            )

    def submissions(self, limit: int) -> list[Submission]:
        """Return what came in, the latest first."""
        with self._open() as connection:
            query = "SELECT pack, token, label, at, rows, added FROM submission ORDER BY number DESC LIMIT ?"
            names = ("pack", "token", "label", "at", "rows", "added")
            return [Submission(**dict(zip(names, row, strict=True))) for row in connection.execute(query, (limit,))]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=10)) as connection, connection:
            yield connection


def submission(pack: str, token: Token, *, rows: int, added: int) -> Submission:
    """Describe what has just come in with a token."""
    return Submission(pack=pack, token=token.id, label=token.label, at=_now(), rows=rows, added=added)


def _hashed(secret: str) -> str:
    """Hash a secret of 256 random bits: no salt and no slow hash is needed for what cannot be guessed."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
