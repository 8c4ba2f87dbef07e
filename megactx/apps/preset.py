"""A prompt as a few gists: made once, and shown in the window of any session.

    python -m megactx.apps.preset make support prompt.txt          one gist for each 32 tokens; the tokens are kept
    python -m megactx.apps.preset list
    python -m megactx.apps.chat --preset support

A preset is a part whose gists stay closed: a session reads a gist where the prompt has 32 tokens. It is kept in
``$MEGACTX_PRESETS``, or ``~/.local/share/megactx/presets``; ``--preset`` takes a folder from elsewhere too.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from megactx.data.tokenizer import TextEncoder
from megactx.framework.bar import quiet_libraries
from megactx.framework.command_line import run
from megactx.framework.files import checksum, replacing
from megactx.memory import MegaContextTree
from megactx.parts.models import Models
from megactx.runtime import Wanted, load_models
from megactx.runtime.part_files import NAME, PRESET, TREE
from megactx.runtime.text import encodable, filling, from_bytes, printable

from .command_line import MODEL

FORMAT = 1
ELSEWHERE = "set MEGACTX_PRESETS to another folder"


def folder() -> Path:
    """Where presets are kept."""
    return Path(os.environ.get("MEGACTX_PRESETS", "~/.local/share/megactx/presets")).expanduser()


def wanted(name: str) -> Wanted:
    """The part that ``--preset NAME`` or ``--preset FOLDER`` asks for.

    Raises:
        ValueError: there is no preset of this name.
    """
    place = folder() / name if NAME.fullmatch(name) and not (Path(name) / PRESET).is_file() else Path(name).expanduser()
    if not (place / PRESET).is_file():
        there = ", ".join(known()) or "none"
        raise ValueError(f"--preset={name}: there is no such preset, there is {there}; apps.preset make makes one")
    return Wanted(place.absolute().name, place.absolute())


def known() -> list[str]:
    """Names of all presets."""
    return sorted(path.parent.name for path in folder().glob(f"*/{PRESET}"))


def make(place: Path, path: Path, models: Models, level: int = 1) -> int:
    """Write a preset into a folder, in place of one that may be there; -> its tokens.

    Args:
        path: of the prompt, UTF-8 text.
        level: the highest level of its gists.

    Raises:
        ValueError: no text, no GistNet, or a level that is not allowed.
        RunFailed: the disk is full.
    """
    if not path.is_file():
        raise ValueError(f"FILE={path}: there is no such file")
    if models.gistnet is None:
        raise ValueError(f"model: there is no GistNet in {models.name or 'these models'}, which gists are made with")
    text = encodable(from_bytes(path.read_bytes(), str(path)))
    if not text.strip():
        raise ValueError(f"{path}: it is empty, there is nothing to keep")
    ids = TextEncoder(models.base.tokenizer)(text, begins=True)
    ids = ids + [filling(models.base.tokenizer)] * (-len(ids) % models.gistnet.block_size)  # so that nothing is raw
    save(place, ids, models, level, {"file": str(path.absolute()), "sha256": checksum(path)})
    return len(ids)


def save(place: Path, ids: list[int], models: Models, level: int, about: dict) -> None:
    """Write ids as a preset.

    Args:
        about: plain JSON that is kept with it; ``file``: what it is from.
    """
    device = models.base.model.device
    tree = MegaContextTree(models.gistnet, models.base, max_level=level, device=device)
    tree.append(torch.tensor([ids], device=device))
    about = {"format": FORMAT, "time": round(time.time(), 3), "tokens": len(ids), "level": level} | about
    about["model"] = models.name
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place, ELSEWHERE) as part:
        part.mkdir()
        tree.save(part / TREE)
        tree.home[0].close()  # before it is moved
        (part / PRESET).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def preset(args: argparse.Namespace) -> None:
    """The command.

    Raises:
        ValueError: a name, a file or a level that is not allowed.
    """
    if args.action == "list":
        for name in known():
            about = json.loads((folder() / name / PRESET).read_text(encoding="utf-8"))
            print(printable(f"{name}: {about['tokens']:,} tokens of {about['file']}, gists of {about['model']}"))
        return
    if args.name is None or args.file is None:
        raise ValueError("make: NAME and FILE are needed")
    if not NAME.fullmatch(args.name):
        raise ValueError(f"NAME={args.name!r} is not allowed: up to 64 letters, digits, - and _")
    if args.level < 1:
        raise ValueError(f"--level={args.level} is not allowed: at least 1")
    quiet_libraries()
    models = load_models(args.model, setting="--model")
    tokens = make(folder() / args.name, Path(args.file).expanduser(), models, args.level)
    print(f"{args.name}: {tokens:,} tokens; python -m megactx.apps.chat --preset {args.name} reads it")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.apps.preset", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("make", "list"))
    parser.add_argument("name", nargs="?", metavar="NAME", help="of the preset; one that is there is replaced")
    parser.add_argument("file", nargs="?", metavar="FILE", help="the prompt, UTF-8 text")
    parser.add_argument("--model", help=MODEL)
    parser.add_argument("--level", type=int, default=1, help="highest level of its gists, 2: 1,024 tokens (default 1)")
    return run(preset, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
