"""A session is kept clean while it goes on: plans are made beside it, and done by it, a little at every refocus.

    between turns   save -> a thread reads what was saved, and makes a plan
    every refocus   the next spans of the plan that nobody has protected, opened or shown since -> archive

One process writes a session's folder, so this one does it; another that has a plan for it leaves it in ``HANDED``.
"""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from megactx.framework.errors import RunFailed
from megactx.memory import Composite
from megactx.memory.archive import RUN, LiveArchive
from megactx.memory.curation import Curated, read_plan
from megactx.memory.curation_settings import CurationSettings

from .part_files import TREE

HANDED = "curation.json"  # a plan that another process made


class Keeper:
    """Keeps one open session clean.

    Args:
        stream: its history.
        folder: of the session.
        settings: ``None``: it makes no plans of its own.

    Attributes:
        saved: tokens of the tree that the session has saved.
        freed: bytes that went into the archive.
        note: why something was not done; empty where all is well.
    """

    def __init__(self, stream, folder: Path, settings: CurationSettings | None = None):
        self.stream, self.folder, self.settings = stream, folder, settings
        self.saved = self.planned = int(stream.tree.lengths[0])
        self.freed, self.note = 0, ""
        self.actions: deque[dict] = deque()
        self.worker: ThreadPoolExecutor | None = None
        self.planning: Future | None = None
        self.handed: int | None = None  # time of the plan that was taken from ``HANDED``

    @property
    def due(self) -> bool:
        """Whether there is so much new text that a plan should be made."""
        if self.settings is None or not self.settings.named or self.planning is not None or self.actions:
            return False
        return int(self.stream.tree.lengths[0]) - self.planned >= self.settings.every

    def plan(self) -> None:
        """Begin to make a plan of what was saved, in a thread; ``step`` takes it up."""
        if self.worker is None:
            self.worker = ThreadPoolExecutor(1, "megactx-curation")
        self.planned = int(self.stream.tree.lengths[0])
        self.planning = self.worker.submit(made, self.folder, self.settings)

    def step(self) -> None:
        """Do the next part of what is planned; it costs microseconds where there is nothing. What cannot be done is
        told by ``note``, and the session goes on."""
        try:
            if self._take_up() and not self.actions:
                self._purge()  # there is nothing to archive, and what is old goes all the same
            if self.actions:
                self._do()
        except (ValueError, RunFailed) as error:
            self.note = str(error)
            self.actions.clear()

    def finish(self) -> None:
        """Do all that is planned now.

        Raises:
            ValueError, RunFailed: as of ``Archive.apply``.
        """
        if self.planning is not None:
            self.planning.exception()  # wait
        if self._take_up() and not self.actions:
            self._purge()
        self.do([])

    def do(self, actions: list[dict]) -> None:
        """Do actions of a plan now.

        Raises:
            ValueError, RunFailed: as of ``Archive.apply``.
        """
        self.actions.extend(actions)
        while self.actions:
            self._do()

    def restore(self, start: int, stop: int) -> int:
        """Bring tokens start .. stop - 1 back; -> spans.

        Raises:
            ValueError: the archive is damaged there. Nothing was restored.
        """
        return self._archive().restore(start, stop)

    def close(self) -> None:
        """Wait for the thread; what is planned is not done."""
        if self.worker is not None:
            self.worker.shutdown(cancel_futures=True)
        self.worker = self.planning = None
        self.actions.clear()

    def _take_up(self) -> bool:
        """Whether a plan of its own was made."""
        if made_one := self.planning is not None and self.planning.done():
            planning, self.planning = self.planning, None
            self.note = ""
            self.actions.extend(planning.result())
        path = self.folder / HANDED
        try:
            at = path.stat().st_mtime_ns
        except OSError:
            return made_one
        if at != self.handed:
            self.handed = at
            self.actions.extend(read_plan(path)["actions"])
            if not self.actions:
                path.unlink(missing_ok=True)
        return made_one

    def _purge(self) -> None:
        """What has been in the archive for longer than ``retention`` goes for good."""
        if self.settings is not None and self.settings.retention is not None:
            self._archive().purge(self.settings.retention)

    def _do(self) -> None:
        """The next spans, in one transaction."""
        spans = self.settings.spans if self.settings is not None else CurationSettings().spans
        now, block = [], self.stream.block
        while self.actions and len(now) < spans:
            action = self.actions.popleft()
            wide = block ** int(action["floor"])
            most = max(RUN // wide, 1) * wide
            start, stop = int(action["start"]), int(action["stop"])
            now.append(action | {"stop": min(stop, start + most)})
            if start + most < stop:
                self.actions.appendleft(action | {"start": start + most})
        archive = self._archive()
        now = [action for action in now if int(action["stop"]) <= archive.tokens]
        if now:
            self.freed += archive.apply({"format": 1, "actions": now})
        if not self.actions:
            if (path := self.folder / HANDED).exists() and path.stat().st_mtime_ns == self.handed:
                path.unlink()
            self._purge()

    def _archive(self) -> LiveArchive:
        return LiveArchive(self.stream.tree, self.saved, self._shown)

    def _shown(self, floor: int) -> Tensor:
        """Numbers of blocks that the window, or what was read of it last, shows finer than a floor."""
        stream, out = self.stream, [torch.zeros(0, dtype=torch.long)]
        for context in (stream.context, stream.shown):
            if context is None:
                continue
            if isinstance(seen := context.tree, Composite):
                lod, index = seen.segments(context)[-1]
            else:
                lod, index = (part[0, : int(context.counts[0])] for part in (context.lod, context.index))
            fine = lod < floor
            out.append((index * stream.block**lod)[fine].cpu() // stream.block)
        return torch.cat(out).unique()


def made(folder: Path, settings: CurationSettings) -> list[dict]:
    """What a plan of a session that was saved would do."""
    tree = Curated(folder / TREE, settings.floor)
    try:
        return tree.plan(settings.named)["actions"] if len(tree.levels) > 1 else []
    finally:
        tree.file.close()
