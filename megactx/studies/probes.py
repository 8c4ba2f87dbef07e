"""Exact recall of trained gists: a number, a UUID, a name, a path, a word, told in an old block and asked for later.

    python -m megactx.studies.probes RUN [RUN ...]                        runs of a gist stage, on the embedded text
    python -m megactx.studies.probes RUN --path TEXTS --per-class 100     between texts of your own

Every compressor of a run answers three times: over gists only, with the block that told it expanded, over the full
context (``megactx.evaluation.probes``). What a base LM cannot answer with everything in front of it is no measure of
gists, and the table says so. It also shows what is guessed with nothing in place of the old blocks.
"""

import argparse
import sys

from megactx.data.probes import KINDS, make_probes
from megactx.evaluation.measure import untrained
from megactx.evaluation.probes import measure_probes
from megactx.framework import command_line
from megactx.framework.bar import bar

from .probes_report import notes_on, rows_of, sheets, summarise
from .tables import show, write
from .trained import NOTHING, Nothing, Trained, held_out, load

DOCUMENTS = 200  # of text around the probes; with fewer, some come again


def study(run: Trained, path: str | None, per_class: int, blocks: int, recency: int | None, seed: int) -> dict:
    """Ask every compressor of a run, and the untrained controls; -> plain numbers, see ``summarise``.

    Args:
        path: files for the text around; ``None``: the embedded text.
        per_class: probes of each class.
        blocks: old blocks of each document.
        recency: raw tokens behind them; ``None``: as the run has it.
        seed: of the probes.

    Raises:
        ValueError: a setting that is not allowed, or no text that is long enough; the message names it.
    """
    block, recency = run.main.block_size, run.recency if recency is None else recency
    for name, value, least in (("--per-class", per_class, 1), ("--blocks", blocks, 1), ("--seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name}={value} is not allowed: at least {least}")
    if recency < block or recency % block:
        raise ValueError(f"--recency={recency} is not allowed: a multiple of block_size={block}")
    tokens = (blocks + 1) * block + recency
    texts = [batch["ids"][0].numpy() for batch in held_out(run.base, path, block, 1, tokens, DOCUMENTS)]
    probes = make_probes(run.base.tokenizer, texts, per_class, block, recency, blocks, seed)
    longest = max(len(probe.ids) for probe in probes)
    if longest > run.base.max_positions:
        raise ValueError(f"--blocks={blocks}: a probe has {longest} tokens, the base takes {run.base.max_positions}")
    nets = run.nets | {NOTHING: Nothing(block)} | untrained(run.base, block, run.main.position)
    device = run.base.model.device
    answers = {}
    for name, net in nets.items():
        answers[name] = measure_probes(run.base, net.to(device), bar(f"{run.name}: {name}")(probes), recency)
    about = {"base": run.base_name, "run": run.name, "subject": next(iter(run.nets)), "seed": seed, "text": path}
    sizes = {"block_size": block, "tokens": tokens, "blocks": blocks, "recency": recency, "per_class": per_class}
    return summarise(answers, about | sizes)


def command(asked: argparse.Namespace) -> None:
    """Ask all runs, show and write."""
    for run in load(asked.runs):
        numbers = study(run, asked.path, asked.per_class, asked.blocks, asked.recency, asked.seed)
        tables, notes = sheets(numbers), notes_on(numbers)
        show(tables, notes)
        write(run.folder / "probes", "Exact recall", tables, notes, rows_of(numbers), numbers)
        print(f"Probes: {run.folder / 'probes.md'}, .csv and .json")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.studies.probes", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of gist stages")
    parser.add_argument("--path", help="files for the text around; without it the embedded text")
    parser.add_argument("--per-class", type=int, default=40, help=f"probes of each of {', '.join(KINDS)} (default 40)")
    parser.add_argument("--blocks", type=int, default=8, help="old blocks of each document (default 8)")
    parser.add_argument("--recency", type=int, help="raw tokens behind them (default: as the run has it)")
    parser.add_argument("--seed", type=int, default=0, help="of the probes (default 0)")
    return command_line.run(command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
