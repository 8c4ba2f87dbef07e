"""What a setting may be, declared once: by the annotation of the argument that takes it.

    def __init__(self, spans: Count, dropout: Share, objective: Literal["kl", "delta_nll"] = "kl")

``declared`` checks the arguments of a class whenever one is built, ``framework.validate`` those of a config before
anything is built, and docs/settings.md says what is allowed; all three by ``problems``. Only plain values are judged:
what is annotated with a class of anybody's own fits.
"""

import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from ..errors import did_you_mean

Seed = Annotated[int, Ge(0), Le(2**32 - 1)]
Count = Annotated[int, Ge(1)]
AtLeast2 = Annotated[int, Ge(2)]
Whole = Annotated[int, Ge(0)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
PartOf = Annotated[float, Gt(0), Le(1)]  # a share that is not nothing


@dataclass(frozen=True)
class ArgumentsOf:
    """Annotated[dict, ArgumentsOf(kind)]: keyword arguments of a class; with ``each``, a mapping of name -> those of
    ``kind(name)``."""

    kind: Callable
    each: bool = False

    def problems(self, value: Mapping, where: str) -> Iterator[str]:
        for name, settings in value.items() if self.each else [(None, value)]:
            try:
                known = hints(self.kind(name) if self.each else self.kind)
            except ValueError as error:
                yield str(error)
                continue
            inside = where if name is None else f"{where}.{name}"
            for key, inner in (settings or {}).items():
                if key in known:
                    yield from problems(inner, known[key], f"{inside}.{key}")


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
WORDS |= {dict: "a mapping", list: "a list"}


def hints(target) -> dict[str, object]:
    """name -> annotation of the arguments of a class or function; without those that cannot be read.

    Of a class of this package that hands ``**settings`` on, those of its parent too.
    """
    try:
        own = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    except (NameError, TypeError, AttributeError):  # an annotation of something that is not imported
        return {}
    own.pop("return", None)
    inherited = inspect.isclass(target) and target.__module__.startswith("megactx.")
    if inherited and any(p.kind == p.VAR_KEYWORD for p in inspect.signature(target).parameters.values()):
        own = hints(target.__mro__[1]) | own
    return own


def problems(value, hint, where: str) -> Iterator[str]:
    """A line for each plain value in ``value`` that may not be given where an annotation stands.

    Args:
        where: the name of the setting; keys of mappings are added to it.
    """
    if value is not None:
        hint = next(filter(typing.is_typeddict, typing.get_args(hint)), hint)  # of ``Settings | None``
    origin, bounds = typing.get_origin(hint), ()
    if origin is Annotated:
        hint, *bounds = typing.get_args(hint)
        origin = typing.get_origin(hint)
    taken = next((bound for bound in bounds if isinstance(bound, ArgumentsOf)), None)
    if taken and isinstance(value, Mapping):
        yield from taken.problems(value, where)
    elif typing.is_typeddict(hint) and isinstance(value, Mapping):
        known = typing.get_type_hints(hint, include_extras=True)
        for key in value:
            if key not in known:
                meant = did_you_mean(f"{where}.{key}", [f"{where}.{name}" for name in known])
                yield f"{where}.{key}: no such setting.{meant}"
        for key, inner in known.items():
            if key in value:
                yield from problems(value[key], inner, f"{where}.{key}")
            elif key in hint.__required_keys__:
                yield f"{where}.{key}: it is needed"
    elif origin is dict and isinstance(value, Mapping) and len(typing.get_args(hint)) == 2:
        for key, inner in value.items():
            yield from problems(inner, typing.get_args(hint)[1], f"{where}.{key}")
    elif not _fits(value, hint, bounds):
        said = "null" if value is None else value
        each = [allowed(inner) for inner in typing.get_args(hint)] if origin is list else []
        words = allowed(Annotated[hint, *bounds] if bounds else hint)
        yield f"{where}={said}: allowed is {words}{f', each {each[0]}' if each and each[0] else ''}"


def fits(value, hint) -> bool:
    """Whether a plain value may be given where an annotation stands; annotations that say nothing plain take all."""
    return not any(problems(value, hint, ""))


def allowed(hint) -> str:
    """What fits, in words."""
    # In one order: typing keeps a union as it was written first, in whatever library.
    order = sorted(_plain(hint) or [], key=lambda kind: list(WORDS).index(kind[0]) if kind[0] in WORDS else -1)
    return " or ".join(dict.fromkeys(_words(kind, bounds) for kind, bounds in order))


def _words(kind, bounds) -> str:
    low = [f" from {b.ge:g}" if isinstance(b, Ge) else f" above {b.gt:g}" for b in bounds if isinstance(b, Ge | Gt)]
    to = ", up to" if any(isinstance(b, Gt) for b in bounds) else " to"
    high = [f"{to} {b.le:g}" if isinstance(b, Le) else f", below {b.lt:g}" for b in bounds if isinstance(b, Le | Lt)]
    return "".join([WORDS.get(kind, str(kind)), *low, *high])


def _plain(hint, bounds=()) -> list[tuple] | None:
    """The plain kinds with their bounds, and the values of literals, that an annotation names; ``None`` where it names
    others too."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _plain(arguments[0], arguments[1:])
    if origin in (typing.Union, types.UnionType):
        parts = [_plain(argument) for argument in arguments]
        return None if None in parts else [kind for part in parts for kind in part]
    if origin is typing.Literal:
        return [(value, ()) for value in arguments]
    kind = origin or hint
    if kind in WORDS:
        return [(kind, bounds)]
    if not inspect.isclass(kind):
        return None
    if typing.is_typeddict(kind) or issubclass(kind, Mapping):
        return [(dict, ())]
    return [(list, bounds)] if kind in (tuple, Sequence) else None


def _fits(value, hint, bounds) -> bool:
    plain = _plain(hint, bounds)
    if plain is None or not any(_is(value, kind) and _within(value, bounds) for kind, bounds in plain):
        return plain is None
    each = typing.get_args(hint)[:1] if typing.get_origin(hint) is list else ()
    return all(fits(item, inner) for inner in each for item in value)


def _within(value, bounds) -> bool:
    tests = {
        Ge: lambda b: value >= b.ge,
        Gt: lambda b: value > b.gt,
        Le: lambda b: value <= b.le,
        Lt: lambda b: value < b.lt,
    }
    return value is None or all(tests[type(bound)](bound) for bound in bounds if type(bound) in tests)


def _is(value, kind) -> bool:
    if kind not in WORDS:
        return value == kind  # of a literal
    if kind in (int, float) and isinstance(value, bool):
        return False
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, Mapping if kind is dict else (list, tuple) if kind is list else kind)


def check(target, given: Mapping, where: str, elsewhere: Mapping[str, str] | None = None) -> None:
    """See that settings may be given to a class.

    Args:
        where: the group in which a user sets them, such as ``gistnet``, or none; ``elsewhere``: argument -> its full
            name where it is set in another.

    Raises:
        ValueError: a line for each that may not.
    """
    names, lines = elsewhere or {}, []
    for name, hint in hints(target).items():
        if name in given:
            lines += problems(given[name], hint, names.get(name, f"{where}.{name}" if where else name))
    if lines:
        raise ValueError("\n".join(line.replace(": allowed is", " is not allowed:", 1) for line in lines))


def declared(where: str = "", **elsewhere: str):
    """A class whose arguments are checked against their annotations whenever one is built; as ``check`` does it."""

    def wrap(kind: type) -> type:
        build, signature = kind.__init__, inspect.signature(kind.__init__)

        @functools.wraps(build)
        def checked(self, *positional, **named):
            given = signature.bind(self, *positional, **named).arguments
            check(kind, given | given.get("settings", {}), where, elsewhere)
            build(self, *positional, **named)

        kind.__init__ = checked
        return kind

    return wrap


def like(value, example) -> bool:
    """Whether a value is of the kind of the one that it replaces; ``None`` is of every kind, a number of one kind."""
    return value is None or example is None or fits(value, _kind(example))


def word(example) -> str:
    """The kind of a value in words."""
    return WORDS[_kind(example)]


def _kind(example) -> type:
    return float if type(example) is int else type(example)
