"""Debian's PostgreSQL for the tests: a server of our own in a folder, on a unix socket, that ends with them."""

import itertools
import os
import pwd
import shutil
import subprocess
from pathlib import Path

HOW = "no PostgreSQL is installed (Debian: apt-get install postgresql)"


def binaries() -> Path | None:
    """The folder of initdb and pg_ctl: Debian keeps them off the PATH, one folder for each version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    path = found[-1] if found else shutil.which("initdb")
    return Path(path).parent if path else None


class Cluster:
    """Databases, each made when it is asked for.

    Args:
        folder: short: the name of a socket has 107 bytes at most.
    """

    def __init__(self, folder: Path):
        self.folder, self.numbers = folder, itertools.count()
        self.data, self.user = folder / "data", None
        if os.getuid() == 0:  # PostgreSQL refuses root
            self.user = "postgres"
            shutil.chown(folder, pwd.getpwnam(self.user).pw_uid)
        self.run("initdb", "-D", self.data, "-U", "market", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N")
        self.start()

    def start(self) -> None:
        """Answer. Nothing of it must live through a power cut, so nothing is waited for."""
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off -c full_page_writes=off"
        self.run("pg_ctl", "-D", self.data, "-o", options, "-l", self.folder / "log", "-w", "-t", "60", "start")

    def new(self, *options: str) -> str:
        """-> the address of an empty database."""
        name = f"market_{next(self.numbers)}"
        self.run("createdb", "-h", self.folder, "-U", "market", *options, name)
        return f"postgresql://market@/{name}?host={self.folder}"

    def stop(self) -> None:
        """End the server; who is still there is cut off."""
        self.run("pg_ctl", "-D", self.data, "-m", "fast", "-w", "stop")

    def run(self, command: str, *arguments) -> None:
        """One of PostgreSQL's own commands, as its user."""
        given = dict(cwd=self.folder, user=self.user, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        done = subprocess.run(
            [binaries() / command, *map(str, arguments)], stderr=subprocess.PIPE, text=True, timeout=120, **given
        )
        assert done.returncode == 0, done.stderr
