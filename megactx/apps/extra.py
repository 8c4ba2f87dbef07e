"""What only some of the commands need, and not everybody installs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(what: str) -> Iterator[None]:
    """Imports of packages of the extra ``apps``.

    Args:
        what: needs them, for the message.

    Raises:
        ValueError: one is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what}: pip install 'megactx[apps]' first ({error})") from error
