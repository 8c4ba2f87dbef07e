"""See what a session sees, live in a browser: the timeline, the working context, scores, edits, the text of any block.

    python -m megactx.apps.view                              opens at http://127.0.0.1:8765, write there
    python -m megactx.apps.view --session FOLDER             of a session that is kept
    python -m megactx.apps.view --file book.txt --tokens 500
    python -m megactx.apps.view --file book.txt --export replay.html      no server; also .png and .gif

The page is for this machine alone: it is bound to 127.0.0.1, and the address holds a token of this run. From another
machine: ssh -L 8765:127.0.0.1:8765 HOST.
"""

import argparse
import secrets
import sys
from contextlib import nullcontext

from megactx.framework.command_line import run
from megactx.framework.extra import extra
from megactx.runtime import Refocused
from megactx.runtime.text import encodable

from ..command_line import HOST, add_talk, controller_of, observers_of, prompt_file_of, sampling_of, talk_of
from .export import STRIPS, writer
from .player import MOST, Player

PORT = 8765


def view(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: a setting that is not allowed, a port that is taken, a prompt that is not text.
    """
    if args.megacontext == "none":
        raise ValueError("--megacontext=none has no working context to look at; focus and recency have one")
    if args.tokens > MOST:
        raise ValueError(f"--tokens={args.tokens} is not allowed: at most {MOST:,}")
    sampling, text = sampling_of(args), prompt_file_of(args)
    prompt = encodable(args.prompt) if text is None else text
    write = writer(args.export) if args.export else None
    if not write:
        with extra("view"):
            from ..serving import Server
            from .app import build
    with nullcontext() if write else Server(args.port, args.host) as server:
        controller = controller_of(args, tree=True)
        with talk_of(args, controller, observers_of(args, controller)) as session:
            player = Player(session, sampling).start()
            try:
                if write:
                    _export(player, prompt, args, write)
                else:
                    token = secrets.token_urlsafe(24)
                    app = build(player, server.host, token, f"megactx-{server.port}")
                    print(f"Look at {server.address}/?token={token}   (Ctrl-C ends)", flush=True)
                    if prompt:
                        player.say(prompt, args.tokens)
                    server.run(app, ending=player.feed.close)
            finally:
                player.close()
                if args.session:
                    session.save()


def _export(player: Player, prompt: str, args: argparse.Namespace, write) -> None:
    steps = []

    def keep(event: Refocused) -> None:
        if (step := event.step()) is not None:
            steps.append(step)
            del steps[:-STRIPS]

    player.session.observers.append(keep)
    try:
        if prompt or args.tokens:
            player.say(prompt, args.tokens)
        player.wait()
        if player.failure is not None:
            raise player.failure
        write(player, steps)
    finally:
        player.session.observers.remove(keep)
    print(f"{args.export}: {player.feed.count:,} refocuses of {player.session.length:,} tokens")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.apps.view", description=__doc__.split("\n")[0])
    parser.add_argument("prompt", nargs="?", default="", help="text to begin with (default: none, write in the page)")
    parser.add_argument("--file", help="a text file as the prompt")
    parser.add_argument("--port", type=int, default=PORT, help=f"of the page, 0: any free one (default {PORT})")
    parser.add_argument("--host", default=HOST, help=f"to bind to; others can then reach it (default {HOST})")
    parser.add_argument("--export", metavar="FILE", help="write a replay instead: .html, .png or .gif")
    add_talk(parser, tokens=200)
    return run(view, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
