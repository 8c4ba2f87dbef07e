"""Session: one history of text that goes on for ever, is saved and resumed.

    session = Session(Controller(load_models()))
    session.append("Once upon a time")
    for piece in session.generate(200):
        print(piece.text, end="", flush=True)
    session.save("story")
    session = Session.load("story", controller)         # the same next token
    nll = session.append(ids, score=True)               # teacher-forced: nats of every token

The row has T tokens; N new ones.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megactx.data.tokenizer import TextEncoder, bos_id
from megactx.memory import Composite, MegaContextTree, WorkingContext
from megactx.memory.curation_settings import CurationSettings

from . import session_files
from .controller import Controller, decode
from .curation import Keeper
from .events import Observer
from .part_files import OpenPart, Wanted
from .plain_lm import PlainLM
from .sampling import Sampling
from .stream import Stream
from .text import LONGEST, Answer, encodable, text_of

GREEDY = Sampling()


class Piece(NamedTuple):
    """What a token adds to the answer."""

    text: str  # may be empty: a part of a character, or what may become a stop string
    token: int
    stopped: str | None = None  # why nothing follows: ``length``, ``end`` (the model's own end), or the stop string


class Session:
    """A history, opened with the tokenizer's BOS.

    Args:
        controller: models and settings.
        observers: each is called with a ``Refocused`` after every refocus; see ``events``.
        parts: other trees that its window shows beside the history, see ``part_files``.

    Attributes:
        about: plain JSON that is saved with the session and comes back with it.

    Raises:
        ValueError: the base LM has no tokenizer, or that has neither BOS nor EOS; a part that cannot be shown.
    """

    def __init__(self, controller: Controller, observers: Iterable[Observer] = (), parts: Iterable[Wanted] = ()):
        self._begin(controller, controller.stream(observers=observers), {})
        self.use(*parts)
        first = torch.tensor([[bos_id(self.tokenizer)]])
        if isinstance(self.stream, PlainLM):
            self.stream.append(first)
        else:
            self.stream.push(first[0].to(self.stream.device))

    def _begin(self, controller: Controller, stream: Stream | PlainLM, about: dict) -> None:
        self.controller, self.stream, self.about = controller, stream, about
        self.tokenizer = controller.models.base.tokenizer
        if self.tokenizer is None:
            raise ValueError("base: it has no tokenizer, which a session needs; Controller.stream takes ids")
        self.encoder = TextEncoder(self.tokenizer)
        self.folder: Path | None = None
        self._lock: session_files.Lock | None = None
        self.curation: CurationSettings | None = None

    @property
    def length(self) -> int:
        """T, tokens of the history."""
        return int(self.stream.lengths[0])

    @property
    def tree(self) -> MegaContextTree | None:
        """All but up to K - 1 of the newest tokens; ``None`` with ``megacontext=none`` or no GistNet."""
        return getattr(self.stream, "tree", None)

    @property
    def context(self) -> WorkingContext | None:
        """The window; ``None`` before the first K tokens, and with ``megacontext=none`` or no GistNet."""
        return None if isinstance(self.stream, PlainLM) else self.stream.window()

    @property
    def observers(self) -> list[Observer]:
        """May be changed at any time."""
        return self.stream.observers

    @property
    def parts(self) -> list[OpenPart]:
        """Other trees that the window shows, in their order."""
        return [*getattr(self.stream, "parts", {}).values()]

    def use(self, *parts: Wanted) -> None:
        """Show parts beside those that are shown; one of the same name takes the place of the one before.

        Raises:
            ValueError: a part that cannot be opened or does not fit, or a session without a window. All is as it was.
        """
        if parts and isinstance(self.stream, PlainLM):
            raise ValueError(f"{self.stream.kind} has no working context that could show parts; focus and recency have")
        if parts:
            self.stream.use(parts)

    def drop(self, name: str) -> None:
        """Show a part no more.

        Raises:
            ValueError: there is none of this name.
        """
        self._shown().drop(name)

    def pin(self, name: str) -> None:
        """Show no newer version of a part than the one that is shown.

        Raises:
            ValueError: there is none of this name.
        """
        self._shown().pin(name)

    def _shown(self) -> Stream:
        if isinstance(self.stream, PlainLM):
            raise ValueError(f"{self.stream.kind} shows no parts")
        return self.stream

    def append(self, content: str | Tensor | list[int], score: bool = False, follow: bool = True) -> Tensor | None:
        """Take up text or ids [N].

        Args:
            score: read them as if they were decoded, with a refocus every K tokens.
            follow: the window follows; else it is put together anew when it is needed, which much text is read faster
                with.

        Returns:
            With ``score`` their NLL [N] in nats.

        Raises:
            ValueError: text with half characters, or ids that the base cannot embed. Nothing was taken up.
        """
        ids = self.encode(content) if isinstance(content, str) else torch.as_tensor(content, dtype=torch.long)
        if ids.ndim != 1:
            raise ValueError(f"ids have shape {list(ids.shape)}, expected [N]")
        if len(ids) == 0:
            return torch.zeros(0) if score else None
        how = {} if isinstance(self.stream, PlainLM) else {"follow": follow}
        found = self.stream.append(ids[None], score=score, **how)
        return found[0] if score else None

    def encode(self, text: str) -> Tensor:
        """Text -> ids [N] as they stand behind the history; special-token strings in it are text like any other."""
        ids = self.encoder(encodable(text), begins=self.length == 1)  # BOS alone is there
        return torch.tensor(ids, dtype=torch.long)

    def generate(self, max_tokens: int, sampling: Sampling = GREEDY, stop: Iterable[str] = ()) -> Iterator[Piece]:
        """Continue the history, token by token; whoever stops listening finds it as far as it was told.

        A stop string ends the answer and is not told, but it is part of the history.

        Raises:
            ValueError: a setting that is not allowed, or a base LM that breaks down.
        """
        before = self.ids(max(0, self.length - LONGEST)).tolist()
        answer = Answer(self.tokenizer, end_ids(self.controller.models.base), stop, before)
        return self._told(max_tokens, sampling, answer)

    def _told(self, max_tokens: int, sampling: Sampling, answer: Answer) -> Iterator[Piece]:
        tokens = decode(self.stream, max_tokens, sampling)
        for count, (token,) in enumerate(tokens, start=1):
            text = answer.push(token)
            over = answer.stopped or ("length" if count == max_tokens else None)
            yield Piece(text + (answer.rest() if over else ""), token, over)
            if over:
                return

    def text(self, start: int = 0, stop: int | None = None) -> str:
        """Tokens start .. stop - 1 of the history as text, special tokens left out."""
        before = self.ids(max(0, start - LONGEST), start).tolist()
        return text_of(self.tokenizer, self.ids(start, stop).tolist(), before)

    def place(self, address: int) -> tuple[OpenPart | None, int]:
        """The part that an address of the window lies in, ``None`` for the history itself, and the token there."""
        seen = self.context.tree if self.context is not None else None
        if not isinstance(seen, Composite):
            return None, address
        number = int(seen.part_of(torch.tensor(address, device=seen.device)))
        name = seen.name_of(number)
        return next((part for part in self.parts if part.name == name), None), address - seen.bases[number]

    def text_at(self, address: int, tokens: int) -> str:
        """So many tokens from an address of the window on, as text; ``text`` has the history's own.

        Raises:
            ValueError: some of them were taken away.
        """
        part, start = self.place(address)
        if part is None:
            return self.text(start, start + tokens)
        return part.text(start, min(start + tokens, int(part.tree.lengths[0])))

    def ids(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Tokens start .. stop - 1 of the history, [N] on the CPU.

        Raises:
            ValueError: some of them were taken away, see ``apps.curation``.
        """
        stop = self.length if stop is None else min(stop, self.length)
        if isinstance(self.stream, PlainLM):
            return self.stream.tokens[0, start:stop].cpu()
        there = int(self.tree.lengths[0])
        if self.tree.compacted and min(start, there) < min(stop, there):
            at = torch.arange(start, min(stop, there))
            gone = self.tree.floors(torch.zeros_like(at), torch.zeros_like(at), at) > 0
            if gone.any():
                first = int(at[gone][0])
                raise ValueError(
                    f"token {first} was taken away; python -m megactx.apps.curation restore brings it back"
                )
        stored = self.tree.levels[0].span("token", min(start, there), min(stop, there))[0].long().cpu()
        waiting = self.stream.waiting[0, max(start - there, 0) : max(stop - there, 0)].cpu()
        return torch.cat([stored, waiting])

    def save(self, folder: str | Path | None = None) -> Path:
        """Write all of it into a folder, whole or not at all; the session stays open, and holds the folder.

        Args:
            folder: ``None``: where it was saved or loaded last.

        Raises:
            ValueError: no folder, one that holds something else, cannot be written, or is in use by another process; a
                session with ``megacontext=none``, or without a GistNet.
            RunFailed: the disk is full. The session still holds the folder that it held, where what was saved is whole.
        """
        if isinstance(self.stream, PlainLM):
            raise ValueError(f"{self.stream.kind} keeps no tree, so its sessions cannot be saved")
        if folder is None and self.folder is None:
            raise ValueError("save: name a folder; this session was neither saved nor loaded before")
        folder = (self.folder if folder is None else Path(folder).expanduser()).absolute()
        if self.folder is None or folder.resolve() != self.folder.resolve():
            session_files.check_free(folder)
            lock = session_files.lock(folder)
            try:
                session_files.save(self.stream, folder, self.about)
            except BaseException:  # the session stays where it was
                lock.release()
                raise
            self.close()
            self.folder, self._lock = folder, lock
            self.stream.keeper = Keeper(self.stream, folder, self.curation)
        else:
            session_files.save(self.stream, folder, self.about)
        self.stream.keeper.saved = int(self.stream.tree.lengths[0])
        return folder

    def curate(self, settings: CurationSettings | None) -> None:
        """Keep this session clean while it goes on, by these settings; ``None``: no more. ``tidy`` begins it."""
        self.curation = settings
        if (keeper := getattr(self.stream, "keeper", None)) is not None:
            keeper.settings = settings

    def tidy(self) -> None:
        """Between two turns: where so much was taken up that it is time, save the session and begin to make a plan. The
        next refocuses do what it says. A session without a folder is not curated."""
        if self.folder is not None and self.stream.keeper.due:
            self.save()
            self.stream.keeper.plan()

    def curate_now(self) -> int:
        """Save the session, make a plan and do it; -> bytes that went into the archive.

        Raises:
            ValueError: the session has no folder, or it is not said how it is curated.
            RunFailed: the disk is full.
        """
        if self.curation is None or self.folder is None:
            raise ValueError("curate: the session needs a folder, which a save gives it, and settings")
        self.save()
        before = self.stream.keeper.freed
        self.stream.keeper.plan()
        self.stream.keeper.finish()
        return self.stream.keeper.freed - before

    def restore(self, start: int = 0, stop: int | None = None) -> int:
        """Bring back what was taken away of tokens start .. stop - 1; -> spans.

        Raises:
            ValueError: the session has no folder, or the archive is damaged there. Nothing was restored.
        """
        if self.folder is None:
            raise ValueError("restore: a session that was never saved has no archive")
        return self.stream.keeper.restore(start, self.length if stop is None else stop)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        controller: Controller,
        observers: Iterable[Observer] = (),
        parts: Iterable[Wanted] = (),
        without: Iterable[str] = (),
    ) -> "Session":
        """Go on with a saved session; under other settings, or with other parts, its window is put together anew.

        Args:
            parts: to be shown besides those that were saved with it, or in place of those of the same name.
            without: names of saved parts that are left out.

        Raises:
            ValueError: no session, a damaged one, one that is in use by another process, or of another tokenizer, base
                LM or GistNet; ``megacontext=none``, or no GistNet; a part that is not there.
        """
        folder = Path(folder).expanduser().absolute()
        if controller.plain:
            raise ValueError(f"{controller.plain} reads no tree, so it cannot go on with a saved session")
        if not session_files.is_session(folder):
            raise ValueError(f"{folder}: there is no session, {session_files.MANIFEST} is missing")
        lock = session_files.lock(folder)
        try:
            models, settings = controller.models, controller.settings
            stream, about, _ = session_files.load(folder, models, settings, observers, [*parts], [*without])
        except BaseException:
            lock.release()
            raise
        session = cls.__new__(cls)
        session._begin(controller, stream, about)
        session.folder, session._lock = folder, lock
        stream.keeper = Keeper(stream, folder)
        return session

    def close(self) -> None:
        """Give the folder free; the session itself can go on."""
        if self._lock is not None:
            self.stream.keeper.close()
            self.stream.keeper = None
        if self._lock is not None:
            self._lock.release()
        self.folder = self._lock = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def end_ids(base) -> frozenset[int]:
    """Ids with which the model says that it is done; empty where it never does."""
    found = [getattr(getattr(base.model, "generation_config", None), "eos_token_id", None), base.tokenizer.eos_token_id]
    flat = [i for ids in found for i in (ids if isinstance(ids, list) else [ids])]
    return frozenset(i for i in flat if i is not None)
