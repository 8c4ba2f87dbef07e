"""What only some of the commands need, and not everybody installs."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(what: str, name: str = "apps") -> Iterator[None]:
    """Imports of packages of an extra.

    Args:
        what: needs them, for the message.
        name: of the extra.

    Raises:
        ValueError: one is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{what}: pip install 'megactx[{name}]' first ({error})") from error
