"""The one way to write a file or a folder: whole, or not at all. And what a path matches as a glob.

    with replacing(path) as part:
        part.write_text(...)                # or part.mkdir(), and files in it

``part`` lies in a folder of its own beside ``path``, on the same disk. It is flushed and then takes the place of
``path`` at once: a kill at any moment leaves the old one or the new one. The folder is locked while its process lives,
and removed when the block ends, however it ends; what a kill leaves is removed by whoever writes there next.
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import sqlite3
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import FULL, RunFailed

PART = ".megactx-part-"
OLD = "old"
WRONG = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
    *(errno.ELOOP, errno.ENOENT),
)
ELSEWHERE = "choose another place"
IN_RUN = "set folder=... to another disk; resume=auto goes on"
HERE, SWAP = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
# What SQLite says where it cannot write. It does not tell a disk that is full from one that fails.
SQLITE = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}
NO_SWAP = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # of file systems that cannot


def matches(path: Path) -> list[Path]:
    """What a path matches as a glob. A folder on the way that is there under its own name means itself: in ``c[1]/*``
    the brackets are no pattern where there is a folder ``c[1]``."""
    parent, rest = path, []
    while not parent.exists():  # the root is there
        parent, rest = parent.parent, [parent.name, *rest]
    found = glob.glob(os.path.join(glob.escape(str(parent)), *rest), recursive=True)
    return [Path(name) for name in found]


@contextmanager
def replacing(path: str | Path, remedy: str = ELSEWHERE) -> Iterator[Path]:
    """Yield a name that is not there yet; what the block writes under it takes the place of ``path``.

    Args:
        path: a file or a folder, there or not; a file takes the place of a file, a folder that of a folder.
        remedy: what a person may do where there is no room, or nothing may be written, see ``writing``.

    Raises:
        RunFailed: the disk is full.
        ValueError: nothing may be written there.
    """
    path = Path(path)
    with writing(path, remedy), _beside(path) as own:
        part = own / path.name
        yield part
        _share(part)
        flush(part)
        if part.is_dir() and path.is_dir() and not path.is_symlink():
            _swap(part, path, own)
        else:
            os.replace(part, path)
        sync(path.parent)


def write(path: str | Path, text: str, remedy: str = ELSEWHERE) -> None:
    """Write a small text file; arguments and errors as of ``replacing``."""
    with replacing(path, remedy) as part:
        part.write_text(text, encoding="utf-8")


def checksum(path: Path) -> str:
    """The sha256 of a file's content, in hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Say in words where something could not be written, and what can be done.

    Raises:
        RunFailed: the disk is full; what was saved under ``path`` before is whole.
        ValueError: nothing may be written there.
    """
    try:
        yield
    except (RunFailed, ValueError):
        raise
    except Exception as error:
        code = _code(error)
        if code in FULL:
            raise RunFailed(
                f"{path} could not be written: the disk is full, or a file may not grow ({error}). What was saved"
                f" there before is whole. Make room, or {remedy}"
            ) from error
        own = isinstance(error, OSError) and (error.filename is None or _inside(error.filename, path))
        if code in WRONG and (own or not isinstance(error, OSError)):
            raise ValueError(f"{path} cannot be written ({os.strerror(code)}); {remedy}") from error
        raise


def clear(folder: str | Path) -> None:
    """Remove what writers that were killed have left in a folder and below it; of a living one nothing is touched."""
    for own in Path(folder).rglob(f"{PART}*"):
        _clear_one(own)


def _share(path: Path) -> None:
    """Whoever may read the text files of a folder may read its weights: safetensors 0.8 writes for its owner alone."""
    umask = os.umask(0o077)  # reading it takes setting it
    os.umask(umask)
    for file in (path, *path.rglob("*.safetensors")):
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) == 0o600:
            file.chmod(0o666 & ~umask)


def flush(path: Path) -> None:
    """A file, or a folder with all that is in it, to the disk: a rename must not overtake what it names."""
    for inner in path.rglob("*") if path.is_dir() else ():
        if not inner.is_symlink():
            sync(inner)
    sync(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A locked folder in the one that holds ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for own in path.parent.glob(f"{PART}*"):
        _clear_one(own)
    handle = None
    while handle is None:
        own = Path(tempfile.mkdtemp(prefix=PART, dir=path.parent))
        with suppress(FileNotFoundError):  # another process may clear it before it is locked
            handle = os.open(own, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not own.exists():
                os.close(handle)
                handle = None
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        os.close(handle)


def _clear_one(own: Path) -> None:
    with suppress(OSError):
        handle = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for old in (own / OLD).iterdir() if (own / OLD).is_dir() else ():
                if not (own.parent / old.name).exists():  # killed between two renames
                    old.rename(own.parent / old.name)
            shutil.rmtree(own)
        finally:
            os.close(handle)


def _swap(new: Path, old: Path, own: Path) -> None:
    """Two folders change places at once; where the system cannot, by two renames, which ``_clear_one`` mends."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        if rename(HERE, os.fsencode(new), HERE, os.fsencode(old), SWAP) == 0:
            return
        if (code := ctypes.get_errno()) not in NO_SWAP:
            raise OSError(code, os.strerror(code), str(old))
    aside = own / OLD / old.name
    aside.parent.mkdir()
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except BaseException:
        os.rename(aside, old)
        raise


def sync(path: Path) -> None:
    """A file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _inside(name, path: Path) -> bool:
    """Whether an error is about a place that is written to, not about a file that is read meanwhile."""
    name = Path(os.fsdecode(name)).absolute() if isinstance(name, (str, bytes, os.PathLike)) else None
    return name is not None and (name.is_relative_to(path.absolute().parent) or path.absolute().is_relative_to(name))


def _code(error: Exception) -> int | None:
    """Of what the system said; safetensors and torch put it into words."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, sqlite3.OperationalError):
        return SQLITE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    text = str(error)
    if type(error).__name__ == "SafetensorError" and (found := re.search(r"\(os error (\d+)\)", text)):
        return int(found[1])
    # torch's writer says that a write failed, and not why; a full disk is what such a failure is, short of a broken one
    if isinstance(error, RuntimeError) and re.search("PytorchStreamWriter failed|No space left", text):
        return errno.ENOSPC
    return None
