"""The store of traces on disk: one SQLite file a user, safe under many processes, bounded, rebuilt when damaged.

An entry is bytes (:func:`vramplan.memory.template.packed`) with their SHA-256; one that differs from it is absent.
Reading an entry runs nothing of it. Entries of one ``kind`` hold for different batches and lengths. The key of a kind
contains the versions of the stack and the engine's own code (:mod:`vramplan.planning.fingerprint`): what another engine
traced is never found, and ages out.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import platformdirs

log = logging.getLogger("vramplan")

LIMIT = 256 << 20
"""Bytes of entries that are kept; the ones that were not asked for longest go first."""
FRESH = 3600.0
"""Seconds within which an entry that is asked for again is not written again."""
BUSY_SECONDS = 5.0
"""How long another process's writing is waited for."""

_PASSING = (
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
)
"""Primary result codes that tell of the disk or of another process, not of the file (https://sqlite.org/rescode.html)."""
_SCHEMA = """
create table if not exists entries (
    kind text not null, digest text not null, data blob not null, used real not null, unique (kind, digest)
);
create index if not exists by_use on entries (used);
"""


class Store:
    """A file of entries by kind. Its methods never raise: a file that cannot be read or written counts as empty.

    ``fixed``: the file came with the package and is only read. ``key`` makes the text under which a kind is stored.
    """

    def __init__(self, path: Path, limit: int = LIMIT, fixed: bool = False, key: Callable[[str], str] = str):
        self.path, self.limit, self.fixed, self.key = Path(path), limit, fixed, key
        self._local = threading.local()

    def get(self, kind: str) -> list[bytes]:
        """The entries of a kind, in no order."""
        if self.fixed and not self.path.exists():
            return []
        return self._done(lambda base: self._get(base, self.key(kind))) or []

    def put(self, kind: str, data: bytes, most: int) -> None:
        """Keep an entry; what exceeds the limit goes, and of this kind the oldest beyond so many."""
        self._done(lambda base: self._put(base, self.key(kind), data, most))

    def _get(self, base: sqlite3.Connection, kind: str) -> list[bytes]:
        rows = base.execute("select digest, data, used from entries where kind = ?", (kind,)).fetchall()
        now = time.time()
        stale = [(now, kind, digest) for digest, _, used in rows if now - used > FRESH]
        if stale and not self.fixed:
            with base:
                base.executemany("update entries set used = ? where kind = ? and digest = ?", stale)
        return [data for digest, data, _ in rows if digest == sha256(data).hexdigest()]

    def _put(self, base: sqlite3.Connection, kind: str, data: bytes, most: int) -> None:
        with base:
            row = (kind, sha256(data).hexdigest(), data, time.time())
            base.execute("insert or replace into entries values (?, ?, ?, ?)", row)
            base.execute(
                "delete from entries where rowid in "
                "(select rowid from entries where kind = ? order by rowid desc limit -1 offset ?)",
                (kind, most),
            )
            total = base.execute("select sum(length(data)) from entries").fetchone()[0]
            if total <= self.limit:
                return
            oldest = base.execute("select rowid, length(data) from entries order by used").fetchall()
            for row, size in oldest:
                if total <= self.limit:
                    break
                base.execute("delete from entries where rowid = ?", (row,))
                total -= size

    def _done(self, work: Callable[[sqlite3.Connection], Any]) -> Any:
        """What ``work`` makes of this thread's connection. A damaged file is put aside and begun anew; any other
        trouble is logged, and None."""
        for _ in range(2):
            try:
                return work(self._base())
            except OSError as error:
                log.debug("store %s: %s", self.path, error)
                return None
            except Exception as error:  # what SQLite and its decoding raise for a damaged file is not listed anywhere
                log.debug("store %s: %s", self.path, error)
                self._close()
                if self.fixed or getattr(error, "sqlite_errorcode", 0) & 0xFF in _PASSING:
                    return None
                self._put_aside()
        return None

    def _put_aside(self) -> None:
        """Keep the latest damaged file beside the store, for who wants to know; its log goes."""
        log.warning("the store %s is damaged: it is begun anew", self.path)
        with suppress(OSError):
            os.replace(self.path, f"{self.path}.damaged")
        for suffix in ("-wal", "-shm"):
            with suppress(OSError):
                os.unlink(f"{self.path}{suffix}")

    def _base(self) -> sqlite3.Connection:
        if getattr(self._local, "process", None) != os.getpid():  # a connection is not to be taken across a fork
            self._local.process, self._local.base = os.getpid(), self._open()
        base: sqlite3.Connection = self._local.base
        return base

    def _open(self) -> sqlite3.Connection:
        if self.fixed:
            return sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        base = sqlite3.connect(self.path, timeout=BUSY_SECONDS)
        base.execute("pragma journal_mode = wal")
        base.execute("pragma synchronous = normal")
        base.executescript(_SCHEMA)
        return base

    def _close(self) -> None:
        base = vars(self._local).pop("base", None)
        vars(self._local).pop("process", None)
        if base is not None:
            with suppress(sqlite3.Error):
                base.close()


def own_path() -> Path:
    """The user's file: in the cache folder, as each system has it; ``VRAMPLAN_CACHE`` names another folder."""
    folder = os.environ.get("VRAMPLAN_CACHE")
    return (Path(folder) if folder else platformdirs.user_cache_path("vramplan")) / "profiles.db"
