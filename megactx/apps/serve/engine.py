"""The one thread that touches the model: turns of many keys, a token or a piece of a question each in a round.

Tokens of answers are read in one pass of the model for all turns, see ``runtime.together``.

A key has one memory, so it has one turn at a time. At most so many memories are open; of the others the disk has all.
Who waits, waits in the order of asking, and not more than ``queue`` at a time.
"""

import math
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from megactx.framework.errors import verdict
from megactx.runtime import Controller
from megactx.runtime.together import read_together

from ..framing import framing_of
from .memory import Answered, Asked, Memory

OWN = 8  # turns of one key that wait, at most
GRACE = 4.0  # seconds that turns under way have when the end comes
WAITS = 10_000  # newest waits that are remembered
FAILED = "The server could not answer. The memory is as it was after the last finished turn."


class Full(Exception):
    """Too many wait."""


class Closing(Exception):
    """The end has begun."""


class Turn:
    """A request on its way.

    Args:
        name: of the memory.
        tell: called from the engine's thread: with text; with an ``Answered`` at the end, when the turn is saved; or
            with an exception.
    """

    def __init__(self, name: str, asked: Asked, tell: Callable[[object], None]):
        self.name, self.asked, self.tell = name, asked, tell
        self.cancelled = False  # nobody listens any more
        self.came = time.monotonic()
        self.steps: Iterator[None] | None = None


class Engine:
    """Memories in a folder, and turns.

    Args:
        folder: of the memories, one folder each.
        open: memories in memory at a time, at most.
        queue: turns that wait, at most.
        curation: how memories are kept clean; ``None``: they are not.
    """

    def __init__(self, folder: Path, controller: Controller, open: int, queue: int, observers=(), curation=None):
        self.folder, self.controller, self.open, self.queue = folder, controller, open, queue
        self.observers, self.curation = list(observers), curation
        self.framing = framing_of(controller.models.base.tokenizer)
        self.finished = self.together = 0  # turns; tokens that were read together with others
        self._memories: OrderedDict[str, Memory] = OrderedDict()  # the one that was used last is the last
        self._waiting: deque[Turn] = deque()
        self._active: list[Turn] = []
        self._waits: deque[float] = deque(maxlen=WAITS)
        self._news, self._ends = threading.Condition(), math.inf
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> "Engine":
        """Begin to work."""
        self._thread.start()
        return self

    def submit(self, turn: Turn) -> None:
        """Have a turn answered; from any thread.

        Raises:
            Full: too many wait.
            Closing: the end has begun.
        """
        with self._news:
            if self._ends < math.inf:
                raise Closing
            if len(self._waiting) >= self.queue or sum(t.name == turn.name for t in self._waiting) >= OWN:
                raise Full
            self._waiting.append(turn)
            self._news.notify()

    def state(self) -> dict:
        """Numbers for whoever watches: seconds of waiting are those of the newest turns."""
        with self._news:
            waits = sorted(self._waits)
            numbers = {"waiting": len(self._waiting), "active": len(self._active), "open": len(self._memories)}
        quantiles = {f"wait_p{p}": round(waits[len(waits) * p // 100], 3) if waits else 0.0 for p in (50, 99)}
        return numbers | {"finished": self.finished, "together": self.together} | quantiles

    def end(self) -> None:
        """Take no more; who waits is told so, and turns under way have ``GRACE`` seconds."""
        with self._news:
            self._ends = min(self._ends, time.monotonic() + GRACE)
            waiting, self._waiting = [*self._waiting], deque()
            self._news.notify()
        for turn in waiting:
            turn.tell(Closing())

    def close(self) -> None:
        """End, and wait until all is saved."""
        self.end()
        self._closed = True
        with self._news:
            self._news.notify()
        self._thread.join()
        for memory in self._memories.values():
            memory.close()
        self._memories.clear()

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._active or self._waiting or self._closed)
                self._admit()
                if self._closed and not self._active:
                    return
                active = [*self._active]
            self._read(active)
            for turn in active:
                self._step(turn)

    def _read(self, turns: list[Turn]) -> None:
        """Tokens of answers, together. Where that fails, each turn reads its own, and fails alone."""
        memories = [self._memories[turn.name] for turn in turns if turn.name in self._memories]
        try:
            self.together += read_together(memory.session.stream for memory in memories)
        except Exception as error:
            print(f"megactx: reading together: {verdict(error)[1]}", file=sys.stderr, flush=True)

    def _admit(self) -> None:
        """Whoever may begin begins, in the order of asking."""
        busy = {turn.name for turn in self._active}
        self._waiting = deque(turn for turn in self._waiting if not turn.cancelled)
        for turn in [*self._waiting]:
            if len(self._active) >= self.open:
                return
            if turn.name in busy:
                continue
            self._waiting.remove(turn)
            busy.add(turn.name)
            self._waits.append(time.monotonic() - turn.came)
            turn.steps = self._work(turn)
            self._active.append(turn)

    def _step(self, turn: Turn) -> None:
        """A step of a turn. What fails is told, and leaves the memory as it was saved last."""
        try:
            next(turn.steps)
            return
        except StopIteration:
            pass
        except Exception as error:
            print(f"megactx: memory {turn.name}: {verdict(error)[1]}", file=sys.stderr, flush=True)
            if (memory := self._memories.pop(turn.name, None)) is not None:
                memory.close()
            turn.tell(RuntimeError(FAILED))
        with self._news:
            self._active.remove(turn)

    def _work(self, turn: Turn) -> Iterator[None]:
        memory, done = self._opened(turn.name), Answered()
        with closing(memory.turn(turn.asked, done)) as pieces:
            for text in pieces:
                if text is None:
                    yield
                else:
                    turn.tell(text)
                if turn.cancelled or time.monotonic() > self._ends:
                    break
        if done.written == 0:  # cut while it was read: it has not been
            self._memories.pop(turn.name).close()
            turn.tell(Closing())
            return
        memory.save()
        self.finished += 1
        turn.tell(done)

    def _opened(self, name: str) -> Memory:
        if name in self._memories:
            self._memories.move_to_end(name)
            return self._memories[name]
        busy = {turn.name for turn in self._active}
        for other in [*self._memories]:
            if len(self._memories) < self.open:
                break
            if other not in busy:  # every finished turn is saved
                self._memories.pop(other).close()
        self._memories[name] = Memory(self.folder / name, self.controller, self.framing, self.observers, self.curation)
        return self._memories[name]
