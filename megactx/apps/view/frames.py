"""A refocus as plain JSON, for the page; the same live and in a file. Texts are without what could hide in them.

A window is runs of entries of one LOD, [[lod, count], ...] from token 0 on: entries stand one behind the other, so
where each begins follows. A node is [lod, index]. With parts there are ``lanes``, [[name, first, tokens,
licence], ...] in the order of the window: tokens of a part are numbered from ``first`` on, so that a node is of one
part; the history's lane is the last, and has no name. ``near`` are blocks that are like what is expected next,
[[index, cosine], ...].
"""

import math

from megactx.focus import Edits
from megactx.focus.replay import View
from megactx.runtime import Refocused, Session
from megactx.runtime.text import printable

from ..strip import COLOURS

SHOWN = (160, 48)  # tokens of a node's text that are shown, from its beginning and from its end


def frame(event: Refocused, row: int = 0) -> dict:
    """What the page draws of a refocus of one row."""
    scores, told = event.scores, event.telemetry
    scored = event.scored[row]
    out = standing(event.number, int(event.tokens[row]), event.after[row], event.budget) | {
        "new": int(event.new[row]),
        "decoded": event.seconds.get("decode", 0.0) > 0,
        "threshold": event.threshold,
        "room": _edits(event.room, row),
        "edits": _edits(event.edits, row),
        "ms": {name: round(1000 * seconds, 2) for name, seconds in event.seconds.items()},
        "reuse": _number(event.reuse),
    }
    if scores is not None:
        out["scored"] = _runs(scored)
        out["scores"] = [round(s, 2) for s in scores.score[row, : len(scored.lod)].float().cpu().tolist()]
        out["price"] = _number(float(scores.price[row]))
        out["swap"] = _number(float(told.swap_rate[row]))
        out["residency"] = _number(float(told.residency[row]))
    if event.foretold is not None:
        view = event.after[row]
        first = view.parts[-1][1] // view.block_size if view.parts else 0
        out["near"] = [[first + index, round(cosine, 3)] for index, cosine in event.foretold.near(row)]
    return out


def standing(number: int, tokens: int, view: View, budget: int) -> dict:
    """A window as it stands, of which no refocus is known."""
    found = {"number": number, "tokens": tokens, "budget": budget, "window": _runs(view), "edits": [], "room": []}
    return found | ({"lanes": [list(lane) for lane in view.parts]} if view.parts else {})


def about(session: Session) -> dict:
    """What does not change: for the page's legend."""
    settings = session.controller.settings
    return {
        "model": session.controller.models.name,
        "block": session.stream.block,
        "budget": settings.budget,
        "kind": "focus" if session.stream.focus.lensnet is not None else "recency",
        "expects": session.controller.models.prediction is not None,
        "colours": COLOURS,
    }


def text(session: Session, lod: int, index: int) -> dict:
    """The text behind a node: its beginning and its end.

    Raises:
        ValueError: there is no such node.
    """
    width = session.stream.block**lod if 0 <= lod <= 12 else 0
    address = index * width
    part, start = session.place(address) if 0 <= address < 2**48 else (None, -1)
    length = session.length if part is None else int(part.tree.lengths[0])
    if width < 1 or not 0 <= start < length:
        raise ValueError(f"node (lod {lod}, index {index}) is not in this history")
    count, (first, last) = min(width, length - start), SHOWN
    if count <= first + last:
        return {"text": printable(session.text_at(address, count)), "rest": ""}
    begins, ends = session.text_at(address, first), session.text_at(address + count - last, last)
    return {"text": printable(begins), "rest": printable(ends)}


def _runs(view: View) -> list[list[int]]:
    lods, counts = view.lod.unique_consecutive(return_counts=True)
    return [list(pair) for pair in zip(lods.tolist(), counts.tolist(), strict=True)]


def _edits(edits: Edits | None, row: int) -> list[list]:
    if edits is None:
        return []
    own = edits[edits.row == row]
    return [
        [int(expand), lod, index]
        for expand, lod, index in zip(own.expand.tolist(), own.lod.tolist(), own.index.tolist(), strict=True)
    ]


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return None if value is None or not math.isfinite(value) else round(value, 5)
