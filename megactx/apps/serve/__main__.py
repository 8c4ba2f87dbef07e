"""Serve a model with memories to programs that speak OpenAI's chat completions; each key has a memory of its own.

    python -m megactx.apps.serve MEMORIES                            prints a key, once
    python -m megactx.apps.serve MEMORIES --key-file keys.json --new-key anna     makes a key for anna, and ends
    python -m megactx.apps.serve MEMORIES --key-file keys.json --model OUT

A memory is a session in the folder MEMORIES/NAME, which chat and view go on with while no server holds it. It is saved
before the last word of each answer is sent. The server is bound to 127.0.0.1; docs/serving.md tells the rest.
"""

import argparse
import ctypes
import sys
from contextlib import suppress
from pathlib import Path

from megactx.framework.command_line import run
from megactx.framework.extra import extra

from ..command_line import HOST, add_models, add_sampling, controller_of, curation_of, observers_of, sampling_of
from . import keys

PORT, OPEN, QUEUE = 8766, 16, 64
CONNECTIONS = 1024
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
LARGE = 2**18  # bytes


def serve(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: a setting that is not allowed, a port that is taken, a file that holds no keys.
    """
    if args.new_key is not None:
        if args.key_file is None:
            raise ValueError("--new-key needs --key-file FILE, where its hash is kept")
        print(keys.add(Path(args.key_file).expanduser(), args.new_key))
        return
    for name in ("open", "queue", "tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} is not allowed: at least 1")
    sampling, key = sampling_of(args), keys.generated()
    hashes = keys.alone(key) if args.key_file is None else keys.read(Path(args.key_file).expanduser())
    known = keys.Keys(hashes, args.requests_a_minute, args.tokens_a_minute)
    with extra("serve"):
        from ..serving import Server
        from .app import MOST, build
        from .engine import Engine
    if args.tokens > MOST:
        raise ValueError(f"--tokens={args.tokens} is not allowed: at most {MOST:,}")
    steady_memory()
    with Server(args.port, args.host) as server:
        controller = controller_of(args, tree=True)
        observers = observers_of(args, controller)
        clean = None if args.curation is None else curation_of(args.curation)
        folder = Path(args.memories).expanduser()
        engine = Engine(folder, controller, args.open, args.queue, observers, clean).start()
        try:
            app = build(engine, known, model_name(args.model), args.tokens, sampling, server.host)
            print(f"{server.address}/v1   model {model_name(args.model)}   (Ctrl-C ends)", flush=True)
            if args.key_file is None:
                print(f"key: {key}   (of this start; --key-file keeps some)", flush=True)
            server.run(app, ending=engine.end, connections=CONNECTIONS)
        finally:
            engine.close()


def steady_memory() -> bool:
    """Have large blocks go back to the system as soon as they are free; -> whether this C library can.

    glibc learns from blocks that come and go to keep ever larger ones. Of a server, whose windows are read anew all
    day, it would then keep a tenth more than is in use (RESULTS.md, 2026-11-29).
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        return bool(library.mallopt(M_MMAP_THRESHOLD, LARGE) and library.mallopt(M_TRIM_THRESHOLD, LARGE))
    return False


def model_name(model: str | None) -> str:
    """What clients call it."""
    return Path(model).expanduser().resolve().name if model else "megactx"


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.apps.serve", description=__doc__.split("\n")[0])
    parser.add_argument("memories", metavar="MEMORIES", help="folder of the memories, one folder each")
    parser.add_argument("--key-file", metavar="FILE", help="JSON, name to sha256 of a key (default: one key, printed)")
    parser.add_argument("--new-key", metavar="NAME", help="write a new key of NAME into --key-file, print it, and end")
    parser.add_argument("--port", type=int, default=PORT, help=f"0: any free one (default {PORT})")
    parser.add_argument("--host", default=HOST, help=f"to bind to; others can then reach it (default {HOST})")
    parser.add_argument("--open", type=int, default=OPEN, help=f"memories at work at a time, at most (default {OPEN})")
    parser.add_argument("--queue", type=int, default=QUEUE, help=f"requests that wait, at most (default {QUEUE})")
    limits = {"requests": 120, "tokens": 200_000}
    for what, usual in limits.items():
        told = f"of a key that the key file sets no other number for (default {usual:,})"
        parser.add_argument(f"--{what}-a-minute", type=int, default=usual, metavar="N", help=told)
    add_sampling(parser, tokens=200)
    clean = "archive what nobody reads of a memory: an option of the config group curation (default: never)"
    parser.add_argument("--curation", metavar="NAME,...", help=clean)
    add_models(parser)
    return run(serve, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
