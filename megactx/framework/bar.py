"""A bar around a loop that takes long: rich in a terminal, a line now and then elsewhere. Training has its own."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar

from rich.progress import track

EVERY = 30  # seconds between two lines
LONG = 600  # seconds that are told at once
SHORTER: ContextVar[str] = ContextVar("shorter", default="")  # what the command that is running can be made short by


def bar(what: str) -> Callable[[Iterable], Iterator]:
    """-> what wraps an iterable, to show how far it is."""

    def shown(items: Iterable) -> Iterator:
        return iter(track(items, description=what)) if sys.stdout.isatty() else _lines(items, what)

    return shown


def quiet_libraries() -> None:
    """Without a terminal the bars of datasets and transformers are silent."""
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def _lines(items: Iterable, what: str) -> Iterator:
    of = f" of {len(items)}" if isinstance(items, Sized) else ""
    began = told = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        gone = (now := time.monotonic()) - began
        left = gone / done * (len(items) - done) if isinstance(items, Sized) else 0
        if now - told > EVERY or (done == 1 and left > LONG):  # long work says so as soon as it can be known
            told = now
            print(f"{what}: {done}{of}, {gone:.0f} s" + (f", about {left:.0f} s left" if left else ""), flush=True)
            if done == 1 and (how := SHORTER.get()):
                print(f"That is about {(gone + left) / 60:.0f} minutes. Shorter: {how}.", flush=True)
