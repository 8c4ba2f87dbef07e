"""Talk to a model in the terminal for as long as you like; ``--session`` keeps the talk, or an ingested library.

    python -m megactx.apps.chat
    python -m megactx.apps.chat --session FOLDER
    echo "What is a gist?" | python -m megactx.apps.chat

Turns are written by the chat template that the model's tokenizer brings. A model without one is given plain lines,
``User: ...`` and ``Assistant: ...``, and an answer ends where it begins a line of the user's. Ctrl-C ends an answer; at
the prompt it saves the session, where it has a folder, and leaves.
"""

import argparse
import sys

from rich.console import Console

from megactx.framework.command_line import Ended, run
from megactx.framework.errors import RunFailed
from megactx.runtime import Refocused
from megactx.runtime.text import encodable, from_bytes, printable

from .chat_commands import HELP, obey
from .command_line import add_talk, controller_of, observers_of, sampling_of, talk_of
from .framing import framing_of


class Chat:
    """A session, and what the terminal's commands ask about it.

    Attributes:
        session: may be changed by ``/load``.
        last: the last refocus, for ``/focus``.
    """

    def __init__(self, args: argparse.Namespace):
        self.sampling, self.tokens = sampling_of(args), args.tokens
        self.controller = controller_of(args)
        self.framing = framing_of(self.controller.models.base.tokenizer)
        self.console = Console(soft_wrap=True)
        self.last: Refocused | None = None
        self.observers = [self.seen, *observers_of(args, self.controller)]
        self.session = talk_of(args, self.controller, self.observers)

    def seen(self, event: Refocused) -> None:
        """An observer of the session."""
        self.last = event

    def turn(self, text: str) -> None:
        """Take up what the user says and print the answer."""
        about = self.session.about
        last = int(self.session.ids(self.session.length - 1)[0])
        asked, before = self.framing.asked(text, about.get("turn", "new"), last), self.session.length
        try:
            self.session.append(asked)
        finally:
            if self.session.length > before:  # Ctrl-C may come when it was taken up already
                about["turn"] = "answering"
        try:
            for piece in self.session.generate(self.tokens, self.sampling, self.framing.stops):
                print(printable(piece.text), end="", flush=True)
                if self.framing.ends(piece.stopped):
                    about["turn"] = "asking"
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print(flush=True)
        self.session.tidy()

    def save(self) -> None:
        """Where the session has a folder."""
        if self.session.folder is not None:
            self.session.save()

    def say(self, line: str) -> None:
        """A line of the program's own."""
        print(printable(line), flush=True)


def chat(args: argparse.Namespace) -> None:
    """The command: until ``/quit``, the end of the input, or Ctrl-C at the prompt."""
    talk = Chat(args)
    if sys.stdin.isatty():
        talk.say(f"{talk.session.length:,} tokens so far. {HELP}")
    try:
        while (line := _line()) is not None:
            try:
                text = line if isinstance(line, str) else from_bytes(line, "stdin")
                text = encodable(text).strip()
                if text.startswith("/"):
                    if not obey(talk, text):
                        break
                elif text:
                    talk.turn(text)
            except (ValueError, RunFailed) as error:  # a mistake or a full disk at the prompt does not end the talk
                talk.say(f"({error})")
    finally:
        try:
            talk.save()
        except Ended:  # of a closed terminal the input ends first, and the signal comes now, once
            talk.save()
            raise
        finally:
            talk.session.close()


def _line() -> str | bytes | None:
    """The next line that was typed; ``None`` at the end."""
    if not sys.stdin.isatty():
        return sys.stdin.buffer.readline() or None
    import readline  # noqa: F401  input() edits and remembers lines with it

    try:
        return input("> ")
    except EOFError:
        return None


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.apps.chat", description=__doc__.split("\n")[0])
    add_talk(parser, tokens=200)
    return run(chat, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
