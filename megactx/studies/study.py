"""What every study is: a command line with its ranges, one function that measures, tables that it leaves.

A study file has ``options``, which says what may be asked for, and ``study``, which measures that and yields reports:
after each part one that holds all so far, so that a stop loses only the part that was being measured.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextvars import copy_context
from pathlib import Path

from megactx.evaluation.table import Report
from megactx.framework.bar import SHORTER, quiet_libraries
from megactx.framework.command_line import run

WIDTH = 170


class Options:
    """The command line of a study."""

    def __init__(self, name: str, doc: str):
        self.parser = argparse.ArgumentParser(prog=f"python -m megactx.studies.{name}", description=doc.split("\n")[0])
        self.least: dict[str, float] = {}

    def add(self, *names: str, help: str, **settings) -> None:
        """As that of ``argparse``; the default is said."""
        default = settings.get("default")
        told = " ".join(map(str, default)) if isinstance(default, list) else default
        self.parser.add_argument(*names, help=help if default is None else f"{help} (default {told})", **settings)

    def number(self, name: str, default: int, help: str, least: int = 1) -> None:
        """A whole number of at least ``least``."""
        self.add(f"--{name}", type=int, default=default, help=help)
        self.least[name] = least

    def runs(self, help: str = "run folders of gist stages", nargs: str = "+") -> None:
        """Folders of finished runs."""
        self.add("runs", nargs=nargs, metavar="RUN", help=help)

    def path(self, help: str = "files to measure on; without it the held-out part of the embedded text") -> None:
        """Text of one's own."""
        self.add("--path", help=help)

    def controls(self) -> None:
        """Which untrained controls stand beside histories, see ``chosen``."""
        self.add("--controls", nargs="*", metavar="NAME", help="untrained controls of the histories (default: all)")

    def shorter(self) -> str:
        """The options that make the study short, in words; of one without numbers, none."""
        names = [f"--{name}" for name in self.least if name != "seed"]
        return f"lower {', '.join(names)}" if names else ""

    def check(self, args: argparse.Namespace) -> None:
        """Raises: ValueError: a number below its least; the message names it."""
        for name, least in self.least.items():
            at_least(name, getattr(args, name.replace("-", "_")), least)


def at_least(name: str, value: float, least: float, what: str = "") -> None:
    """Raises: ValueError: the option's value is below ``least``; ``what`` it is."""
    if value < least:
        raise ValueError(f"--{name}={value} is not allowed: at least {least}{what}")


def multiple(name: str, value: int, block: int, least: int = 1) -> None:
    """Raises: ValueError: the option's value is no multiple of K, or fewer than ``least`` blocks."""
    if value % block or value < least * block:
        more = ", at least twice it" if least == 2 else ""
        raise ValueError(f"--{name}={value} is not allowed: a multiple of block_size={block}{more}")


def chosen(controls: dict, names: list[str] | None) -> dict:
    """The controls of these names; ``None``: all.

    Raises:
        ValueError: there is none of that name.
    """
    for name in names or []:
        if name not in controls:
            raise ValueError(f"--controls={name} is not known, allowed are {', '.join(controls)}")
    return controls if names is None else {name: controls[name] for name in names}


def command(
    name: str,
    doc: str,
    options: Callable[[Options], None],
    study: Callable[[argparse.Namespace], Iterator[tuple[Path, Report]]],
) -> Callable[[list[str] | None], int]:
    """``main`` of a study: command line -> exit code.

    Args:
        study: yields the stem of the files with each report; the last one of a stem is shown.
    """

    def measured(args: argparse.Namespace) -> None:
        given.check(args)
        quiet_libraries()
        SHORTER.set(given.shorter())
        stem = report = told = None
        for next_stem, next_report in study(args):
            if stem not in (None, next_stem):
                _tell(report, told)
            stem, report = next_stem, next_report
            told = report.write(stem)
        _tell(report, told)

    given = Options(name, doc)
    options(given)
    # In a context of its own: what makes this command shorter is nothing to whatever comes next in the process.
    return lambda arguments=None: copy_context().run(run, measured, given.parser, arguments)


def _tell(report: Report, told: str) -> None:
    report.width = WIDTH
    report.show()
    print(told)


def usable(out: Path) -> Path:
    """The folder, made if need be: what cannot be written is said before anything is measured, not after.

    Raises:
        ValueError: it cannot be a folder, or nothing can be written there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            return out
    except OSError as error:
        raise ValueError(f"--out: {out} cannot be used as a folder ({error.strerror})") from error
