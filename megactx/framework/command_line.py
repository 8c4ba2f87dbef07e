"""How every command ends: 0 done, 2 a mistake, 3 failed on its own, 130 interrupted; one message, no traceback.

A system that ends a command (SIGTERM), or a terminal that is closed (SIGHUP), is obeyed at once, as Ctrl-C is: what is
to be saved is saved. Such a command ends with 128 and the signal's number, as shells count, a server with 0.
"""

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from .errors import DONE, INTERRUPTED, verdict

ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # not all systems have both


class Ended(SystemExit):
    """By a signal."""

    def __init__(self, number: int):
        super().__init__(128 + number)


def run(command: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser, arguments) -> int:
    """Parse the arguments and run a command; -> its exit code."""
    args = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        with ended_in_order():
            return command(args) or DONE
    except KeyboardInterrupt:
        print("\nmegactx: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has gone
        sys.stderr.close()
        return DONE
    except Exception as error:
        code, message = verdict(error)
        print(f"megactx: {_by_option(message, parser)}", file=sys.stderr)
        return code


@contextlib.contextmanager
def ended_in_order() -> Iterator[None]:
    """A signal that would end the process raises ``Ended``; one that somebody handles, or ignores, stays as it is."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, _end) for number in unclaimed() if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def unclaimed() -> list[int]:
    """Signals that would end this process, or the command that it is, and that nobody else handles or ignores."""
    return [number for number in ENDS if signal.getsignal(number) in (signal.SIG_DFL, _end)]


def _end(number: int, frame) -> None:
    for other in unclaimed():  # readline passes on what it has heard of: a second one would cut short what saves
        signal.signal(other, signal.SIG_IGN)
    leave_terminal()
    raise Ended(number)


def leave_terminal() -> None:
    """What is printed on a terminal that was closed goes nowhere from now on; it would be an error."""
    for stream in (1, 2):
        try:
            os.write(stream, b"")
        except OSError as error:
            if error.errno == errno.EIO:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def _by_option(message: str, parser: argparse.ArgumentParser) -> str:
    """A setting of the group ``attention`` by the option that gives it here, as all others are named."""
    options = {name for action in parser._actions for name in action.option_strings}
    return re.sub(r"\battention\.(\w+)(?==)", lambda m: f"--{m[1]}" if f"--{m[1]}" in options else m[0], message)
