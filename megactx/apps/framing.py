"""How turns of a talk are written for a model: by the chat template that its tokenizer brings, or as plain lines."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megactx.data.tokenizer import TextEncoder
from megactx.data.user_turns import around
from megactx.runtime.text import encodable, special_tokens

OWN_END = "end"  # ``Piece.stopped`` where the model itself ends its answer


@dataclass(frozen=True)
class Framing:
    """Lines that begin with who speaks, for a model that was trained on plain text."""

    user: str = "User:"
    assistant: str = "Assistant:"

    @property
    def stops(self) -> list[str]:
        """Where an answer ends: the model begins a line of the user's, which is then part of the history."""
        return [f"\n{self.user}"]

    def ends(self, stopped: str | None) -> bool:
        """Whether the history now ends where the user's turn begins."""
        return stopped in self.stops

    def asked(self, text: str, turn: str, last: int | None = None) -> str:
        """What is appended to the history.

        Args:
            turn: ``new``: nothing was said yet; ``asking``: the history ends with the beginning of the user's line;
                ``answering``: it ends within or behind an answer.
            last: the newest id of the history; ``None``: with ``asking`` the template's own end of a turn.
        """
        begin = {"new": self.user, "asking": "", "answering": f"\n{self.user}"}[turn]
        return f"{begin} {text}\n{self.assistant}"


class Template:
    """The tokenizer's own chat template. What a person types is text in it, whatever it looks like.

    Raises:
        ValueError: the template does not show what is said, or cannot be rendered.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.encoder = tokenizer, TextEncoder(tokenizer)
        self.first, self.later = around(tokenizer)
        # The template's own end of a turn is often another token than EOS, and not every model says that it is an end.
        self.end = next(iter(self.encoder(self.later[0], begins=False, plain=False)), None)
        special = special_tokens(tokenizer)
        self.stops = [special[self.end]] if self.end in special else []

    def ends(self, stopped: str | None) -> bool:
        """Whether the history ends with the end of the model's turn."""
        return stopped in (OWN_END, *self.stops)

    def asked(self, text: str, turn: str, last: int | None = None) -> Tensor:
        """What is appended to the history, ids [N]; arguments as of ``Framing``."""
        before, after = self.first if turn == "new" else self.later
        if turn == "new":
            ids = self.encoder.opening(before)
        else:
            ids = self.encoder(before, begins=False, plain=False)
            if last is None and turn == "asking":
                last = self.end
            if last is not None and ids[:1] == [last]:  # the end of the answer is there already
                ids = ids[1:]
        ids += self.encoder(encodable(text), begins=False) + self.encoder(after, begins=False, plain=False)
        return torch.tensor(ids, dtype=torch.long)


def framing_of(tokenizer) -> Framing | Template:
    """The template that a tokenizer brings, else plain lines."""
    return Template(tokenizer) if getattr(tokenizer, "chat_template", None) else Framing()
