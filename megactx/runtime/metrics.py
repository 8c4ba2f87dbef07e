"""What a session says of itself with each refocus, in one place; names and units are in docs/telemetry.md.

Whoever keeps it reads it here: the observer of ``apps.telemetry``, and ``callbacks=sessions`` of a training run.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megactx.memory.page_cache import News
from megactx.parts.models import Models

from .events import Refocused

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
BINS = 10  # of scores, from -1 to 1
PARTS = ("gist", "room", "score", "allocate", "read")  # of a refocus
OWN = ("room", "score", "allocate")  # what a plain model has nothing of, and what must cost next to nothing


# Whose metric it is, by the first word of its name: a section of panels each.
SUBSYSTEMS = {
    "window": ("window", "compression", "history", "tokens", "refocuses"),
    "tree": ("tree", "rope"),
    "LensNet": ("lens",),
    "allocator": ("edits", "swap_rate", "residency"),
    "attention": ("kv", "attention"),
    "time": ("decode", "refocus"),
    "storage": ("pages",),
    "prediction": ("prediction", "drafts"),
}


@dataclass(frozen=True)
class Metric:
    """One name."""

    kind: str
    unit: str  # UCUM, as OpenTelemetry wants it; words in braces are no unit
    meaning: str
    attribute: str | None = None


METRICS = {
    "megactx.tokens": Metric(COUNTER, "{token}", "Tokens that entered a history, decoded or appended", "how"),
    "megactx.refocuses": Metric(COUNTER, "{refocus}", "Refocuses"),
    "megactx.history.size": Metric(GAUGE, "{token}", "Tokens of the longest history"),
    "megactx.window.entries": Metric(GAUGE, "{entry}", "Entries of a working context by LOD, mean of rows", "lod"),
    "megactx.window.utilisation": Metric(GAUGE, "1", "Entries over the budget, mean of rows"),
    "megactx.compression": Metric(GAUGE, "1", "Tokens of the history per entry of the working context"),
    "megactx.edits": Metric(COUNTER, "{edit}", "Edits of working contexts: expand, collapse, or room", "kind"),
    "megactx.swap_rate": Metric(GAUGE, "1", "Fine entries created or removed over entries, of the last refocus"),
    "megactx.residency": Metric(GAUGE, "{refocus}", "Refocuses since the gists that were edited last changed, mean"),
    "megactx.lens.price": Metric(GAUGE, "{nat}", "What an entry must be worth to be shown in detail, mean of rows"),
    "megactx.lens.scores": Metric(COUNTER, "{entry}", "Entries that LensNet scored, by score from .. to", "score"),
    "megactx.tree.depth": Metric(GAUGE, "{level}", "Levels of gists of the longest history"),
    "megactx.tree.nodes": Metric(GAUGE, "{node}", "Gists of the longest history by LOD: how wide its tree is", "lod"),
    "megactx.rope.scale": Metric(GAUGE, "1", "Learned factor of the spread of positions by LOD", "lod"),
    "megactx.decode.duration": Metric(HISTOGRAM, "s", "Time per decoded token, refocuses left out"),
    "megactx.refocus.duration": Metric(HISTOGRAM, "s", "Time of a refocus by part", "part"),
    "megactx.refocus.overhead": Metric(GAUGE, "1", "Room, scores and edits over the time of decoding, last refocus"),
    "megactx.pages.uses": Metric(
        COUNTER, "{use}", "Uses of pages of stored trees by the tier that had the page", "tier"
    ),
    "megactx.pages.read.duration": Metric(HISTOGRAM, "s", "Time to bring a page into memory by tier", "tier"),
    "megactx.pages.size": Metric(GAUGE, "By", "Bytes that a tier holds, all trees of the window", "tier"),
    "megactx.pages.evicted": Metric(COUNTER, "{page}", "Pages that left a tier for want of room", "tier"),
    "megactx.pages.queue": Metric(GAUGE, "{page}", "Pages that were asked for ahead and are not there yet"),
    "megactx.pages.precision": Metric(
        GAUGE, "1", "Share of the pages asked for ahead that were used, least of the trees"
    ),
    "megactx.kv.entries": Metric(COUNTER, "{entry}", "Keys and values of a window: kept, or computed anew", "state"),
    "megactx.drafts": Metric(COUNTER, "{token}", "Tokens of drafts: taken, or read in vain", "state"),
    "megactx.attention.pairs": Metric(
        GAUGE, "1", "Pairs seen under attention=mega over those of plain attention, mean of rows"
    ),
    "megactx.prediction.rank": Metric(
        GAUGE, "1", "Mean reciprocal rank of the gist of the block that came, among the newest 256", "by"
    ),
}


class Measured(NamedTuple):
    """One value; of a counter, what is added."""

    name: str
    value: float
    attribute: str | None = None  # value of the metric's own


def measured(event: Refocused) -> Iterator[Measured]:
    """All that a refocus says; what it says nothing of is left out."""
    rows, seconds = len(event.after), event.seconds
    new, longest, decode = int(event.new.sum()), int(event.tokens.max()), event.seconds.get("decode", 0.0)
    yield Measured("megactx.tokens", new, "decoded" if decode else "appended")
    yield Measured("megactx.refocuses", 1)
    yield Measured("megactx.history.size", longest)
    block, depth = event.after[0].block_size, 0
    while block ** (depth + 1) <= longest:
        depth += 1
    lods = torch.cat([view.lod for view in event.after])
    for lod, count in enumerate(lods.bincount(minlength=depth + 1).tolist()):  # 0 too: a gauge keeps what it was told
        yield Measured("megactx.window.entries", count / rows, str(lod))
    yield Measured("megactx.window.utilisation", sum(event.utilisation) / rows)
    yield Measured("megactx.compression", int(event.tokens.sum()) / max(1, len(lods)))
    if event.room is not None:
        yield Measured("megactx.edits", len(event.room), "room")
    if event.scores is not None:
        yield from _focused(event)
    for lod in range(1, depth + 1):
        yield Measured("megactx.tree.nodes", longest // block**lod, str(lod))
    yield Measured("megactx.tree.depth", depth)
    if decode and new:
        yield Measured("megactx.decode.duration", decode * rows / new)
        yield Measured("megactx.refocus.overhead", sum(seconds.get(part, 0.0) for part in OWN) / decode)
    for part in PARTS:
        if part in seconds:
            yield Measured("megactx.refocus.duration", seconds[part], part)
    if event.pages:
        yield from _paged(event.pages)
    if event.reused is not None:
        kept, read = int(event.reused.sum()), int(event.read.sum())
        yield Measured("megactx.kv.entries", kept, "kept")
        yield Measured("megactx.kv.entries", read - kept, "computed")
    if event.drafts is not None:
        for state, count in zip(("taken", "vain"), event.drafts, strict=True):
            yield Measured("megactx.drafts", count, state)
    if event.pairs is not None:
        yield Measured("megactx.attention.pairs", float(event.pairs.mean()))
    if event.foretold is not None:
        for by, rank in zip(("readout", "map"), event.foretold.rank.nanmean(0).tolist(), strict=True):
            if math.isfinite(rank):
                yield Measured("megactx.prediction.rank", rank, by)


def _paged(trees: tuple[News, ...]) -> Iterator[Measured]:
    """What there is of stored trees only."""
    sizes, precisions = {}, [tree.precision for tree in trees if tree.precision is not None]
    for tree in trees:
        for name, tier in tree.tiers.items():
            yield Measured("megactx.pages.uses", tier.uses, name)
            yield Measured("megactx.pages.evicted", tier.evicted, name)
            sizes.setdefault(name, []).append(tier.bytes)
            for seconds in tier.seconds:
                yield Measured("megactx.pages.read.duration", seconds, name)
    for name, each in sizes.items():
        yield Measured("megactx.pages.size", sum(each), name)
    yield Measured("megactx.pages.queue", sum(tree.queue for tree in trees))
    if precisions:
        yield Measured("megactx.pages.precision", min(precisions))


def _focused(event: Refocused) -> Iterator[Measured]:
    """What there is with a LensNet only."""
    yield Measured("megactx.edits", int(event.edits.expand.sum()), "expand")
    yield Measured("megactx.edits", int((~event.edits.expand).sum()), "collapse")
    yield Measured("megactx.swap_rate", float(event.telemetry.swap_rate.mean()))
    if math.isfinite(residency := float(event.telemetry.residency.nanmean())):
        yield Measured("megactx.residency", residency)
    if math.isfinite(price := float(event.scores.price.mean())):
        yield Measured("megactx.lens.price", price)
    own = [event.scores.score[row, : len(view.lod)] for row, view in enumerate(event.scored)]
    counts = torch.histc(torch.cat(own).float().cpu(), BINS, -1, 1)
    for place, count in enumerate(counts.tolist()):
        yield Measured("megactx.lens.scores", int(count), bins()[place])


def subsystem(name: str) -> str:
    """The part of megactx that a metric is of."""
    word = name.split(".")[1]
    return next(part for part, words in SUBSYSTEMS.items() if word in words)


def bins() -> list[str]:
    """Names of the bins of scores, from the lowest: '-1.0 to -0.8', ..."""
    edges = [round(-1 + 2 * place / BINS, 3) for place in range(BINS + 1)]
    return [f"{low:.1f} to {high:.1f}" for low, high in zip(edges[:-1], edges[1:], strict=True)]


def rope_scales(models: Models) -> Iterator[Measured]:
    """Factors of the spread of positions that a GistNet has learned; none where it learns none."""
    spread = getattr(models.gistnet, "spread", None)
    if getattr(spread, "log_scale", None) is not None:
        for place, scale in enumerate(spread.log_scale.detach().exp().tolist()):
            yield Measured("megactx.rope.scale", scale, str(place + 1))
