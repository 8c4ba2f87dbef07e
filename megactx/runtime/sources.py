"""Which blocks a session's base LM reads in full, and what each of them is from.

part       file            lines        tokens
library    guide.md        from 120     4,096 to 4,159
(history)  src/main.py     from 7         640 to 671
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megactx.memory import Composite

from .part_files import Origin, Origins, ingested
from .session import Session


@dataclass(frozen=True)
class Opened:
    """Blocks that stand one behind the other, all of one file.

    Args:
        part: its name; ``None``: the session's own history.
        start, stop: tokens start .. stop - 1 of the part.
        origin: of the first token; ``None``: nobody has noted it.
        licence: of the part, or of what the history took up; empty where none is noted.
    """

    part: str | None
    start: int
    stop: int
    origin: Origin | None
    licence: str = ""


def opened(session: Session) -> list[Opened]:
    """The blocks that are read in full, in the order of the window. A block counts where all of its tokens are read.

    Raises:
        ValueError: a session without a window.
    """
    stream = session.stream
    if session.context is None:
        return []
    shown, seen = getattr(stream, "shown", None) or stream.context, stream.seen
    parts = {part.name: part for part in session.parts}
    own = str(session.about.get("licence", ""))
    if not isinstance(seen, Composite):
        count = int(shown.counts[0])
        return _licensed(_runs(None, shown.lod[0, :count], shown.index[0, :count], stream.block, _own(session)), own)
    out = []
    for number, (lod, index) in enumerate(seen.segments(shown)):
        name = seen.name_of(number)
        origin = _own(session) if name is None else parts[name].origin
        licence = own if name is None else parts[name].licence
        out += _licensed(_runs(name, lod, index, stream.block, origin), licence)
    return out


def _licensed(runs: Iterator[Opened], licence: str) -> list[Opened]:
    return [replace(run, licence=licence) for run in runs]


def origin(session: Session, part: str | None, token: int) -> Origin | None:
    """What a token of a part, or with ``None`` of the session's history, is from."""
    if part is None:
        return _own(session)(token)
    found = [own for own in session.parts if own.name == part]
    return found[0].origin(token) if found else None


def _own(session: Session):
    try:
        origins = Origins(ingested(session.about), session.stream.block)
    except (TypeError, ValueError, KeyError, AttributeError):  # a session without its notes is a session still
        origins = Origins([], session.stream.block)
    return lambda token, count=1: origins.of(token, session.text, count)


def _runs(name: str | None, lod, index, block: int, origin) -> Iterator[Opened]:
    raw = index[lod == 0]
    blocks, counts = (raw // block).unique_consecutive(return_counts=True)
    run: Opened | None = None
    for number in blocks[counts == block].tolist():
        start = number * block
        found = origin(start, block)
        if run is not None and run.stop == start and _file(run.origin) == _file(found):
            run = Opened(name, run.start, start + block, run.origin)
            continue
        if run is not None:
            yield run
        run = Opened(name, start, start + block, found)
    if run is not None:
        yield run


def _file(origin: Origin | None) -> tuple[str, str] | None:
    return None if origin is None else (origin.file, origin.state)
