"""What a token of a session costs where several are read in one pass, and where each is read alone.

    python benchmarks/together.py [--model smollm2] [--sessions 1 4 16] [--tokens 24] [--threads 1]

Each session has a history of its own. Both ways decode the same tokens; what a refocus costs is in both.
"""

import argparse
import json
import sys
import time

import torch
from rich.console import Console
from rich.table import Table

from megactx.framework.command_line import run
from megactx.runtime import Controller, Sampling, Settings, load_models
from megactx.runtime.controller import decode
from megactx.runtime.together import read_together


def measured(controller: Controller, sessions: int, tokens: int, together: bool) -> tuple[float, list]:
    """CPU seconds of a token, and what was said."""
    generator = torch.Generator().manual_seed(0)
    streams = [controller.stream() for _ in range(sessions)]
    for stream in streams:
        stream.append(torch.randint(10, stream.base.vocab_size, (1, 600), generator=generator))
        stream.lazy = together
        stream.logits()
    running = [decode(stream, tokens, Sampling()) for stream in streams]
    began, said = time.process_time(), [[] for _ in streams]
    for _ in range(tokens):
        if together:
            read_together(streams)
        for one, own in zip(running, said, strict=True):
            own += next(one)
    return (time.process_time() - began) / tokens / sessions, said


def benchmark(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    controller = Controller(load_models(args.model, device="cpu"), Settings(budget=512))
    table = Table(title=f"CPU ms of a token, {args.threads} threads, the median of {args.runs}")
    for heading in ("sessions", "alone", "together", "times less"):
        table.add_column(heading, justify="right")
    for sessions in args.sessions:
        found = {way: [measured(controller, sessions, args.tokens, way) for _ in range(args.runs)] for way in (0, 1)}
        assert all(said == found[0][0][1] for each in found.values() for _, said in each), "other tokens were said"
        alone, together = (sorted(1000 * seconds for seconds, _ in found[way])[args.runs // 2] for way in (0, 1))
        table.add_row(str(sessions), f"{alone:.1f}", f"{together:.1f}", f"{alone / together:.1f}")
        print(json.dumps({"sessions": sessions, "alone": alone, "together": together}), file=sys.stderr)
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    return run(benchmark, parser, None)


if __name__ == "__main__":
    sys.exit(main())
