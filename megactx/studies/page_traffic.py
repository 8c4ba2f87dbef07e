"""Which pages of a saved tree a session uses, and what a cache of another size or policy would have kept of them.

    python -m megactx.studies.page_traffic SESSION --path TEXTS --tokens 20000
    python -m megactx.studies.page_traffic SESSION --path TEXTS --megacontext recency

The session goes on with the text. What it uses of its stored tree is written down, page by page: each page once per
refocus. SESSION itself is not changed. Then libcachesim (``megactx[caches]``) replays that list against caches of
several sizes. ``Belady`` knows what comes; with pages of different sizes it is no strict bound.

    hit rate   share of uses that found their page in memory; the first use of a page never does
    floor      what no cache can reach: the share of uses that are not the first of their page
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megactx.apps.command_line import add_models, controller_of, observers_of
from megactx.evaluation.pictures import colours_of, legend, line, panel, picture
from megactx.evaluation.table import Report, Sheet, Table
from megactx.framework.errors import RunFailed
from megactx.framework.files import replacing
from megactx.memory.page_cache import Key
from megactx.runtime import Session

from .endurance import text_of
from .study import Options, command, usable

POLICIES = ("FIFO", "LRU", "Clock", "Sieve", "S3FIFO", "ARC", "LFU", "Belady")
SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)  # of all bytes that were used
NEVER = 2**62  # when a page is used next that is not used again


def recorded(session: Session, ids) -> tuple[list[Key], list[int]]:
    """Let a session read ids [T] as if it wrote them; -> pages used, each once per refocus, and bytes of each.

    Raises:
        ValueError: its tree is not stored, so there are no pages to read.
    """
    cache = session.tree.cache
    if cache is None:
        raise ValueError("the session has no tree on disk: ingest or save it first")
    uses: list[Key] = []
    cache.used = []

    def settle(event) -> None:
        uses.extend(dict.fromkeys(cache.used))
        cache.used.clear()

    session.observers.append(settle)
    try:
        session.append(ids, score=True)
    finally:
        session.observers.remove(settle)
        settle(None)
        cache.used = None
    return uses, [cache._size(key) for key in uses]


def next_uses(uses: Sequence) -> list[int]:
    """When each page is used next, ``NEVER`` where it is not."""
    later, found = {}, [NEVER] * len(uses)
    for place in range(len(uses) - 1, -1, -1):
        found[place] = later.get(uses[place], NEVER)
        later[uses[place]] = place
    return found


def hit_rate(policy: str, uses: Sequence, sizes: Sequence[int], room: int) -> float:
    """Of a cache of ``room`` bytes that starts empty.

    Raises:
        RunFailed: libcachesim is not installed.
    """
    try:
        import libcachesim
    except ImportError as error:
        raise RunFailed("page_traffic needs libcachesim: pip install 'megactx[caches]'") from error
    numbers = {page: number for number, page in enumerate(dict.fromkeys(uses))}
    cache, hits = getattr(libcachesim, policy)(cache_size=room), 0
    for place, (page, size, later) in enumerate(zip(uses, sizes, next_uses(uses), strict=True)):
        asked = libcachesim.Request(obj_id=numbers[page], obj_size=size, clock_time=place, next_access_vtime=later)
        hits += bool(cache.get(asked))
    return hits / len(uses)


def replayed(uses: Sequence, sizes: Sequence[int]) -> Table:
    """Hit rates by policy (carrier) and size of the cache in bytes (span)."""
    table, whole = Table(), sum(dict(zip(uses, sizes, strict=True)).values())
    for share in SHARES:
        room = max(int(share * whole), max(sizes))
        for policy in POLICIES:
            table.add("hit rate", hit_rate(policy, uses, sizes, room), carrier=policy, span=room, n=len(uses))
    return table


def sheet(table: Table) -> Sheet:
    columns = [(policy, "hit rate", ".4f") for policy in POLICIES]
    spans = table.names("span")
    rows = [
        [f"{span / 1e6:,.2f}", *(format(table.point(carrier=name, span=span), form) for name, _, form in columns)]
        for span in spans
    ]
    return Sheet("What a cache would have kept", ["MB", *POLICIES], rows)


def plot(table: Table, path: Path) -> None:
    with picture(path, (6.4, 4.2), columns=1) as grid:
        axes = grid[0][0]
        for name, colour in colours_of(POLICIES).items():
            points = [(row["span"] / 1e6, row["point"]) for row in table.pick(carrier=name)]
            line(axes, points, color=colour, label=name)
        panel(axes, "", "MB of pages in memory", "hit rate")
        legend(axes)


def options(given: Options) -> None:
    given.parser.add_argument("session", metavar="SESSION", help="folder of a saved session")
    add_models(given.parser, budget=512)
    given.path()
    given.number("tokens", 16_384, "that the session reads")
    given.number("seed", 0, "of the order of the documents", least=0)
    given.add("--out", default="runs/page_traffic", help="folder of the results")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """One session over a stored tree, then its list of pages against caches.

    Raises:
        ValueError: no such session, no tree, or too little text.
        RunFailed: libcachesim is not installed.
    """
    controller, out = controller_of(args, tree=True), usable(Path(args.out))
    with Session.load(args.session, controller, observers_of(args, controller)) as session:
        ids, before = text_of(controller.models.base.tokenizer, args.path, args.tokens, args.seed), session.length
        uses, sizes = recorded(session, ids)
    if not uses:
        raise ValueError(f"--tokens={args.tokens}: the session did not use its tree yet; let it read more")
    first = out / "uses.csv"
    with replacing(first) as part, part.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("level", "part", "page", "bytes"))
        rows.writerows((*key, size) for key, size in zip(uses, sizes, strict=True))
    table, pages = replayed(uses, sizes), dict(zip(uses, sizes, strict=True))
    floor = 1 - len(pages) / len(uses)
    notes = [
        f"{len(ids):,} tokens behind {before:,}: {len(uses):,} uses of {len(pages):,} pages,"
        f" {sum(pages.values()) / 1e6:.1f} MB. No cache can have more than {floor:.4f}.",
        f"Kept beside this: {first}.",
    ]
    about = {name: getattr(args, name) for name in ("budget", "megacontext", "positions", "seed")}
    about |= {"tokens": len(ids), "behind": before, "floor": floor}
    yield (
        out / "page_traffic",
        Report("Pages of a session", table, [sheet(table)], "", notes, about, partial(plot, table)),
    )


main = command("page_traffic", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
