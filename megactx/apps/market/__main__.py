"""Share trees: a catalogue with accounts, versions and rights, and the command that publishes to it and gets from it.

    python -m megactx.apps.market serve DATA                            a catalogue at 127.0.0.1:8768; DATA keeps it
    python -m megactx.apps.market serve DATA --database postgresql://USER@HOST/NAME     with its tables in PostgreSQL
    python -m megactx.apps.market pack TREE FILE --model OUT --name boats --licence CC-BY-4.0
    python -m megactx.apps.market publish TREE --model OUT --name boats --licence CC-BY-4.0 --access free
    python -m megactx.apps.market search boats
    python -m megactx.apps.market show boats                            what is in it, and what changed
    python -m megactx.apps.market get boats FOLDER                      FOLDER is then a tree
    python -m megactx.apps.market opened FOLDER                         tell the author that it was used (opt-in)
    python -m megactx.apps.market moderator DATA NAME                   NAME may take packages down
    python -m megactx.apps.market backup DATA COPY                      while it serves
    python -m megactx.apps.market receiver FILE --billing-secret SECRET a billing service for trying out

A token comes from the account's page, in the environment variable MEGACTX_MARKET_TOKEN or in --token-file FILE.
docs/market.md tells the rest.
"""

import argparse
import os
import re
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from megactx.framework.command_line import run
from megactx.framework.extra import extra

from ..command_line import HOST, MODEL

PORT, RECEIVER = 8768, 8769
TOKEN = "MEGACTX_MARKET_TOKEN"
CONNECTIONS = 256
AT = f"http://{HOST}:{PORT}"


def serve(args: argparse.Namespace) -> None:
    """The catalogue, until Ctrl-C or SIGTERM.

    Raises:
        ValueError: a port that is taken, a folder that holds something else, half of a billing service.
    """
    from ..serving import Server
    from .app import build
    from .billing import Sender, secret_of
    from .metrics import Metrics
    from .store import Store

    if (args.billing is None) != (args.billing_secret is None):
        raise ValueError("--billing URL and --billing-secret FILE belong together")
    if args.public is not None and not re.fullmatch(r"https://[A-Za-z0-9.-]+(:[0-9]+)?", args.public):
        raise ValueError(f"--public={args.public} is not allowed: https://NAME")
    if args.billing is not None and not re.match(r"https?://", args.billing):
        raise ValueError(f"--billing={args.billing} is not allowed: https://... or http://...")
    secret = secret_of(_path(args.billing_secret)) if args.billing_secret else None
    store = Store(_path(args.data), args.database)
    metrics = Metrics(store)
    with Server(args.port, args.host) as server:
        watched = metrics.serve(args.metrics) if args.metrics is not None else None
        sender = Sender(store, args.billing, secret).start() if secret else None
        try:
            print(f"{server.address}   (Ctrl-C ends)", flush=True)
            if watched is not None:
                print(f"metrics: {watched.address}/metrics", file=sys.stderr, flush=True)
            app = build(store, server.host, sender, public=args.public, metrics=metrics)
            server.run(app, connections=CONNECTIONS)
        finally:
            if watched is not None:
                watched.close()
            if sender is not None:
                sender.close()
            store.close()


def receiver(args: argparse.Namespace) -> None:
    """A billing service that says yes."""
    from ..serving import Server
    from .billing import Receiver, secret_of

    with Server(args.port) as server:
        found = Receiver(args.at.rstrip("/"), secret_of(_path(args.billing_secret)), _path(args.file))
        print(f"{server.address}   (Ctrl-C ends)", flush=True)
        server.run(found.app(server.host))


def pack(args: argparse.Namespace) -> None:
    """A tree, or that of a session, into the file of a package."""
    _pack(args, _path(args.file), args.version or 1)


def publish(args: argparse.Namespace) -> None:
    """A tree, or a package that ``pack`` has made, goes to the market."""
    client, tree = _client(args), _path(args.tree)
    cents = round(args.price * 100)
    if tree.is_file():
        _published(args, client, tree, cents)
        return
    if args.name is None or args.licence is None:
        raise ValueError("publish: --name and --licence say what the package of the tree is")
    version = args.version or _newest(client, args.name) + 1
    with tempfile.TemporaryDirectory(prefix="megactx-market-") as scratch:
        path = Path(scratch) / "package.tar"
        _pack(args, path, version)
        _published(args, client, path, cents)


def search(args: argparse.Namespace) -> None:
    """What there is."""
    found = _client(args).ask("GET", "/api/packages", q=" ".join(args.words)[:200], page=args.page)
    for one in found["packages"]:
        price = f" {one['price'] / 100:.2f}" if one["price"] else ""
        print(f"{one['name']} {one['version']}  by {one['author']}, {one['licence']}, {one['tokens']:,} tokens,"
            f" {one['bytes'] / 1e6:.2f} MB, {one['access']}{price}")  # fmt: skip
        if one["description"]:
            print(f"    {_line(one['description'])}")
    print(f"{found['count']} found")


def show(args: argparse.Namespace) -> None:
    """What is in a package, before it is got."""
    client = _client(args)
    told = client.ask("GET", f"/api/packages/{_name(args.name)}")
    numbers = [version["number"] for version in told["versions"]]
    number = args.version or numbers[0]
    version = client.ask("GET", f"/api/packages/{args.name}/versions/{number}")
    card = version["card"]
    price = f" {told['price'] / 100:.2f}" if told["price"] else ""
    print(f"{args.name} {number} by {told['author']}, {card['licence']}, {told['access']}{price}")
    print(f"signed by {version['signer']}\n{card['tokens']:,} tokens, {version['bytes']:,} bytes; versions {numbers}")
    for source in card["sources"][:50]:
        print(f"  {source['tokens']:>12,} tokens  {_line(source['name'])}")
    for sample in card["samples"]:
        print(f"  | {_line(sample['text'])}")
    if before := max((other for other in numbers if other < number), default=None):
        change = client.ask("GET", f"/api/packages/{args.name}/differences/{before}/{number}")
        for what, names in change.items():
            print(f"since {before} {what}: {', '.join(map(_line, names[:50])) or 'nothing'}")


def get(args: argparse.Namespace) -> None:
    """A package into a folder, which is then a tree."""
    with _progress("bytes") as saw:
        client = _client(args, saw)
        card = client.get(_name(args.name), _path(args.folder), args.version, args.signer)
    print(f"{card.name} {card.version} is in {args.folder}: {card.tokens:,} tokens, {card.licence}")


def buy(args: argparse.Namespace) -> None:
    """Ask for a purchase, or how it stands."""
    print(_client(args).ask("POST", f"/api/packages/{_name(args.name)}/buy")["state"])


def opened(args: argparse.Namespace) -> None:
    """Tell the author, where the account allows it."""
    from . import package

    card, _ = package.installed(_path(args.folder))
    told = _client(args).ask("POST", f"/api/packages/{card.name}/opened", {"version": card.version})
    print("counted" if told["counted"] else "not counted: your account does not allow it")


def moderator(args: argparse.Namespace) -> None:
    """Make an account a moderator's."""
    with closing(_store(args)) as store:
        store.accounts.make_moderator(args.name)


def backup(args: argparse.Namespace) -> None:
    """Copy all."""
    with closing(_store(args)) as store:
        store.backup(_path(args.copy))


def _pack(args: argparse.Namespace, path: Path, version: int) -> None:
    from megactx.framework.bar import quiet_libraries
    from megactx.runtime import load_models

    from . import package
    from .pack import pack as packed

    about = {name: getattr(args, name) for name in ("name", "licence", "description", "provenance")}
    _name(args.name)
    about["licence"] = package.licence_of(args.licence)
    for name in ("description", "provenance"):
        if len(about[name]) > 4000:
            raise ValueError(f"--{name}: at most 4,000 characters are allowed")
    if not 1 <= version <= 10**6:
        raise ValueError(f"--version={version} is not allowed: 1 to 1,000,000")
    key = package.key_of(_path(args.key))
    quiet_libraries()
    tokenizer = load_models(args.model, setting="--model").base.tokenizer
    with _progress("tokens looked at") as saw:
        card = packed(_path(args.tree), path, tokenizer, key, about | {"version": version}, args.allow, saw)
    size = path.stat().st_size
    print(f"{card.name} {card.version}: {card.tokens:,} tokens, {len(card.sources)} sources, {size:,} bytes")
    print(f"signed by {package.public_of(key)}")


def _store(args: argparse.Namespace):
    from .store import Store, known

    if not known(_path(args.data)):
        raise ValueError(f"{args.data}: there is no market")
    return Store(_path(args.data), args.database)


def _published(args: argparse.Namespace, client, path: Path, cents: int) -> None:
    with _progress("bytes") as saw:
        client.saw = saw
        told = client.publish(path, args.access, cents)
    print(f"{told['name']} {told['version']} is published at {client.address}/packages/{told['name']}")


def _newest(client, name: str) -> int:
    try:
        return client.ask("GET", f"/api/packages/{_name(name)}")["versions"][0]["number"]
    except ValueError:
        return 0


def _client(args: argparse.Namespace, saw=lambda done, of: None):
    from .client import Client

    token = os.environ.get(TOKEN)
    if args.token_file is not None:
        try:
            token = _path(args.token_file).read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            raise ValueError(f"--token-file={args.token_file}: it cannot be read ({error})") from error
    return Client(args.at, token or None, saw)


def _progress(what: str):
    """A line on a terminal."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def shown():
        console = Console(stderr=True)
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(what, total=None)
            yield lambda done, of: progress.update(task, completed=done, total=of)

    return shown()


def _line(text: str) -> str:
    """Of a stranger, for a terminal: one line without what a terminal obeys."""
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def _name(name: str) -> str:
    from . import package

    if not re.fullmatch(package.NAME, name):
        raise ValueError(f"{name} is no name of a package: 2 to 63 small letters, digits and -")
    return name


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _with_packages(command):
    def called(args: argparse.Namespace):
        with extra("market", "market"):
            from . import package  # noqa: F401  cryptography
            from .store import Store  # noqa: F401  argon2
        return command(args)

    return called


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.apps.market", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command, *names: str) -> argparse.ArgumentParser:
        found = commands.add_parser(command.__name__, help=command.__doc__.split("\n")[0])
        found.set_defaults(command=command)
        for name in names:
            found.add_argument(name, metavar=name.upper())
        return found

    own = add(serve, "data")
    own.add_argument("--port", type=int, default=PORT, help=f"0: any free one (default {PORT})")
    own.add_argument("--host", default=HOST, help=f"to bind to; others can then reach it (default {HOST})")
    own.add_argument("--public", metavar="URL", help="https://NAME under which a proxy on this machine shows it")
    own.add_argument("--billing", metavar="URL", help="where purchases are told (default: nothing is sold)")
    own.add_argument("--billing-secret", metavar="FILE", help="of both sides, at least 32 characters")
    own.add_argument("--metrics", type=int, metavar="PORT", help="for Prometheus, at 127.0.0.1; 0: any free one")
    pay = add(receiver, "file")
    pay.add_argument("--port", type=int, default=RECEIVER, help=f"0: any free one (default {RECEIVER})")
    pay.add_argument("--at", default=AT, metavar="URL", help=f"the market (default {AT})")
    pay.add_argument("--billing-secret", metavar="FILE", required=True, help="of both sides")
    makes = add(pack, "tree", "file"), add(publish, "tree")
    for made in makes:
        made.add_argument("--name", required=made is makes[0], help="small letters, digits and -")
        made.add_argument("--licence", required=made is makes[0], help="an SPDX expression, or LicenseRef-NAME")
        made.add_argument("--description", default="", help="what it is good for")
        made.add_argument("--provenance", default="", help="where the texts are from, and by what right")
        made.add_argument("--version", type=int, help="a whole number (default: 1, or the next)")
        made.add_argument("--model", help=MODEL)
        made.add_argument("--key", default="~/.config/megactx/market.pem", metavar="FILE", help="yours, made once")
        made.add_argument(
            "--allow", action="append", default=[], metavar="MARK", help="what looks like a secret is none"
        )
    makes[1].add_argument("--access", choices=("private", "free", "paid"), default="private", help="(default private)")
    makes[1].add_argument("--price", type=float, default=0.0, help="of a paid one, such as 4.50")
    finds = add(search)
    finds.add_argument("words", nargs="*", metavar="WORD")
    finds.add_argument("--page", type=int, default=1)
    gets = add(get, "name", "folder")
    gets.add_argument(
        "--signer", metavar="KEY", help="that must have signed it (default: of the version that is there)"
    )
    shows = add(show, "name")
    for asks in (gets, shows):
        asks.add_argument("--version", type=int, help="(default: the newest)")
    for asks in (makes[1], finds, gets, shows, add(buy, "name"), add(opened, "folder")):
        asks.add_argument("--at", default=AT, metavar="URL", help=f"the market (default {AT})")
        asks.add_argument("--token-file", metavar="FILE", help=f"(default: the environment variable {TOKEN})")
    for keeps in (own, add(moderator, "data", "name"), add(backup, "data", "copy")):
        keeps.add_argument("--database", metavar="URL", help="postgresql://... (default: SQLite's in DATA)")
    return run(lambda args: _with_packages(args.command)(args), parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
