"""Where the market's tables are: SQLite's file in its folder, or a database of a PostgreSQL server.

Both speak the same statements, with ``?`` for a value. What differs is here, and it is little: how a transaction begins
and who may write in it, the type of a number, a field of a JSON, and how a copy is made. A library that writes SQL for
both would take the place of every statement to save these lines.
"""

import os
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megactx.framework.errors import RunFailed
from megactx.framework.extra import extra

FORMAT = 1  # of the tables
LOCK = 0x6D656761  # of whoever writes to the market's tables; a number as good as any other
CONNECTIONS, PATIENCE = 16, 10.0  # with PostgreSQL at a time, and seconds until one of them must be free


class Refused(Exception):
    """What was asked is answered with an error."""

    def __init__(self, status: int, message: str, after: float = 0.0):
        self.status, self.message, self.after = status, message, after


class SQLite:
    """DATA/market.db; a connection for each transaction.

    Args:
        tables: the statements that make them.

    Raises:
        ValueError: a newer program wrote it.
    """

    embeddings, gistnet = (f"json_extract(card, '$.model.{name}')" for name in ("embeddings", "gistnet"))

    def __init__(self, path: Path, tables: str):
        self.path = path
        with self._connected() as db:
            db.execute("PRAGMA journal_mode=WAL")
            there = db.execute("PRAGMA user_version").fetchone()[0]
            if there > FORMAT:
                raise ValueError(f"{path.parent} was written by a newer program (format {there})")
            if there == 0:
                db.executescript(f"BEGIN IMMEDIATE; {tables} PRAGMA user_version={FORMAT}; COMMIT;")

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            db.row_factory = sqlite3.Row
            db.execute("PRAGMA foreign_keys=ON")
            yield db
        finally:
            db.close()

    @contextmanager
    def step(self) -> Iterator[sqlite3.Connection]:
        """A transaction that nobody else writes beside."""
        with self._connected() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    @contextmanager
    def look(self) -> Iterator[sqlite3.Connection]:
        """Read one state."""
        with self._connected() as db:
            db.execute("BEGIN")
            yield db

    def copy(self, folder: Path) -> None:
        """One state of all tables into a folder."""
        with self._connected() as db:
            copy = sqlite3.connect(folder / "market.db")
            db.backup(copy)
            copy.close()

    def close(self) -> None:
        """Nothing is held."""


class PostgreSQL:
    """A database that is the market's alone, with connections that are used again.

    Writers wait for each other as they do with SQLite, so a step may look before it writes.

    Args:
        address: as libpq reads it, ``postgresql://USER@HOST/NAME``; a password is better in ~/.pgpass.

    Raises:
        ValueError: it cannot be opened.
    """

    embeddings, gistnet = (f"card::json #>> '{{model,{name}}}'" for name in ("embeddings", "gistnet"))

    def __init__(self, address: str):
        with extra("--database", "postgres"):
            import psycopg
            import psycopg_pool
        self.psycopg, self.address = psycopg, address
        self.gone = (psycopg.OperationalError, psycopg_pool.PoolTimeout)
        given = {"autocommit": True, "row_factory": _rows, "application_name": "megactx market"}
        try:
            psycopg.connect(address, connect_timeout=int(PATIENCE)).close()  # the pool would try on and not say why
        except psycopg.Error as error:
            raise ValueError(f"--database: it cannot be opened ({_first_line(error)})") from error
        sizes = {"min_size": 1, "max_size": CONNECTIONS, "timeout": PATIENCE}
        checked = psycopg_pool.ConnectionPool.check_connection  # a server that was started anew takes all with it
        self.pool = psycopg_pool.ConnectionPool(address, kwargs=given, check=checked, open=True, **sizes)

    def prepare(self, tables: str, mark: str, fresh: bool) -> None:
        """Make the tables where there are none, and check whose they are.

        Args:
            tables: see ``SQLite``.
            mark: of the folder that they belong to.
            fresh: the folder has no package yet.

        Raises:
            ValueError: the database holds something else or the tables of another folder, or was written by a newer
                program.
        """
        with self.step() as db:
            if (encoding := db.connection.info.parameter_status("server_encoding")) != "UTF8":
                raise ValueError(
                    f"--database: its encoding is {encoding}; createdb --encoding=UTF8 makes one that fits"
                )
            query = "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()"
            there = {name for (name,) in db.execute(query)}
            if not there:
                if not fresh:
                    raise ValueError("--database: it is empty and the folder is not; restore both from one backup")
                # A number of SQLite has 64 bits, and its INTEGER PRIMARY KEY counts by itself.
                counted = tables.replace("INTEGER PRIMARY KEY", "BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY")
                db.execute(counted.replace("INTEGER", "BIGINT"))
                db.execute("CREATE TABLE about (format INTEGER NOT NULL, market TEXT NOT NULL)")
                db.execute("INSERT INTO about VALUES (?, ?)", (FORMAT, mark))
            elif not {"about", "account", "package", "audit"} <= there:
                raise ValueError("--database: it holds something else; createdb makes one for the market alone")
            format, market = db.execute("SELECT format, market FROM about").fetchone()
        if format > FORMAT:
            raise ValueError(f"--database: it was written by a newer program (format {format})")
        if market != mark:
            raise ValueError("--database: it belongs to another folder; a market is restored with both")

    @contextmanager
    def _connected(self) -> Iterator["_Connection"]:
        try:
            with self.pool.connection() as connection:
                yield _Connection(connection)
        except self.psycopg.DataError as error:  # a NUL character, which no text of PostgreSQL may hold
            raise Refused(400, "That is no text.") from error
        except self.gone as error:
            raise Refused(503, "The database does not answer. Try again later.", 5) from error

    @contextmanager
    def step(self) -> Iterator["_Connection"]:
        """A transaction that nobody else writes beside."""
        with self._connected() as db, db.connection.transaction():
            db.execute("SELECT pg_advisory_xact_lock(?)", (LOCK,))
            yield db

    @contextmanager
    def look(self) -> Iterator["_Connection"]:
        """Read one state."""
        with self._connected() as db:
            db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
            try:
                yield db
            finally:
                db.connection.rollback()

    def copy(self, folder: Path) -> None:
        """One state of all tables into a folder, as ``pg_restore`` takes it.

        Raises:
            ValueError: PostgreSQL's own pg_dump is not installed.
            RunFailed: it failed.
        """
        if (command := shutil.which("pg_dump")) is None:
            raise ValueError("a backup of PostgreSQL needs pg_dump: apt-get install postgresql-client")
        # By the environment, for everybody sees what a process was called with.
        known = self.psycopg.pq.Conninfo.parse(self.address.encode())
        given = {option.envvar.decode(): option.val.decode() for option in known if option.val and option.envvar}
        dump = [command, "--format=custom", "--no-owner", f"--file={folder / 'market.dump'}"]
        done = subprocess.run(dump, env=os.environ | given, capture_output=True, text=True)
        if done.returncode:
            raise RunFailed(f"pg_dump failed: {done.stderr.strip()}")

    def close(self) -> None:
        """Give the connections back."""
        self.pool.close()


Database = SQLite | PostgreSQL


class _Connection:
    def __init__(self, connection):
        self.connection = connection

    def execute(self, statement: str, values=()):
        return self.connection.execute(statement.replace("?", "%s"), values or None)


class Row:
    """Of an answer, as SQLite's: by name and by number."""

    __slots__ = ("_names", "_values")

    def __init__(self, names: dict[str, int], values):
        self._names, self._values = names, tuple(values)

    def __getitem__(self, key: str | int):
        return self._values[key if isinstance(key, int) else self._names[key]]

    def __iter__(self):
        return iter(self._values)

    def keys(self) -> list[str]:
        return [*self._names]


def _rows(cursor):
    names = {column.name: number for number, column in enumerate(cursor.description or ())}
    return lambda values: Row(names, values)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
