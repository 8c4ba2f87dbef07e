"""Whether a served model finds a fact from the start of a talk that is longer than its base has positions.

    python benchmarks/fact.py [--model OUT] [--facts 8] [--past 1.1] [--texts GLOB]

``apps.serve`` runs as a process and is asked by the ``openai`` client. Three keys, so three memories: *far* is told the
facts, then other texts until it has read more tokens than the base has positions, then asked; *near* is told and asked
at once; *never* is asked without having been told. A fact is found where the answer holds its number. *In full* says
whether the window of *far* reads the tokens of the fact that was asked last, and not their gist, when asked again.

It fails where *far* finds fewer than --least, or no more than *never*; of a base that cannot answer at all, for even
*near* finds nothing, where the fact is not in full.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

from megactx.apps.serve import keys
from megactx.framework.command_line import run
from megactx.framework.errors import RunFailed
from megactx.runtime import Controller, Session, Settings, load_models
from megactx.runtime.sources import opened

COLOURS = ("red", "green", "blue", "white", "black", "yellow", "brown", "grey", "orange", "purple", "pink", "silver")
BEGINS = (
    "This is what stands in the book of the harbour, which somebody has kept for many years, in ink and by hand. " * 3
)
TOLD = "The number of the {colour} boat is {number}. "
ASKED = "What is the number of the {colour} boat? The number of the {colour} boat is"
PIECE = 8000  # characters of a message
ANSWER = 12  # tokens


class Memory:
    """Of a key."""

    def __init__(self, address: str, key: str):
        self.openai = OpenAI(base_url=address, api_key=key, max_retries=0, timeout=600)
        self.model, self.tokens = self.openai.models.list().data[0].id, 0

    def say(self, text: str, tokens: int = ANSWER) -> str:
        asked = [{"role": "user", "content": text}]
        found = self.openai.chat.completions.create(model=self.model, messages=asked, max_tokens=tokens, temperature=0)
        self.tokens += found.usage.total_tokens
        return found.choices[0].message.content


def benchmark(arguments: argparse.Namespace) -> None:
    draw = random.Random(arguments.seed)
    facts = {colour: str(draw.randrange(1000, 10_000)) for colour in draw.sample(COLOURS, arguments.facts)}
    told = BEGINS + "".join(TOLD.format(colour=colour, number=number) for colour, number in facts.items())
    models = load_models(arguments.model)
    settings = Settings(budget=arguments.budget, earn=arguments.keys > 0, keys=arguments.keys, newest=arguments.newest)
    positions = models.base.max_positions
    with tempfile.TemporaryDirectory() as place:
        folder, path = Path(place) / "memories", Path(place) / "keys.json"
        known = {name: keys.add(path, name) for name in ("far", "near", "never")}
        command = [sys.executable, "-m", "megactx.apps.serve", str(folder), "--key-file", str(path), "--port", "0"]
        command += [
            "--tokens-a-minute",
            "100000000",
            "--requests-a-minute",
            "100000",
            "--budget",
            str(arguments.budget),
        ]
        command += ["--earn", "--keys", str(arguments.keys)] if arguments.keys else []
        command += ["--newest", str(arguments.newest)] if arguments.newest else []
        command += [] if arguments.model is None else ["--model", arguments.model]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            line = server.stdout.readline()
            if not line:
                raise RunFailed("the server has not started; it says above why")
            address = line.split()[0]
            memories = {name: Memory(address, key) for name, key in known.items()}
            for name in ("far", "near"):
                memories[name].say(told, 1)
            texts = _texts(arguments.texts)
            while memories["far"].tokens <= positions * arguments.past:
                memories["far"].say(f"Read this.\n\n{next(texts)}", 1)
            read = memories["far"].tokens
            found = {name: _found(memory, facts) for name, memory in memories.items()}
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        colour, number = [*facts.items()][-1]
        with Session.load(folder / "far", Controller(models, settings)) as session:
            begin = len(session.encode(told)) + session.stream.block  # and what frames a turn
            session.append(f"\n{ASKED.format(colour=colour)}")
            session.stream.logits()
            runs = [(run.start, min(run.stop, begin)) for run in opened(session) if run.start < begin]
            full = any(number in session.text(*run) for run in runs)
    result = {"positions": positions, "read": read, "budget": arguments.budget, "facts": len(facts), **found}
    result |= {"in full": full}
    table = Table(title=f"{len(facts)} facts, {read:,} tokens, {positions:,} positions, {arguments.budget} entries")
    for name in (*found, "in full"):
        table.add_column(name)
    table.add_row(*(f"{count} of {len(facts)}" for count in found.values()), "yes" if full else "no")
    Console().print(table)
    print(json.dumps(result))
    if found["near"] == 0:
        if not full:
            raise RunFailed("the base answers nothing, and the fact that was asked last is not in full")
    elif found["far"] < arguments.least or found["far"] <= found["never"]:
        raise RunFailed(f"{found['far']} of {len(facts)} facts are found, wanted are {arguments.least}")


def _found(memory: Memory, facts: dict[str, str]) -> int:
    return sum(number in memory.say(ASKED.format(colour=colour)) for colour, number in facts.items())


def _texts(glob: str):
    """Pieces, over and over."""
    while True:
        for path in sorted(Path().glob(glob)):
            text = path.read_text(encoding="utf-8")
            yield from (text[start : start + PIECE] for start in range(0, len(text), PIECE))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="an export (default: the embedded models)")
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--past", type=float, default=1.1, help="tokens, as a multiple of the base's positions")
    parser.add_argument("--budget", type=int, default=1024, help="entries of the window")
    parser.add_argument("--keys", type=int, default=0, help="blocks that are found by keys, with --earn")
    parser.add_argument("--newest", type=int, help="newest tokens that are read beside them (default: all)")
    parser.add_argument("--texts", default="docs/*.md", help="what is read in between")
    parser.add_argument("--least", type=int, default=1, help="facts that must be found")
    parser.add_argument("--seed", type=int, default=0)
    return run(benchmark, parser, None)


if __name__ == "__main__":
    sys.exit(main())
