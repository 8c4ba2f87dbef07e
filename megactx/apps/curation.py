"""Keep a saved session clean: what nobody reads goes into an archive, and comes back when it is wanted.

    python -m megactx.apps.curation report SESSION                     bytes, and what each policy would take away
    python -m megactx.apps.curation plan SESSION PLAN.json             write down what would be done; nothing changes
    python -m megactx.apps.curation apply SESSION PLAN.json            do it
    python -m megactx.apps.curation restore SESSION [START-STOP]       bring back all, or a span of tokens
    python -m megactx.apps.curation purge SESSION --days 90            what was archived so long ago goes for good
    python -m megactx.apps.curation log SESSION                        all that was ever done

``--policy NAME:setting=value,...`` (several) chooses the policies: unread, duplicate, age, budget; ``keep`` says what
stays. SESSION is the folder of a session, which must not be in use, or of a tree.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megactx.framework.command_line import run
from megactx.framework.files import write
from megactx.memory.curation import DEFAULT, Curated, names, read_plan
from megactx.runtime import session_files

ACTIONS = ("report", "plan", "apply", "restore", "purge", "log")


def curate(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: no tree, one in use, no plan, or a policy that is not known.
    """
    named = policies_of(args.policy)
    with held(Path(args.session).expanduser()) as folder:
        tree = Curated(folder, args.floor)
        if args.action == "report":
            for what, size in tree.file.sizes().items():
                print(f"{what:10s} {size / 1e6:12.3f} MB")
            print(f"{int((tree.floor > 0).sum()):,} of {len(tree.floor):,} blocks were compacted")
            for name, mine in tree.chosen(
                {name: {} for name in names() if name not in ("keep", "budget")} | named
            ).items():
                print(
                    f"{name:10s} would compact {int(mine.sum()):,} blocks, {int(mine.sum()) * tree.freed / 1e6:.3f} MB"
                )
        elif args.action == "plan":
            plan = tree.plan(named)
            write(_given(args), json.dumps(plan, indent=1) + "\n")
            size = sum(action["bytes"] for action in plan["actions"])
            print(f"{len(plan['actions'])} spans, {size / 1e6:.3f} MB: {args.what}. Nothing was changed")
        elif args.action == "apply":
            print(f"{tree.apply(read_plan(_given(args))) / 1e6:.3f} MB went into the archive")
        elif args.action == "restore":
            print(f"{tree.restore(*_span(args.what, tree.tokens))} spans were restored")
        elif args.action == "purge":
            print(f"{tree.purge(args.days)} spans are gone for good")
        else:
            for when, action, start, stop, reason in tree.log():
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(when))} {action} {start}-{stop} {reason}")


@contextmanager
def held(folder: Path) -> Iterator[Path]:
    """The folder of a session's tree, which nobody else has open; or that of a tree."""
    if not session_files.is_session(folder):
        yield folder
        return
    with session_files.lock(folder):
        yield folder / session_files.TREE


def policies_of(given: list[str]) -> dict[str, dict]:
    """``NAME:setting=value,...`` -> settings by name.

    Raises:
        ValueError: a policy that is not known, or a setting without a value.
    """
    out = {}
    for text in given or DEFAULT:
        name, _, settings = text.partition(":")
        if name not in names():
            raise ValueError(f"--policy {name} is not known, there are {', '.join(names())}")
        pairs = [pair.partition("=") for pair in filter(None, settings.split(","))]
        if wrong := [key for key, equals, _ in pairs if not equals]:
            raise ValueError(f"--policy {text}: {wrong[0]} has no value")
        out[name] = {key: _number(value) for key, _, value in pairs}
    return out


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _given(args: argparse.Namespace) -> Path:
    if args.what is None:
        raise ValueError(f"{args.action}: name the file of the plan")
    return Path(args.what).expanduser()


def _span(text: str | None, tokens: int) -> tuple[int, int]:
    if text is None:
        return 0, tokens
    start, dash, stop = text.partition("-")
    if not (dash and start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise ValueError(f"restore: {text} is not allowed: START-STOP, in tokens")
    return int(start), int(stop)


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.apps.curation", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("session", metavar="SESSION")
    parser.add_argument(
        "what", nargs="?", metavar="PLAN|START-STOP", help="of plan and apply: a file; of restore: a span"
    )
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME:setting=value,...",
        help="default: unread and duplicate",
    )
    parser.add_argument(
        "--floor", type=int, default=1, help="1 keeps a gist for 32 tokens, 2 one for 1,024 (default 1)"
    )
    parser.add_argument("--days", type=float, default=90, help="of purge (default 90)")
    return run(curate, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
