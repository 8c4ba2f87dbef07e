"""A folder is held by one process at a time: a file in it is locked, and says which process that is."""

import fcntl
import os
import sys
from pathlib import Path

from .errors import FULL, RunFailed


class Lock:
    """Held from the call until ``release``, the end of a ``with`` block, or the end of the process, however it ends.

    Args:
        path: the file, which is made; where a file system has no locks, nothing is held.
        busy: what is said where another process holds it, with ``{holder}`` for its number.
        cannot: what is said behind where the file cannot be written.
        wait: say ``busy`` on stderr, if anything, and wait, in place of an error.

    Raises:
        ValueError: another process holds it; or nothing may be written there.
        RunFailed: the disk is full.
    """

    def __init__(self, path: Path, busy: str, cannot: str = "choose another folder", wait: bool = False):
        self.handle = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            self._take(busy, wait)
            os.truncate(self.handle, 0)
            os.pwrite(self.handle, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self.release()
            raise (RunFailed if error.errno in FULL else ValueError)(
                f"{path.parent} cannot be written ({error.strerror}): {cannot}"
            ) from error
        except BaseException:
            self.release()
            raise

    def _take(self, busy: str, wait: bool) -> None:
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self.handle, 32).decode("ascii", "replace").strip()
            message = busy.replace("{holder}", holder or "unknown")
            if not wait:
                raise ValueError(message) from error
            if message:
                print(f"megactx: {message}", file=sys.stderr, flush=True)
            fcntl.flock(self.handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass

    def release(self) -> None:
        """A second call does nothing."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *error) -> None:
        self.release()
