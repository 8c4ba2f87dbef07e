"""Publish a tree: a folder that a web server or an object store can give out, and that ``--part NAME=URL`` shows.

    python -m megactx.apps.publish MEMORY www/library

The server must answer ranges, as nginx, Caddy and S3 do; ``python -m http.server`` does not. MEMORY is the folder of a
session, a preset, a followed source, or a tree. Called again it publishes what is there now; who reads the publication
before goes on with it. What the tokens are from goes with them, paths of files too.
"""

import argparse
import sys
from pathlib import Path

from megactx.framework.command_line import run
from megactx.memory import storage
from megactx.memory.publishing import publish
from megactx.runtime.part_files import folder_of, noted


def published(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: there is no tree, a damaged one, or FOLDER holds something else.
        RunFailed: the disk is full.
    """
    source, target = Path(args.memory).expanduser(), Path(args.folder).expanduser()
    folder = folder_of(source)
    notes = noted(source, storage.tokens_of(folder)) if not args.bare else {}
    size = publish(folder, target, notes)
    print(f"{size / 1e6:,.3f} MB of pages lie in {target}. Serve that folder, and show it with --part NAME=URL")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.apps.publish", description=__doc__.split("\n")[0])
    parser.add_argument("memory", metavar="MEMORY", help="a session, a preset, a followed source, or a tree")
    parser.add_argument("folder", metavar="FOLDER", help="an empty folder, or one that was published before")
    parser.add_argument("--bare", action="store_true", help="say nothing of the files that the tokens are from")
    return run(published, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
