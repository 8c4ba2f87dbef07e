"""Commands that have a new name, and run under the old one for one release."""

import runpy
import sys


def run_as(new: str) -> None:
    """Run the module ``new`` as the command that was called, and say its name."""
    print(f"megactx: this command is now python -m {new}; the old name goes with the next release", file=sys.stderr)
    runpy.run_module(new, run_name="__main__", alter_sys=True)
