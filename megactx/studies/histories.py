"""Finished runs on many histories: what is left when old blocks are all compressed at once (method 3, 5).

    python -m megactx.studies.histories RUN [RUN ...]                     runs of gist stages, on the embedded text
    python -m megactx.studies.histories SEED0 SEED1 SEED2 --path TEXTS --segment 64 --recency 32 --count 2000

Runs that differ in their seed are one: of every compressor that has the same name in them the losses are averaged,
history by history, and each run's own recovery stands beside. All carriers, and the untrained controls, are read
behind the same histories.
"""

import argparse
import sys
from dataclasses import replace

import torch

from megactx.evaluation.bootstrap import difference_intervals, mean_interval, recovery_intervals, reverse, verdict
from megactx.evaluation.history import measure_history, segments
from megactx.evaluation.measure import untrained
from megactx.evaluation.scores import MORE_RAW, BlockScores
from megactx.evaluation.sheets import Sheet
from megactx.framework import command_line
from megactx.framework.bar import bar
from megactx.gist.carriers.avgpool import AvgPool

from .tables import interval, show, write
from .trained import Trained, held_out, load, same

NOTE = (
    "recovery = 1 - (NLL_carriers - NLL_full) / (NLL_nothing - NLL_full) over the scored tokens; gain = NLL of as many"
    " more raw tokens - NLL_carriers. than: the bold row minus this one, and what that says; brackets: 95 %, paired"
    " bootstrap over documents."
)


def study(runs: list[Trained], path: str | None, segment: int, recency: int | None, tokens: int, count: int) -> dict:
    """Measure the compressors of runs, and the controls, behind histories; -> plain numbers.

    Args:
        segment: S, scored tokens.
        recency: R, raw tokens before them; ``None``: as the first run has it.
        tokens: of a document.
        count: histories at most.

    Raises:
        ValueError: a setting that is not allowed, runs that do not belong together, or no text that is long enough.
    """
    same(runs)
    base, block = runs[0].base, runs[0].main.block_size
    sizes = {"segment": segment, "recency": runs[0].recency if recency is None else recency}
    for name, value in sizes.items():
        if value < block or value % block:
            raise ValueError(f"--{name}={value} is not allowed: a multiple of block_size={block}")
    if count < 1:
        raise ValueError(f"--count={count} is not allowed: at least 1")
    if tokens < (least := 2 * block + sum(sizes.values())):
        raise ValueError(f"--tokens={tokens} is not allowed: at least {least}, a sink, a block, R and S")
    batches = held_out(base, path, block, 1, tokens, count)
    nets = {_key(at, name): net.to(base.model.device) for at, run in enumerate(runs) for name, net in run.nets.items()}
    controls = {"avgpool": AvgPool(block)} | untrained(base, block, runs[0].main.position)
    found = segments(batches, block, count, **sizes)
    scores = measure_history(base, nets | controls, found, **sizes, progress=bar("histories"))
    about = {"base": runs[0].base_name, "runs": [run.name for run in runs], "text": path, "tokens": tokens}
    return about | sizes | summarise(scores, [list(run.nets) for run in runs])


def summarise(scores: BlockScores, names: list[list[str]]) -> dict:
    """Scores with the carriers of every run under ``_key`` and controls by name -> plain numbers.

    Args:
        names: of every run, its compressors; the first of the first is what all are compared with.
    """
    own = {}
    for name in dict.fromkeys(name for run in names for name in run):
        each = [scores.carriers[_key(at, name)] for at, run in enumerate(names) if name in run]
        own[name] = torch.stack(each).double().mean(dim=0)
    keys = {_key(at, name) for at, run in enumerate(names) for name in run}
    rest = {name: values for name, values in scores.carriers.items() if name not in keys}
    about = {"domain": scores.domain, "document": scores.document, "start": scores.start}
    mean = BlockScores(full=scores.full, drop=scores.drop, carriers=own | rest, **about)
    subject, carriers = names[0][0], [name for name in mean.carriers if name != MORE_RAW]
    cost = (scores.drop.double() - scores.full.double()).mean().item()
    out = {"subject": subject, "histories": len(scores), "documents": scores.document.unique().numel()}
    out |= {"hash": scores.block_hash(), "cost": cost, "carriers": {name: {} for name in carriers}}
    for name, value in recovery_intervals(mean, carriers).items():
        out["carriers"][name]["recovery"] = value._asdict()
        more = mean.carriers[MORE_RAW] - mean.carriers[name]
        out["carriers"][name]["gain"] = mean_interval(scores.document, more.double().mean(dim=1))._asdict()
        each = [_key(at, name) for at, run in enumerate(names) if name in run]
        points = recovery_intervals(scores, each) if each else {}
        out["carriers"][name]["of_each"] = [points[key].point for key in each]
    for name, value in difference_intervals(mean, subject, [n for n in carriers if n != subject]).items():
        out["carriers"][name]["below_subject"] = value._asdict()
    out["more_raw"] = recovery_intervals(mean, [MORE_RAW])[MORE_RAW]._asdict()
    return out


def _only(run: Trained, names: list[str]) -> Trained:
    """A run without its other compressors.

    Raises:
        ValueError: it has none of these.
    """
    if not (kept := {name: run.nets[name] for name in names if name in run.nets}):
        raise ValueError(f"--only={' '.join(names)}: {run.folder} has {', '.join(run.nets)}")
    return replace(run, nets=kept)


def _key(run: int, name: str) -> str:
    return f"{run}: {name}"


def sheets(numbers: dict) -> list[Sheet]:
    """The carriers, best first."""
    points = {name: carrier["recovery"]["point"] for name, carrier in numbers["carriers"].items()}
    order = sorted(points, key=lambda name: -points[name] if points[name] == points[name] else 1e9)
    rows = []
    for name in order:
        carrier = numbers["carriers"][name]
        difference = carrier.get("below_subject")
        than = ["", ""] if difference is None else [interval(difference, 3, "+"), verdict(reverse(difference))]
        each = " ".join(f"{point:.3f}" for point in carrier["of_each"])
        rows.append([name, interval(carrier["recovery"], 3), each, interval(carrier["gain"], 4, "+"), *than])
    title = (
        f"{numbers['histories']:,} histories of {numbers['documents']:,} documents, S = {numbers['segment']},"
        f" R = {numbers['recency']}, hash {numbers['hash']}; none costs {numbers['cost']:.3f} nat, as many more raw"
        f" tokens recover {interval(numbers['more_raw'])}"
    )
    header = ["in place of the blocks", "recovery", "of each run", "gain, nats", "than", "verdict"]
    return [Sheet(title, header, rows, (order.index(numbers["subject"]),))]


def rows_of(numbers: dict) -> list[dict]:
    """A row per carrier."""
    return [
        {"carrier": name, "runs": len(carrier["of_each"]), **carrier["recovery"], "gain": carrier["gain"]["point"]}
        for name, carrier in numbers["carriers"].items()
    ]


def command(asked: argparse.Namespace) -> None:
    """Measure, show and write."""
    runs = [_only(run, asked.only) if asked.only else run for run in load(asked.runs)]
    numbers = study(runs, asked.path, asked.segment, asked.recency, asked.tokens, asked.count)
    tables = sheets(numbers)
    show(tables, [NOTE])
    stem = runs[0].folder / "histories"
    write(stem, "Histories", tables, [NOTE], rows_of(numbers), numbers)
    print(f"Histories: {stem}.md, .csv and .json")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.studies.histories", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders of gist stages, such as seeds")
    parser.add_argument("--path", help="files to measure on; without it the held-out part of the embedded text")
    parser.add_argument("--segment", type=int, default=128, help="S, scored tokens (default 128)")
    parser.add_argument("--recency", type=int, help="R, raw tokens before them (default: as the first run has it)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a document (default 1024)")
    parser.add_argument("--count", type=int, default=2000, help="histories at most (default 2000)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the runs' compressors (default: all)")
    return command_line.run(command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
