"""Follow folders, mail and feeds: what is written there is in the memory's parts a moment later.

    python -m megactx.apps.follow follow.toml
    python -m megactx.apps.follow follow.toml --once         bring all up to date, and end

    memory = "memory"                     # folder of the parts, beside this file
    model = "OUT"                         # an export; without it the embedded models
    port = 8767                           # of /health and /metrics
    debounce = 0.5                        # seconds without a change before it is looked at

    [sources.notes]
    kind = "folder"                       # folder | mbox | feed
    path = "~/notes"

Each source is a tree of its own, MEMORY/NAME, with the document and line of each block in MEMORY/NAME.json. What cannot
be read is in MEMORY/dead.json. docs/following.md tells the rest.
"""

import argparse
import re
import signal
import sys
import threading
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megactx.framework.bar import quiet_libraries
from megactx.framework.command_line import run
from megactx.framework.errors import FAILED
from megactx.framework.extra import extra
from megactx.runtime import load_models

from .follower import Follower
from .sources import KINDS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # it names a folder
PORT, TICK = 8767, 500  # milliseconds between two looks at what is to be tried again


@dataclass
class Config:
    """What a file says."""

    memory: Path
    sources: dict[str, object]
    model: str | None = None
    port: int = PORT
    debounce: float = 0.5


def read(path: Path) -> Config:
    """Raises: ValueError: there is no such file, or a setting is not allowed; it names it."""
    if not path.is_file():
        raise ValueError(f"CONFIG={path}: there is no such file")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"CONFIG={path}: it is no TOML ({error})") from error
    _known(given, ("memory", "model", "port", "debounce", "sources"), path, "")
    memory, debounce, port = given.get("memory"), given.get("debounce", 0.5), given.get("port", PORT)
    if not isinstance(memory, str) or not memory:
        raise ValueError(f"{path}: memory={memory!r} is not allowed: a folder")
    if type(debounce) not in (int, float) or not 0 < debounce <= 60:
        raise ValueError(f"{path}: debounce={debounce!r} is not allowed: seconds, above 0 and at most 60")
    if type(port) is not int:
        raise ValueError(f"{path}: port={port!r} is not allowed: a number")
    model = given.get("model")
    if model is not None and not isinstance(model, str):
        raise ValueError(f"{path}: model={model!r} is not allowed: a name")
    if isinstance(model, str) and _under(path, model).exists():
        model = str(_under(path, model))
    sources = given.get("sources")
    if not isinstance(sources, dict) or not sources:
        raise ValueError(f"{path}: there are no sources; [sources.NAME] begins one")
    found = {name: _source(path, name, about) for name, about in sources.items()}
    place = _under(path, memory)
    for name, source in found.items():
        if place.is_relative_to(source.watched):
            raise ValueError(f"{path}: memory={memory} lies in what sources.{name} follows; choose another folder")
    return Config(place, found, model, port, float(debounce))


def _source(path: Path, name: str, about) -> object:
    where = f"{path}: sources.{name}"
    if not NAME.fullmatch(name):
        raise ValueError(f"{where}: a name has up to 64 letters, digits, - and _")
    if not isinstance(about, dict):
        raise ValueError(f"{where}={about!r} is not allowed: kind and path")
    _known(about, ("kind", "path"), path, f"sources.{name}.")
    if about.get("kind") not in KINDS:
        raise ValueError(f"{where}.kind={about.get('kind')!r} is not allowed: {', '.join(KINDS)}")
    if not isinstance(about.get("path"), str) or not about["path"]:
        raise ValueError(f"{where}.path={about.get('path')!r} is not allowed: a file or a folder")
    source = KINDS[about["kind"]](_under(path, about["path"]))
    if not source.watched.is_dir():
        raise ValueError(f"{where}.path: there is no folder {source.watched}")
    return source


def _known(given: dict, names: Iterable[str], path: Path, prefix: str) -> None:
    if wrong := [name for name in given if name not in names]:
        raise ValueError(f"{path}: {prefix}{wrong[0]}: no such setting; there is {', '.join(names)}")


def _under(config: Path, name: str) -> Path:
    """A path of a config, which is meant from where the config is."""
    return (config.absolute().parent / Path(name).expanduser()).absolute()


def follow(args: argparse.Namespace) -> int | None:
    """The command.

    Raises:
        ValueError: a setting that is not allowed, a port that is taken, parts of other models.
    """
    config = read(Path(args.config).expanduser())
    stop = threading.Event()
    with extra("follow"):
        import watchfiles

        from .health import serve
    quiet_libraries()
    models = load_models(config.model)
    if models.gistnet is None:
        raise ValueError(f"model={config.model}: there is no GistNet in it, which trees are made with")
    follower = Follower(config.memory, models, config.sources)
    try:
        if not args.once:
            signal.signal(signal.SIGTERM, lambda *_: stop.set())
            server = serve(follower, config.port)
            print(f"{server.address}/health   (Ctrl-C ends)", flush=True)
        for name in config.sources:
            follower.look(name)
            _say(follower, name)
        if args.once:
            return FAILED if any(told["error"] for told in follower.state().values()) else None
        roots = sorted({source.watched for source in config.sources.values()})
        quiet, missed = int(config.debounce * 1000), set(config.sources)  # before the watch had begun
        for changes in watchfiles.watch(
            *roots,
            debounce=max(1600, quiet),  # seconds without rest after which it is looked at all the same
            step=quiet,
            stop_event=stop,
            rust_timeout=TICK,
            yield_on_timeout=True,
            raise_interrupt=True,
        ):
            touched = {
                name
                for name, source in config.sources.items()
                if any(Path(path).is_relative_to(source.watched) for _, path in changes)
            }
            for name in sorted(touched | missed | set(follower.due())):
                if follower.look(name):
                    _say(follower, name)
            missed = set()
        server.close()
    finally:
        follower.close()


def _say(follower: Follower, name: str) -> None:
    told = follower.state()[name]
    dead = f", {told['dead']} left out" if told["dead"] else ""
    print(f"{name}: {told['documents']:,} documents, {told['tokens']:,} tokens{dead}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.apps.follow", description=__doc__.split("\n")[0])
    parser.add_argument("config", metavar="CONFIG", help="a TOML file of sources")
    parser.add_argument("--once", action="store_true", help="bring all up to date, and end")
    return run(follow, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
