"""How turns of a talk are written for a model that was trained on plain text."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Framing:
    """Lines that begin with who speaks."""

    user: str = "User:"
    assistant: str = "Assistant:"

    @property
    def stops(self) -> list[str]:
        """Where an answer ends: the model begins a line of the user's, which is then part of the history."""
        return [f"\n{self.user}"]

    def asked(self, text: str, turn: str) -> str:
        """What is appended to the history.

        Args:
            turn: ``new``: nothing was said yet; ``asking``: the history ends with the beginning of the user's line;
                ``answering``: it ends within or behind an answer.
        """
        begin = {"new": self.user, "asking": "", "answering": f"\n{self.user}"}[turn]
        return f"{begin} {text}\n{self.assistant}"
