"""Read files into a session: every token and every gist of them, saved in a folder that chat and generate go on with.

    python -m megactx.apps.ingest books/ notes.md 'logs/*.txt' OUT
    python -m megactx.apps.chat --session OUT
    python -m megactx.apps.ingest --engine ray books/ /shared/OUT         on all cores, or all hosts of a cluster of Ray

Files are read as ``data.files`` does: text, code, Markdown, csv, json, jsonl and parquet rows, gz too. What was read is
written down in OUT with every save, so the same command goes on after it was stopped, and new files can be added later.

    python -m megactx.apps.ingest --parts src/ docs/ MEMORY      MEMORY/src and MEMORY/docs, for --part of a chat
"""

import argparse
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich import progress

from megactx.data.files import Files
from megactx.framework.bar import quiet_libraries
from megactx.framework.command_line import run
from megactx.framework.errors import RunFailed
from megactx.framework.files import checksum
from megactx.framework.workers import PROCESS, add_engine, on_all_hosts, workers
from megactx.runtime import Session, load_models
from megactx.runtime.text import encodable, parts_of

from .command_line import add_models, opened
from .follow.follower import Follower
from .follow.sources import Folder

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
    if args.parts:
        return make_parts(args)
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
            note_gone(session, args.files)
            if args.licence is not None:
                session.about["licence"] = args.licence
        finally:
            settle(session)
            session.save()
        if spans := archive_gone(session):
            print(f"{spans:,} tokens of deleted files went into the archive")
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
                for first, line, text in pieces(path, known["characters"], PIECE):
                    _take_up(session, name, text, line, characters=first + len(text))
                    clock.save_when_due()
                    shown.inside(session.length)
                _take_up(session, name, BETWEEN, whole=True)
            shown.advance(size, session.length)


def unread(session: Session, paths: list[Path], say: Callable[[str], None]) -> Iterator[tuple[Path, dict]]:
    """All files, each with its sha256 and what the session has of it: so many characters, or the whole."""
    done = session.about.setdefault("ingested", {})
    for path in paths:
        name, digest = str(path.absolute()), checksum(path)
        known, older = done.get(name), []
        if known is not None and known["sha256"] != digest:
            say(f"{path} has changed since it was read: it is read again, behind all that is there")
            older, known = [*known.get("older", []), *known.get("spans", [])], None
        if known is None:
            known = done[name] = {"sha256": digest, "characters": 0, "whole": False, "spans": [], "older": older}
        if known.pop("gone", None) is not None:  # it is there again
            for first, stop, *_ in [*known["spans"], *known.get("older", [])]:
                session.restore(first, stop)
        yield path, known


def note_gone(session: Session, names: list[str]) -> None:
    """Note files of folders that are no more: their blocks stay in the history, and closed where it is a part."""
    folders = [Path(name).expanduser().absolute() for name in names if Path(name).expanduser().is_dir()]
    for name, known in session.about.get("ingested", {}).items():
        path = Path(name)
        if "gone" not in known and not path.exists() and any(path.is_relative_to(folder) for folder in folders):
            known["gone"] = round(time.time(), 3)
            print(f"{path} is no more: its blocks are noted as deleted")


def archive_gone(session: Session) -> int:
    """Blocks of deleted files go into the archive, where ``apps.curation restore`` finds them until they are purged;
    -> tokens. Blocks that lie in two files, and the newest ones of a session, stay."""
    k, before = session.stream.block, session.tree.compacted
    actions = [
        {"start": -(-first // k) * k, "stop": stop // k * k, "action": "compact", "floor": 1, "bytes": 0}
        | {"reason": f"deleted: {name}", "opened": True}
        for name, known in session.about.get("ingested", {}).items()
        if "gone" in known
        for first, stop, *_ in [*known.get("spans", []), *known.get("older", [])]
    ]
    actions = [action for action in actions if action["start"] < action["stop"]]
    session.stream.keeper.do(actions)
    return (session.tree.compacted - before) * k


def make_parts(args: argparse.Namespace) -> None:
    """A part for each source tree, in the folder OUT: brought up to date, which replaces what has changed and leaves
    out what is gone.

    Raises:
        ValueError: two sources of one name, no GistNet, or a part of other models.
        RunFailed: a source could not be read.
    """
    sources = {}
    for text in args.files:
        path = Path(text).expanduser().absolute()
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem if path.is_file() else path.name).strip("_-")
        if not path.exists():
            raise ValueError(f"FILES={text}: there is no such file or folder")
        if not name or name in sources:
            raise ValueError(f"FILES={text}: a part {name or '(no name)'} is there already; rename a folder")
        sources[name] = Folder(path)
    quiet_libraries()
    models = load_models(args.model, setting="--model")
    if models.gistnet is None:
        raise ValueError(f"model: there is no GistNet in {models.name or 'these models'}, which trees are made with")
    follower = Follower(Path(args.out).expanduser(), models, sources)
    try:
        for name in sources:
            if args.licence is not None:
                follower.followed[name].part.note_licence(args.licence)
            follower.look(name)
        state = follower.state()
    finally:
        follower.close()
    for name, told in state.items():
        dead = f", {told['dead']} left out" if told["dead"] else ""
        what = ", ".join(f"{told[kind]} {kind}" for kind in ("added", "replaced", "removed") if told[kind])
        print(f"{name}: {told['documents']:,} documents, {told['tokens']:,} tokens{dead} ({what or 'as it was'})")
    if wrong := [f"{name}: {told['error']}" for name, told in state.items() if told["error"]]:
        raise RunFailed("; ".join(wrong))


def _take_up(session: Session, name: str, text: str, line: int | None = None, **then) -> None:
    """Append a piece of a file and note it. Ctrl-C may come between the two, so what will be noted is said first.

    Of each piece it is noted which tokens it became, its first line, and when.
    """
    ids = session.encode(text)
    stop = session.length + len(ids)
    if line is not None:
        then["spans"] = spans_with(session, name, session.length, stop, line)
    about_to_take(session, name, stop, then)
    session.append(ids, follow=False)
    settle(session)


def spans_with(session: Session, name: str, start: int, stop: int, line: int) -> list[list]:
    """What is known of a file's pieces, and one more: tokens start .. stop - 1, from that line on, read now."""
    known = session.about["ingested"][name].get("spans", [])
    return [*known, [start, stop, line, round(time.time(), 3)]]


def about_to_take(session: Session, name: str, tokens: int, then: dict) -> None:
    """Say what will be known of a file when the session has so many tokens."""
    session.about["taking"] = {"name": name, "tokens": tokens, "then": then}


def settle(session: Session) -> None:
    """Note the piece that was taken up last, if it was: a piece is there as a whole or not at all."""
    step = session.about.get("taking")
    if step is not None and session.length >= step["tokens"]:
        session.about["ingested"][step["name"]] |= step["then"]
    session.about.pop("taking", None)


def pieces(path: Path, skip: int, size: int) -> Iterator[tuple[int, int, str]]:
    """(first character, its line, text) of a file from ``skip`` on, of at most ``size`` characters, cut behind a line
    where there is one.

    Raises:
        ValueError: the file is not text.
    """
    place, left, waiting = skip, skip, ""  # rows go together: each piece that is taken up costs a look at the window
    line = 1
    for number, row in enumerate(Files(str(path)).load()):
        text = (BETWEEN if number else "") + encodable(row["text"])
        if "\0" in text:
            raise ValueError(f"{path}: binary, not text (a NUL byte at character {text.index(chr(0))})")
        line += text[:left].count("\n")
        waiting, left = waiting + text[left:], max(0, left - len(text))
        if len(waiting) > size:
            *whole, waiting = parts_of(waiting, size)
            for part in whole:
                yield place, line, part
                place += len(part)
                line += part.count("\n")
    if waiting:
        yield place, line, waiting


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
    made = "OUT is a folder of parts, one tree for each of FILES; a file that changes replaces its own blocks"
    parser.add_argument(
        "--licence", help="of the texts, noted in OUT or its parts, and shown where it is a part (default: as it was)"
    )
    parser.add_argument("--parts", action="store_true", help=made)
    add_models(parser)
    return run(ingest, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
