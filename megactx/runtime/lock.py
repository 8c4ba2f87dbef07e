"""One process per session folder."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megactx.framework.errors import RunFailed
from megactx.framework.files import FULL

NAME = "lock"


class Lock:
    """Held from the call until ``release`` or the end of the process, however it ends.

    Raises:
        ValueError: another one holds it, and the message says which process; or the folder cannot be written.
        RunFailed: the disk is full.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with _told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(self.handle, 32).decode("ascii", "replace").strip()
            self.release()
            raise ValueError(
                f"{folder} is in use by process {holder or 'unknown'}: a session has one process at a time. End that"
                " one, or work on a copy of the folder"
            ) from error
        try:
            with _told(folder):
                os.truncate(self.handle, 0)
                os.pwrite(self.handle, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """A second call does nothing."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in FULL
        raise (RunFailed if full else ValueError)(
            f"{folder} cannot be written ({error.strerror}): a session keeps its files there; name another folder"
        ) from error
