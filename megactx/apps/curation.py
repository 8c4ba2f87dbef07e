"""Keep a saved session clean: what nobody reads goes into an archive, and comes back when it is wanted.

    python -m megactx.apps.curation report SESSION                     bytes, and what each policy would take away
    python -m megactx.apps.curation measure SESSION --blocks 500       what collapsing blocks costs, of a sample of them
    python -m megactx.apps.curation plan SESSION PLAN.json             write down what would be done; nothing changes
    python -m megactx.apps.curation apply SESSION PLAN.json            do it
    python -m megactx.apps.curation restore SESSION [START-STOP]       bring back all, or a span of tokens
    python -m megactx.apps.curation purge SESSION --days 90            what was archived so long ago goes for good
    python -m megactx.apps.curation log SESSION                        all that was ever done

``--config NAME,setting=value,...`` is an option of the config group ``curation``: default, budget, unread,
low_information, off. ``--policy NAME:setting=value,...`` (several) takes the place of its policies. SESSION is the
folder of a session, or of a tree. Of a session that is in use a report, a plan and the log are read as it was saved
last; a plan is applied by the process that has it, at its next refocuses; nothing else is done.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megactx.evaluation import curation as evaluation
from megactx.framework.bar import bar, quiet_libraries
from megactx.framework.command_line import run
from megactx.framework.files import write
from megactx.memory.curation import Curated, names, read_plan
from megactx.memory.encoding import known_as
from megactx.runtime import load_models, session_files
from megactx.runtime.curation import HANDED

from .command_line import MODEL, curation_of

CONFIG = "option of the config group curation, NAME or NAME,setting=value,... (default: default)"
READING = ("report", "plan", "log")  # of a session that is in use too
ACTIONS = ("report", "measure", "plan", "apply", "restore", "purge", "log")


def curate(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: no tree, one in use, no plan, or a policy that is not known.
    """
    settings = curation_of(args.config)
    named = policies_of(args.policy) if args.policy else settings.named
    place = Path(args.session).expanduser()
    if args.action == "apply" and handed(place, args):
        return
    with held(place, alone=args.action not in READING) as folder:
        tree = Curated(folder, settings.floor if args.floor is None else args.floor)
        if args.action == "report":
            for what, size in tree.file.sizes().items():
                print(f"{what:10s} {size / 1e6:12.3f} MB")
            print(f"{int((tree.floor > 0).sum()):,} of {len(tree.floor):,} blocks were compacted")
            tell_signals(tree)
            for name, mine in tree.chosen(
                {name: {} for name in names() if name not in ("keep", "budget")} | named
            ).items():
                print(
                    f"{name:10s} would compact {int(mine.sum()):,} blocks, {int(mine.sum()) * tree.freed / 1e6:.3f} MB"
                )
        elif args.action == "measure":
            measure(tree, args)
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
            days = settings.retention if args.days is None else args.days
            if days is None:
                raise ValueError("purge: name --days, for this config keeps the archive for ever")
            print(f"{tree.purge(days)} spans are gone for good")
        else:
            for when, action, start, stop, reason in tree.log():
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(when))} {action} {start}-{stop} {reason}")


def tell_signals(tree: Curated) -> None:
    """Of how many blocks it is known what they are worth, and the mean of it."""
    opened = int((tree.opened > 0).sum())
    print(f"{opened:,} blocks were opened, {int(tree.opened.sum()):,} times; {int(tree.access.sum()):,} reads as gists")
    told = {
        "worth": "LensNet's word on their tokens",
        "dnll": "measured dNLL of collapsing",
        "nll": "measured NLL of their own tokens",
    }
    for name, what in told.items():
        values = getattr(tree, name)
        if len(known := values[~values.isnan()]):
            low, high = known.quantile(torch.tensor([0.1, 0.9])).tolist()
            print(
                f"{what}: {len(known):,} blocks, mean {float(known.mean()):.4f} nats per token,"
                f" 10 % below {low:.4f}, 10 % above {high:.4f}"
            )


def measure(tree: Curated, args: argparse.Namespace) -> None:
    """Measure a sample of blocks; what was measured before is not measured again.

    Raises:
        ValueError: a number that is not allowed, no whole block, or models that did not make the tree.
    """
    if args.blocks < 1:
        raise ValueError(f"--blocks={args.blocks} is not allowed: at least 1")
    if len(tree.levels) == 1:
        raise ValueError(f"{args.session}: the tree has no whole block")
    quiet_libraries()
    models, made_by = load_models(args.model, setting="--model"), tree.about["versions"][tree.about["version"]]
    if models.gistnet is None or not known_as(models.gistnet, made_by):
        raise ValueError(f"{args.session}: another GistNet made it ({made_by}); name its models with --model")
    numbers = evaluation.sample(tree, args.blocks, args.seed)
    evaluation.measure(tree, models.base, models.gistnet, numbers, bar("batches of blocks"))
    print(f"{len(numbers):,} blocks were measured")
    tell_signals(tree)


def handed(folder: Path, args: argparse.Namespace) -> bool:
    """Leave the plan to the process that has a session in use, if any."""
    if not session_files.is_session(folder):
        return False
    plan = read_plan(_given(args))
    try:
        session_files.lock(folder).release()
    except ValueError as error:
        if not isinstance(error.__cause__, BlockingIOError):
            raise
        write(folder / HANDED, json.dumps(plan) + "\n")
        print("The session is in use: who has it does this at its next refocuses")
        return True
    return False


@contextmanager
def held(folder: Path, alone: bool = True) -> Iterator[Path]:
    """The folder of a session's tree, with ``alone`` one which nobody else has open; or that of a tree."""
    if not session_files.is_session(folder):
        yield folder
        return
    if not alone:
        yield folder / session_files.TREE
        return
    with session_files.lock(folder):
        yield folder / session_files.TREE


def policies_of(given: list[str]) -> dict[str, dict]:
    """``NAME:setting=value,...`` -> settings by name.

    Raises:
        ValueError: a policy that is not known, or a setting without a value.
    """
    out = {}
    for text in given:
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
    parser.add_argument("--config", default="default", metavar="NAME,...", help=CONFIG)
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME:setting=value,...",
        help="in place of those of the config",
    )
    parser.add_argument(
        "--floor", type=int, help="1 keeps a gist for 32 tokens, 2 one for 1,024 (default: that of the config)"
    )
    parser.add_argument("--blocks", type=int, default=500, help="of measure: the sample (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="of measure: which blocks (default 0)")
    parser.add_argument("--model", help=f"of measure: {MODEL}")
    parser.add_argument("--days", type=float, help="of purge (default: the config's retention)")
    return run(curate, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
