"""Whether a value of a config fits what takes it: by the annotation of the argument, or by the value that it replaces.

Only plain values are judged. What is annotated with a class of anybody's own fits.
"""

import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
WORDS |= {dict: "a mapping", list: "a list"}


def hints(target) -> dict[str, object]:
    """name -> annotation of the arguments of a class or function; without those that cannot be read."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):  # an annotation of something that is not imported
        return {}


def fits(value, hint) -> bool:
    """Whether a plain value may be given where an annotation stands; annotations that say nothing plain take all."""
    plain = _plain(hint)
    return plain is None or any(_is(value, kind) for kind in plain)


def allowed(hint) -> str:
    """What fits, in words."""
    # In one order: typing keeps a union as it was written first, in whatever library.
    order = sorted(_plain(hint), key=lambda kind: list(WORDS).index(kind) if kind in WORDS else -1)
    return " or ".join(dict.fromkeys(WORDS.get(kind, str(kind)) for kind in order))


def _plain(hint) -> list | None:
    """The plain kinds, and the values of literals, that an annotation names; ``None`` where it names others too."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [_plain(argument) for argument in arguments]
        return None if None in parts else [kind for part in parts for kind in part]
    if origin is typing.Literal:
        return list(arguments)
    kind = origin or hint
    if kind in WORDS:
        return [kind]
    if not inspect.isclass(kind):
        return None
    if issubclass(kind, Mapping):
        return [dict]
    return [list] if kind in (tuple, Sequence) else None


def _is(value, kind) -> bool:
    if kind not in WORDS:
        return value == kind  # of a literal
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and not math.isnan(value)
    return isinstance(value, kind)


def like(value, example) -> bool:
    """Whether a value is of the kind of the one that it replaces; ``None`` is of every kind, a number of one kind."""
    return value is None or example is None or fits(value, _kind(example))


def word(example) -> str:
    """The kind of a value in words."""
    return WORDS[_kind(example)]


def _kind(example) -> type:
    return float if type(example) is int else type(example)
