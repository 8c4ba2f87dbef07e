"""What the commands of this room have in common: models, settings, sampling."""

import argparse
import sys
from pathlib import Path

from megactx.framework.bar import quiet_libraries
from megactx.memory.curation_settings import CurationSettings
from megactx.runtime import Controller, Observer, Sampling, Session, Settings, Wanted, load_models
from megactx.runtime.session_files import is_session
from megactx.runtime.settings import DRAFTS, KINDS, POSITIONS, READING, REUSE
from megactx.runtime.text import from_bytes

SIZES = {  # of --attention mega
    "segment": "of which older rows see their own leaves",
    "mid": "before a segment that gists of level 1 stand for",
    "live": "at the end that see every entry",
    "overlap": "before a segment that its older rows see too",
}
HOST = "127.0.0.1"  # where servers listen
MODEL = "a run's or an exported folder; a plain base: a folder, a GGUF file, smollm2 (default: the embedded models)"


def add_models(parser: argparse.ArgumentParser, budget: int = 2048) -> None:
    """``--model`` and what decides how a history is read."""
    parser.add_argument("--model", help=MODEL)
    parser.add_argument("--budget", type=int, default=budget, help=f"entries of the working context (default {budget})")
    parser.add_argument(
        "--megacontext", choices=KINDS, default="focus", help="focus, recency, or none: the plain model (default focus)"
    )
    parser.add_argument(
        "--positions", choices=POSITIONS, default="rebased", help="beyond the trained range (default rebased)"
    )
    parser.add_argument(
        "--earn", action="store_true", help="read the newest tokens, and what is older only where it is worth more"
    )
    parser.add_argument("--keys", type=int, default=0, help="with --earn: old blocks found by their keys (default 0)")
    few = "newest tokens read beside what a question finds by keys; small models answer best from 0, the question alone"
    parser.add_argument("--newest", type=int, metavar="TOKENS", help=f"{few} (default: all)")
    again = "with --earn: what stood behind the end of the text before is mixed into what the base says comes next"
    parser.add_argument("--recall", action="store_true", help=again)
    parser.add_argument(
        "--graphs", action="store_true", help="decode by a CUDA graph on a card (never tried on one yet)"
    )
    told = "lookup: read what stood behind the newest words before along with them, for speed; see docs/runtime.md"
    parser.add_argument("--drafts", choices=DRAFTS, default="none", help=f"{told} (default none)")
    kept = "approximate: behind an edit only new entries are read, which changes answers a little, see docs/runtime.md"
    parser.add_argument("--reuse", choices=REUSE, default="exact", help=f"{kept} (default exact)")
    reading = "mega: gists stand for far text, and most keys and values outlast an edit, see docs/attention.md"
    parser.add_argument("--attention", choices=READING, default="plain", help=f"{reading} (default plain)")
    for name, about in SIZES.items():
        default = getattr(Settings, name)
        said = f"with --attention mega: {about} (default {default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="TOKENS", help=said)
    parser.add_argument(
        "--metrics", type=int, metavar="PORT", help="give Prometheus numbers at 127.0.0.1:PORT/metrics (default: none)"
    )


def add_talk(parser: argparse.ArgumentParser, tokens: int) -> None:
    """What continues a text has: ``--session``, how many tokens and which, ``--model`` and the rest."""
    kept = "go on with this session, and save it; made if it is not there"
    parser.add_argument("--session", metavar="FOLDER", help=kept)
    clean = "archive what nobody reads while it goes on: an option of the config group curation (default: never)"
    parser.add_argument("--curation", metavar="NAME,...", help=clean)
    add_parts(parser)
    add_sampling(parser, tokens)
    add_models(parser)


def add_parts(parser: argparse.ArgumentParser) -> None:
    """Other trees in the window."""
    shown = "another session, followed source or tree that the window shows; several are allowed"
    parser.add_argument("--part", action="append", default=[], metavar="NAME=PATH[:SHARE]", help=shown)
    made = "a prompt as gists, of apps.preset: its name or folder"
    parser.add_argument("--preset", action="append", default=[], metavar="NAME", help=made)
    parser.add_argument("--drop", action="append", default=[], metavar="NAME", help="a part that the session had")
    parser.add_argument("--pin", action="append", default=[], metavar="NAME", help="show no newer version of a part")


def add_sampling(parser: argparse.ArgumentParser, tokens: int) -> None:
    """How many tokens, and which."""
    parser.add_argument("--tokens", type=int, default=tokens, help=f"of an answer, at most (default {tokens})")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default 0)")
    parser.add_argument("--top-k", type=int, default=0, help="draw among the k likeliest (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest of this share (default 1)")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="of the newest 256 tokens (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Raises ValueError for what is not allowed."""
    if args.tokens < 0:
        raise ValueError(f"--tokens={args.tokens} is not allowed: at least 0")
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    return Sampling(**{name: getattr(args, name) for name in names})


def controller_of(args: argparse.Namespace, tree: bool = False) -> Controller:
    """Load what was asked for; what a person should know goes to stderr.

    Args:
        tree: the command is about trees.

    Raises:
        ValueError: models and settings do not fit, or make no tree.
    """
    names = ("budget", "megacontext", "positions", "earn", "keys", "newest", "recall")
    names += ("graphs", "drafts", "reuse", "attention")
    settings = Settings(**{name: getattr(args, name) for name in (*names, *SIZES)})
    quiet_libraries()
    controller = Controller(load_models(args.model, setting="--model"), settings)
    if tree and controller.plain:
        raise ValueError(f"{controller.plain} keeps no tree, which this command is about")
    for note in controller.notes:
        print(note, file=sys.stderr)
    return controller


def observers_of(args: argparse.Namespace, controller: Controller) -> list[Observer]:
    """The telemetry that was asked for, if any; its server ends with the process.

    Raises:
        ValueError: the port is taken, what it needs is not installed, or there is nothing to measure.
    """
    if args.metrics is None:
        return []
    if controller.plain:
        raise ValueError(f"--metrics: {controller.plain} has no working context to measure; focus and recency have one")
    from .prometheus import Prometheus

    found = Prometheus(args.metrics, controller.models)
    print(f"metrics: {found.address}", file=sys.stderr)
    return [found.telemetry]


def prompt_file_of(args: argparse.Namespace) -> str | None:
    """The text of ``--file``; ``None``: there is none.

    Raises:
        ValueError: a prompt is there as well, or the file is missing, empty or not text.
    """
    if not args.file:
        return None
    if args.prompt:
        raise ValueError("give a prompt or --file, not both")
    path = Path(args.file).expanduser()
    if not path.is_file():
        raise ValueError(f"--file={args.file}: there is no such file")
    if not (text := from_bytes(path.read_bytes(), str(path))):
        raise ValueError(f"--file={args.file}: it is empty, there is nothing to continue")
    return text


def opened(args: argparse.Namespace, folder: str | Path | None) -> Session:
    """The session of a folder, with the models and the telemetry that were asked for, for a command about trees.

    Raises:
        ValueError: see ``controller_of`` and ``observers_of``.
    """
    controller = controller_of(args, tree=True)
    return session_of(folder, controller, observers_of(args, controller))


def curation_of(text: str) -> CurationSettings:
    """``NAME,setting=value,...`` -> that option of the config group ``curation``, with these settings.

    Raises:
        ValueError: there is no such option or setting, or a value is not allowed.
    """
    from megactx.framework.config.search_path import option  # Hydra, which takes its time

    return CurationSettings(**option("curation", text))


def talk_of(args: argparse.Namespace, controller: Controller, observers=()) -> Session:
    """The session that ``add_talk`` describes, with its parts.

    Raises:
        ValueError: a part that cannot be shown, or is not there.
    """
    from . import preset

    parts, session = [Wanted.parse(text) for text in args.part], None
    parts += [preset.wanted(name) for name in args.preset]
    try:
        session = session_of(args.session, controller, observers, parts, args.drop)
        for name in args.pin:
            session.pin(name)
        if args.curation is not None:
            session.curate(curation_of(args.curation))
    except BaseException:
        if session is not None:
            session.close()
        raise
    return session


def session_of(folder: str | Path | None, controller: Controller, observers=(), parts=(), without=()) -> Session:
    """The session of a folder, or a new one; it is saved there when ``save`` is called.

    Args:
        parts: that its window shows besides those that it had.
        without: names of parts that it had.
    """
    if folder is not None and is_session(Path(folder).expanduser()):
        return Session.load(folder, controller, observers, parts, without)
    if without:
        raise ValueError(f"--drop={[*without][0]}: a new session has no parts")
    session = Session(controller, observers, parts)
    if folder is not None:
        session.save(folder)  # now, so that a folder that cannot be used is refused before anything is done
    return session
