"""The session of a key, and how a request's messages become a turn of it.

A client sends its whole talk with every request, or only what it says now; the memory knows what was said before.
Messages up to the last answer are taken up only as far as they are not there; what stands behind it is always new.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from megactx.runtime import Controller, Sampling, Session
from megactx.runtime.text import encodable

from ..command_line import session_of

PIECE = 1024  # tokens that are read at a time at most
KNOWN = 2000  # newest messages that are known again


@dataclass(frozen=True)
class Message:
    """What somebody said.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        text: not empty.
    """

    role: str
    text: str

    @property
    def digest(self) -> str:
        """Clients strip blanks at the ends of an answer; it is the same answer."""
        return hashlib.sha256(f"{self.role} {self.text.strip()}".encode()).hexdigest()[:16]


@dataclass
class Asked:
    """What a turn is to do.

    Attributes:
        messages: the last is not an assistant's.
        tokens: of the answer, at most.
        stop: strings that end it.
    """

    messages: list[Message]
    tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: list[str] = field(default_factory=list)


@dataclass
class Answered:
    """What a turn has done so far.

    Attributes:
        read, written: tokens.
        stopped: as of ``Piece``; ``None``: it was cut.
    """

    read: int = 0
    written: int = 0
    stopped: str | None = None


class Memory:
    """A session in a folder of its own.

    Args:
        folder: made where it is not there.
        framing: of the model's turns, see ``framing_of``.
        curation: how it is kept clean, see ``Session.curate``.

    Raises:
        ValueError: the folder holds something else, is damaged, or is in use by another process.
    """

    def __init__(self, folder: Path, controller: Controller, framing, observers=(), curation=None):
        self.session: Session = session_of(folder, controller, observers)
        self.session.curate(curation)
        self.framing = framing
        self.piece = min(PIECE, controller.settings.budget // 2)
        self.session.stream.lazy = True

    def turn(self, asked: Asked, done: Answered) -> Iterator[str | None]:
        """Take up what is new and answer: text as it is written, ``None`` where others may have their turn."""
        own = self.session.about.setdefault("serve", {"system": "", "said": []})
        for question, answer in _pairs(new_messages(asked.messages, own)):
            for piece in self._question(question).split(self.piece):
                done.read += self._append(piece)
                yield None
            self.session.about["turn"] = "answering"
            if answer:
                for piece in self.session.encode(answer).split(self.piece):
                    done.read += self._append(piece)
                    yield None
        yield from self._answer(asked, done, own)

    def save(self) -> None:
        """The turn is finished: it is there whatever happens from now on.

        Raises:
            RunFailed: the disk is full.
        """
        self.session.save()
        self.session.tidy()

    def close(self) -> None:
        """Give the folder free. What was not saved is gone."""
        self.session.close()

    def _question(self, text: str) -> Tensor:
        turn = self.session.about.get("turn", "new")
        ids = self.framing.asked(text, turn, int(self.session.ids(self.session.length - 1)[0]))
        return self.session.encode(ids) if isinstance(ids, str) else ids

    def _append(self, ids: Tensor) -> int:
        self.session.append(ids)
        self.session.context  # noqa: B018  refocused now, piece by piece, and not all at the end
        return len(ids)

    def _answer(self, asked: Asked, done: Answered, own: dict) -> Iterator[str | None]:
        said = []
        try:
            for piece in self.session.generate(asked.tokens, asked.sampling, [*self.framing.stops, *asked.stop]):
                done.written, done.stopped = done.written + 1, piece.stopped
                if self.framing.ends(piece.stopped):
                    self.session.about["turn"] = "asking"
                text = piece.text if said else piece.text.lstrip()
                if text:
                    said.append(text)
                    yield text
                yield None  # the token that was told is read later, with those of others
        finally:  # also where it is cut: what was told is known again
            own["said"] = [*own["said"], Message("assistant", "".join(said)).digest][-KNOWN:]


def new_messages(messages: list[Message], own: dict) -> list[Message]:
    """What the memory has not heard yet, and note that it has.

    Args:
        own: ``system``, the digest of the last instructions, and ``said``, those of the messages since ever; changed.
    """
    system = [m for m in messages if m.role == "system"]
    digest = hashlib.sha256("".join(m.digest for m in system).encode()).hexdigest()[:16] if system else own["system"]
    talk = [m for m in messages if m.role != "system"]
    last = max((n for n, m in enumerate(talk, 1) if m.role == "assistant"), default=0)
    new = talk[_known([m.digest for m in talk[:last]], own["said"]) :]
    own["said"] = [*own["said"], *(m.digest for m in new)][-KNOWN:]
    if digest != own["system"]:
        own["system"], new = digest, [*system, *new]
    return new


def _known(digests: list[str], said: list[str]) -> int:
    """How many of the first digests were said in a row, at any time."""
    most = 0
    for start in range(len(said)):
        count = 0
        while count < len(digests) and start + count < len(said) and said[start + count] == digests[count]:
            count += 1
        most = max(most, count)
    return most


def _pairs(messages: list[Message]) -> Iterator[tuple[str, str]]:
    """(what was asked, what was answered; nothing at the end). Instructions stand before the question behind them."""
    questions = []
    for message in messages:
        if message.role != "assistant":
            questions.append(encodable(message.text))
        else:
            yield "\n\n".join(questions), encodable(message.text)
            questions = []
    yield "\n\n".join(questions), ""
