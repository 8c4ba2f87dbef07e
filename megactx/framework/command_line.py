"""How every command ends: 0 done, 2 a mistake, 3 failed on its own, 130 interrupted; one message, no traceback."""

import argparse
import re
import sys
from collections.abc import Callable

from .errors import DONE, INTERRUPTED, verdict


def run(command: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser, arguments) -> int:
    """Parse the arguments and run a command; -> its exit code."""
    args = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
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


def _by_option(message: str, parser: argparse.ArgumentParser) -> str:
    """A setting of the group ``attention`` by the option that gives it here, as all others are named."""
    options = {name for action in parser._actions for name in action.option_strings}
    return re.sub(r"\battention\.(\w+)(?==)", lambda m: f"--{m[1]}" if f"--{m[1]}" in options else m[0], message)
