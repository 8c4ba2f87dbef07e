"""The one thread that touches the session: it reads and writes, and answers questions between two tokens.

So nothing is locked, and hovering over a block while the session writes sees no half-made tree.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from torch import Tensor

from megactx.focus.replay import View
from megactx.framework.errors import verdict
from megactx.runtime import Refocused, Sampling, Session
from megactx.runtime.text import encodable, printable

from . import frames
from .feed import Feed

PIECE = 1024  # tokens that are read at a time at most, so that there is something to see meanwhile
TAIL = 6000  # characters of the newest text that the page shows
OPENING = 500  # tokens of a session that is gone on with
MOST = 100_000  # tokens of one answer
OFTEN = 0.1  # seconds between two updates of the text


class Busy(Exception):
    """The session is reading or writing."""


class Player:
    """Plays a session into a feed.

    Args:
        session: of ``focus`` or ``recency``.
        sampling: how tokens are chosen.

    Attributes:
        failure: what ended the last work; ``None``: nothing did.
    """

    def __init__(self, session: Session, sampling: Sampling):
        self.session, self.sampling, self.feed = session, sampling, Feed()
        self.written: list[list[str]] = []  # [["in" | "out", text], ...], the newest TAIL characters
        self.failure: BaseException | None = None
        self._jobs: queue.Queue = queue.Queue()
        self._busy, self._stop, self._told = threading.Lock(), threading.Event(), 0.0
        self._thread = threading.Thread(target=self._run, name="player", daemon=True)
        session.observers.append(self.seen)

    def seen(self, event: Refocused) -> None:
        """An observer of the session."""
        self.feed.publish(frames.frame(event))

    def start(self) -> "Player":
        """Show what is there, then wait for something to do."""
        self._thread.start()
        self._submit(lambda: self._safely(self._open))
        return self

    def say(self, content: str, tokens: int) -> None:
        """Take up text and continue with at most ``tokens`` tokens; it goes on in the background.

        Raises:
            ValueError: text with half characters.
            Busy: something is under way.
        """
        ids = self.session.encode(encodable(content))
        if not self._busy.acquire(blocking=False):
            raise Busy
        self._stop.clear()
        self._submit(lambda: self._work(ids, content, tokens))

    def stop(self) -> None:
        """End what is under way, behind the token that is being worked on."""
        self._stop.set()

    def ask(self, question: Callable[[], object]) -> Future:
        """Have the session's own thread call ``question``, soon."""
        return self._submit(question)

    def wait(self) -> None:
        """Until there is nothing to do."""
        with self._busy:
            self._submit(lambda: None).result()

    def close(self) -> None:
        """Stop, and give the session back to the caller's thread."""
        self.stop()
        self._jobs.put(None)
        self._thread.join()
        self.feed.close()
        self.session.observers.remove(self.seen)

    def _submit(self, work: Callable[[], object]) -> Future:
        found = Future()
        self._jobs.put((work, found))
        return found

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            _do(*job)

    def _between(self) -> None:
        """Answer what was asked meanwhile."""
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job is None:  # the end; the loop outside wants it, behind what is under way
                self._stop.set()
                self._jobs.put(None)
                return
            _do(*job)

    def _open(self) -> None:
        session = self.session
        self._note("in", session.text(max(0, session.length - OPENING)))
        before = self.feed.count
        if (context := session.context) is not None and self.feed.count == before:
            number, view = session.stream.refocuses, View.of(context, 0)
            self.feed.publish(frames.standing(number, session.length, view, context.budget))
        self._tell("idle", error=None)

    def _work(self, ids: Tensor, content: str, tokens: int) -> None:
        def work() -> None:
            self._note("in", content)
            self._tell("reading", error=None)
            self._read(ids)
            self._tell("writing")
            if tokens and not self._stop.is_set():
                self._write(tokens)
            self._tell("idle")

        try:
            self._safely(work)
        finally:
            self._busy.release()

    def _safely(self, work: Callable[[], None]) -> None:
        """What fails, of the model or for memory, is shown; the session stays as it is, and so does the thread."""
        try:
            work()
        except Exception as error:
            self.failure = error
            self._tell("idle", error=verdict(error)[1])

    def _read(self, ids: Tensor) -> None:
        for piece in ids.split(min(PIECE, self.session.controller.settings.budget // 2)):
            if self._stop.is_set():
                return
            self.session.append(piece)
            self.session.context  # noqa: B018  refocused now, piece by piece, and not all at the end
            self._between()
            self._often("reading")

    def _write(self, tokens: int) -> None:
        for piece in self.session.generate(tokens, self.sampling):
            self._note("out", piece.text)
            self._between()
            self._often("writing")
            if self._stop.is_set():
                return

    def _note(self, kind: str, content: str) -> None:
        content = printable(content[-TAIL:])
        if self.written and self.written[-1][0] == kind:
            self.written[-1][1] += content
        elif content:
            self.written.append([kind, content])
        over = sum(len(part) for _, part in self.written) - TAIL
        while over > 0:
            cut = min(over, len(self.written[0][1]))
            self.written[0][1] = self.written[0][1][cut:]
            over -= cut
            if not self.written[0][1]:
                self.written.pop(0)

    def _often(self, doing: str) -> None:
        if time.monotonic() - self._told > OFTEN:
            self._tell(doing)

    def _tell(self, doing: str, **more) -> None:
        self._told = time.monotonic()
        written = [list(part) for part in self.written]
        self.feed.tell(doing=doing, tokens=self.session.length, written=written, **more)


def _do(work: Callable[[], object], found: Future) -> None:
    if found.set_running_or_notify_cancel():
        try:
            found.set_result(work())
        except BaseException as error:
            found.set_exception(error)
