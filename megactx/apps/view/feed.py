"""From the thread that runs the model to all browsers: refocuses in their order, and the newest state.

Nobody waits for a slow browser. The last refocuses are kept; who falls behind misses the oldest, and nothing piles up.
"""

import asyncio
import json
import threading
from collections import deque
from collections.abc import AsyncIterator

KEPT = 200  # refocuses
HEARTBEAT = 10.0  # seconds without news, after which a browser is told that we are still here


class Feed:
    """Written to by any thread, read by coroutines."""

    def __init__(self):
        self._lock = threading.Lock()
        self._frames: deque[tuple[int, str]] = deque(maxlen=KEPT)
        self._state, self._version, self._count = {}, 0, 0
        self._waiting: set[tuple] = set()
        self._closed = False

    def publish(self, frame: dict) -> None:
        """One more refocus."""
        line = json.dumps(frame, allow_nan=False)
        with self._lock:
            self._count += 1
            self._frames.append((self._count, line))
        self._wake()

    def tell(self, **state) -> None:
        """Change some of the state; the rest stays."""
        with self._lock:
            self._state = self._state | state
            self._version += 1
        self._wake()

    @property
    def state(self) -> dict:
        """As it is now."""
        return self._state

    @property
    def frames(self) -> list[dict]:
        """All that are kept."""
        with self._lock:
            return [json.loads(line) for _, line in self._frames]

    @property
    def count(self) -> int:
        """Refocuses that were published."""
        return self._count

    async def follow(self, after: int = 0) -> AsyncIterator[str]:
        """Server-sent events: what is kept behind number ``after``, then all that comes; ends with ``close``."""
        news, version = asyncio.Event(), -1
        listener = (asyncio.get_running_loop(), news)
        with self._lock:
            self._waiting.add(listener)
            after = after if after <= self._count else 0  # a browser that knew another run
        try:
            while True:
                news.clear()
                with self._lock:
                    frames = [(number, line) for number, line in self._frames if number > after]
                    state = json.dumps(self._state) if self._version != version else None
                    version, closed = self._version, self._closed
                for number, line in frames:
                    yield f"event: frame\nid: {number}\ndata: {line}\n\n"
                    after = number
                if state is not None:
                    yield f"event: state\ndata: {state}\n\n"
                if closed:
                    return
                try:
                    await asyncio.wait_for(news.wait(), HEARTBEAT)
                except TimeoutError:
                    yield ": still here\n\n"
        finally:
            with self._lock:
                self._waiting.discard(listener)

    def close(self) -> None:
        """Nothing comes any more."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            waiting = [*self._waiting]
        for loop, news in waiting:
            try:
                loop.call_soon_threadsafe(news.set)
            except RuntimeError:  # its loop has just been closed
                pass
