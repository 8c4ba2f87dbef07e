"""What text costs before and while a base LM reads it, and what a trillion tokens would: see docs/data.md.

    python benchmarks/data.py --path TEXTS [--copies 2] [--tokenizer asset:tiny-base] [--windows 200]

    tokenise    texts to ids on disk, by one process, from nothing; with --copies each text stands there several times
    open        the same again, by a process that finds them: the DataModule of the stage base_lm, ready to serve
    serve       windows of 1,024 tokens at random steps, twice, and the batch of step 10^9, as a resumed run reads it

Each is a process of its own. Memory is what a process holds for itself: pages of files that it maps are not counted,
for the machine takes them back when it needs them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megactx.framework.command_line import run

TRILLION = 10**12
WINDOW, BATCH, FAR = 1024, 8, 10**9
PER_TEXT = 24  # bytes of a text in memory: its length, its number, and where its share of the windows ends
PARTS = ("tokenise", "open", "serve")


def own_megabytes() -> float:
    """Memory that this process holds for itself now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def module(args):
    """The DataModule of a base LM, over all domains alike."""
    from megactx.data.files import DOMAINS, Files
    from megactx.data.pretraining_module import PretrainingData
    from megactx.data.tokenizer import load_tokenizer

    phases = [{"steps": 1, "tokens": WINDOW, "batch": BATCH}]
    weights = {domain: 1.0 for domain in DOMAINS if (Path(args.path) / domain).exists()} or {"narrative": 1.0}
    return PretrainingData(Files(args.path), load_tokenizer(args.tokenizer), phases, weights, 0.0, 0.0, WINDOW)


def measure(args, part: str) -> dict:
    """One part, in this process."""
    import datasets  # noqa: F401 - what it takes has nothing to do with how much text there is
    import pyarrow.compute  # noqa: F401

    data, before = module(args), own_megabytes()
    began, busy = time.perf_counter(), time.process_time()
    if part == "tokenise":
        rows = data.read()
        tokens = sum(len(chunk.values) for chunk in rows.data.column("input_ids").chunks)
        found = {"documents": len(rows), "tokens": tokens}
    else:
        data.setup()
        found = {}
    found |= {"seconds": time.perf_counter() - began, "cpu": time.process_time() - busy}
    if part == "serve":
        for name in ("cold", "warm"):
            began = time.perf_counter()
            for step in range(args.windows):
                data.training[step * 9_973]
            found[name] = 1e3 * (time.perf_counter() - began) / (args.windows * BATCH)
        began = time.perf_counter()
        found["far"] = data.training[FAR]["ids"].tobytes().hex()[:32]
        found["ms far"] = 1e3 * (time.perf_counter() - began)
    return found | {"megabytes": own_megabytes() - before}


def copied(path: str, copies: int, folder: Path) -> str:
    """The texts ``copies`` times: each copy of a file has a name of its own, and its texts begin with that."""
    from megactx.data.files import Files

    for number in range(copies):
        for document in (document for part in Files(path).parts() for document in part.documents()):
            place = folder / document["domain"] / f"{number}.jsonl"
            place.parent.mkdir(exist_ok=True)
            with place.open("a", encoding="utf-8") as file:
                text = f"{number}\n{document['text']}" if number else document["text"]
                file.write(json.dumps({**document, "text": text}) + "\n")
    return str(folder)


def bench(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="megactx-data-") as temporary:
        folder, cache = Path(temporary) / "texts", Path(temporary) / "cache"
        folder.mkdir()
        args.path = copied(args.path, args.copies, folder)
        found = {}
        for part in (*PARTS, "serve again"):
            command = [sys.executable, __file__, "--part", part.split()[0], "--path", args.path]
            command += ["--tokenizer", args.tokenizer, "--windows", str(args.windows)]
            told = subprocess.run(
                command, env=os.environ | {"MEGACTX_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True, check=True
            )
            found[part] = json.loads(told.stdout.splitlines()[-1])
        text = sum(path.stat().st_size for path in folder.rglob("*.jsonl"))
        kept = sum(path.stat().st_size for path in cache.rglob("*.arrow"))
    assert found["serve"]["far"] == found["serve again"]["far"], "two processes must serve the same batch"
    documents, tokens = found["tokenise"]["documents"], found["tokenise"]["tokens"]
    share, wide = TRILLION / tokens, Console(width=120)
    grid = Table(
        title=f"{tokens / 1e6:.1f} million tokens, {documents:,} texts, {text / 1e6:.0f} MB", title_justify="left"
    )
    for name, side in (("", "left"), ("here", "right"), ("a trillion tokens, in proportion", "right")):
        grid.add_column(name, justify=side)
    tokenise, opened, serve = (found[part] for part in PARTS)
    grid.add_row("text", f"{text / 1e9:.2f} GB", f"{text * share / 1e12:.1f} TB")
    grid.add_row("ids on disk", f"{kept / 1e9:.2f} GB", f"{kept * share / 1e12:.1f} TB")
    hours = tokenise["cpu"] * share / 3600
    grid.add_row(
        "tokenise, one core",
        f"{tokenise['cpu']:.0f} s CPU",
        f"{hours:,.0f} core hours, {60 * hours / 1024:.0f} minutes on 1,024",
    )
    grid.add_row("  its memory", f"{tokenise['megabytes']:.0f} MB", "the same: parts are written as they come")
    grid.add_row("open", f"{opened['seconds']:.2f} s", f"{opened['seconds'] * share / 60:,.0f} minutes")
    grid.add_row(
        "  its memory", f"{opened['megabytes']:.1f} MB", f"{opened['megabytes'] * share / 1e3:,.0f} GB a process"
    )
    grid.add_row("a window, cold", f"{serve['cold']:.2f} ms", "the same, and a read of 4 KB on the store")
    grid.add_row("a window, warm", f"{serve['warm']:.2f} ms", "the same")
    grid.add_row(f"the batch of step {FAR:,}", f"{serve['ms far']:.1f} ms", "the same")
    wide.print(grid)
    return 0


def command(args: argparse.Namespace) -> int:
    if not args.part:
        return bench(args)
    print(json.dumps(measure(args, args.part)))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--path", required=True, help="a folder of texts, a folder in it for each domain")
    parser.add_argument("--copies", type=int, default=1, help="of each text")
    parser.add_argument("--tokenizer", default="asset:tiny-base", help="a Hugging Face folder, or asset:NAME")
    parser.add_argument("--windows", type=int, default=200, help="batches that are served")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return run(command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
