"""Read files into a session: every token and every gist of them, saved in a folder that chat and generate go on with.

    python -m megactx.apps.ingest books/ notes.md 'logs/*.txt' OUT
    python -m megactx.apps.chat --session OUT
    python -m megactx.apps.ingest --engine ray books/ /shared/OUT         on all cores, or all hosts of a cluster of Ray

Files are read as ``data.files`` does: text, code, Markdown, csv, json, jsonl and parquet rows, gz too. What was read is
written down in OUT with every save, so the same command goes on after it was stopped, and new files can be added later.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich import progress

from megactx.data.files import Files
from megactx.framework.command_line import run
from megactx.framework.files import checksum
from megactx.framework.workers import PROCESS, add_engine, on_all_hosts, workers
from megactx.runtime import Session
from megactx.runtime.text import encodable, parts_of

from .command_line import add_models, opened

PIECE = 2**18  # characters that are tokenised at a time
SAVE_EVERY = 60.0  # seconds, and never more than a tenth of the time
BETWEEN = "\n\n"  # documents


def ingest(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: no such file, one that is not text, or a folder that is none of ours. What was read is saved.
    """
    if args.megacontext == "none":
        raise ValueError("--megacontext=none keeps no tree, there is nothing to build")
    paths = find(args.files)
    with opened(args, args.out) as session:
        began, before = time.monotonic(), session.length
        parts = session.folder.with_name(f"{session.folder.name}.parts")
        try:
            if args.engine == PROCESS:
                take(session, paths)
            else:
                from . import corpus

                with workers(args.engine) as each:
                    corpus.take(session, paths, parts, on_all_hosts(args.model), each)
        finally:
            settle(session)
            session.save()
        shutil.rmtree(parts, ignore_errors=True)
        new, seconds = session.length - before, time.monotonic() - began
        tree = session.tree
        levels = ", ".join(f"{int(tree.counts(n)[0]):,} of level {n}" for n in range(1, tree.depth + 1)) or "none"
        print(f"{new:,} new tokens in {seconds:.0f} s ({new / max(seconds, 1e-9):,.0f} per second)")
        print(f"{args.out}: {session.length:,} tokens, gists: {levels}, {tree.bytes() / 2**20:.1f} MiB")


def find(names: list[str]) -> list[Path]:
    """All files of files, folders and globs, each once, in that order.

    Raises:
        ValueError: a name that leads to none.
    """
    return [*dict.fromkeys(path for name in names for path in Files(name).paths)]


def take(session: Session, paths: list[Path]) -> None:
    """Read files that the session has not read yet; ``session.about['ingested']`` says which it has, and how far."""
    settle(session)
    clock = SaveClock(session, SAVE_EVERY)
    with _Shown(sum(path.stat().st_size for path in paths)) as shown:
        for path, known in unread(session, paths, shown.say):
            size, name = path.stat().st_size, str(path.absolute())
            if not known["whole"]:
                for first, text in pieces(path, known["characters"], PIECE):
                    _take_up(session, name, text, characters=first + len(text))
                    clock.save_when_due()
                    shown.inside(session.length)
                _take_up(session, name, BETWEEN, whole=True)
            shown.advance(size, session.length)


def unread(session: Session, paths: list[Path], say: Callable[[str], None]) -> Iterator[tuple[Path, dict]]:
    """All files, each with its sha256 and what the session has of it: so many characters, or the whole."""
    done = session.about.setdefault("ingested", {})
    for path in paths:
        name, digest = str(path.absolute()), checksum(path)
        known = done.get(name)
        if known is not None and known["sha256"] != digest:
            say(f"{path} has changed since it was read: it is read again, behind all that is there")
            known = None
        if known is None:
            known = done[name] = {"sha256": digest, "characters": 0, "whole": False}
        yield path, known


def _take_up(session: Session, name: str, text: str, **then) -> None:
    """Append a piece of a file and note it. Ctrl-C may come between the two, so what will be noted is said first."""
    ids = session.encode(text)
    about_to_take(session, name, session.length + len(ids), then)
    session.append(ids, follow=False)
    settle(session)


def about_to_take(session: Session, name: str, tokens: int, then: dict) -> None:
    """Say what will be known of a file when the session has so many tokens."""
    session.about["taking"] = {"name": name, "tokens": tokens, "then": then}


def settle(session: Session) -> None:
    """Note the piece that was taken up last, if it was: a piece is there as a whole or not at all."""
    step = session.about.get("taking")
    if step is not None and session.length >= step["tokens"]:
        session.about["ingested"][step["name"]] |= step["then"]
    session.about.pop("taking", None)


def pieces(path: Path, skip: int, size: int) -> Iterator[tuple[int, str]]:
    """(first character, text) of a file from ``skip`` on, of at most ``size`` characters, cut behind a line where there
    is one.

    Raises:
        ValueError: the file is not text.
    """
    place, left, waiting = skip, skip, ""  # rows go together: each piece that is taken up costs a look at the window
    for number, row in enumerate(Files(str(path)).load()):
        text = (BETWEEN if number else "") + encodable(row["text"])
        if "\0" in text:
            raise ValueError(f"{path}: binary, not text (a NUL byte at character {text.index(chr(0))})")
        waiting, left = waiting + text[left:], max(0, left - len(text))
        if len(waiting) > size:
            *whole, waiting = parts_of(waiting, size)
            for part in whole:
                yield place, part
                place += len(part)
    if waiting:
        yield place, waiting


class SaveClock:
    """Saves a session when so many seconds have passed since the last save, and ten times what that took."""

    def __init__(self, session: Session, every: float):
        self.session, self.every, self.saved, self.took = session, every, time.monotonic(), 0.0

    def save_when_due(self) -> None:
        began = time.monotonic()
        if began - self.saved > max(self.every, 10 * self.took):
            self.session.save()
            self.saved = time.monotonic()
            self.took = self.saved - began


class _Shown:
    """A bar in a terminal, a line every ten percent elsewhere."""

    def __init__(self, total: int):
        self.total, self.done, self.told, self.began = total, 0, 0, time.monotonic()
        columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TimeRemainingColumn())
        self.bar = progress.Progress(
            *columns, progress.TextColumn("{task.description}"), disable=not sys.stdout.isatty()
        )
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> "_Shown":
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def say(self, line: str) -> None:
        self.bar.console.print(line, markup=False)

    def inside(self, tokens: int) -> None:
        self.bar.update(self.task, description=f"{tokens:,} tokens")

    def advance(self, size: int, tokens: int) -> None:
        self.done += size
        self.bar.update(self.task, completed=self.done, description=f"{tokens:,} tokens")
        tenth = 10 * self.done // max(1, self.total)
        if self.bar.disable and tenth > self.told:
            self.told = tenth
            print(f"{10 * tenth} %  {tokens:,} tokens  {time.monotonic() - self.began:.0f} s", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.apps.ingest", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILES", help="files, folders or globs")
    parser.add_argument("out", metavar="OUT", help="session folder; one that is there is gone on with")
    add_engine(parser.add_argument)
    add_models(parser)
    return run(ingest, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
