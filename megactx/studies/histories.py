"""Finished runs on many histories: what is left when old blocks are all compressed at once (method 3, 5).

    python -m megactx.studies.histories RUN [RUN ...]                     runs of gist stages, on the embedded text
    python -m megactx.studies.histories SEED0 SEED1 SEED2 --path TEXTS --segment 64 --recency 32 --count 2000

Runs that differ in their seed are one: of every compressor that has the same name in them the losses are averaged,
history by history, and each run's own recovery stands beside. All carriers, and the untrained controls, are read
behind the same histories.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from megactx.evaluation.bootstrap import difference_intervals, mean_interval, recovery_intervals, told
from megactx.evaluation.history import measure_history, segments
from megactx.evaluation.measure import untrained
from megactx.evaluation.scores import MORE_RAW, BlockScores
from megactx.evaluation.table import BLOCKS, Report, Sheet, Table, cell, pivot
from megactx.gist.carriers.avgpool import AvgPool

from .kept import identity, kept
from .study import Options, at_least, chosen, command, multiple
from .trained import Trained, held_out, load, same

LEGEND = (
    "recovery = 1 - (NLL_carriers - NLL_full) / (NLL_nothing - NLL_full) over the scored tokens; gain = NLL of as many"
    " more raw tokens - NLL_carriers. than: the bold row minus this one, and what that says; brackets: 95 %, paired"
    " bootstrap over documents."
)


def summarise(scores: BlockScores, runs: Mapping[str, list[str]]) -> Table:
    """Scores with the carriers of every run under ``_key`` and controls by name -> the long table.

    Args:
        runs: of every run, its compressors; the first of the first is what all are compared with.
    """
    table, own = Table(), {}
    keys = {_key(run, name): (run, name) for run, names in runs.items() for name in names}
    for name in dict.fromkeys(name for _, name in keys.values()):
        each = [scores.carriers[key] for key, (_, of) in keys.items() if of == name]
        own[name] = torch.stack(each).double().mean(dim=0)
    own |= {name: values for name, values in scores.carriers.items() if name not in keys}
    mean = replace(scores, carriers=own, kl={}, agree={})
    subject, about = next(iter(own)), {"n": scores.documents}
    found = {"recovery": recovery_intervals(mean, list(own))}
    for key, value in recovery_intervals(scores, list(keys)).items():
        table.add("recovery", value, run=keys[key][0], carrier=keys[key][1], **about)
    rest = [name for name in own if name != MORE_RAW]
    gains = {name: (own[MORE_RAW] - own[name]).double().mean(dim=1) for name in rest}
    found["gain"] = {name: mean_interval(scores.document, gain) for name, gain in gains.items()}
    found["behind"] = difference_intervals(mean, subject, [name for name in rest if name != subject])
    table.add_all(found, "metric", "carrier", **about)
    table.add("cost", scores.cost())
    return table


def _key(run: str, name: str) -> str:
    return f"{run}: {name}"


def _only(run: Trained, names: list[str]) -> Trained:
    """A run without its other compressors.

    Raises:
        ValueError: it has none of these.
    """
    if not (kept := {name: run.nets[name] for name in names if name in run.nets}):
        raise ValueError(f"--only={' '.join(names)}: {run.folder} has {', '.join(run.nets)}")
    return replace(run, nets=kept)


def sheets(table: Table, scores: BlockScores, sizes: dict[str, int], subject: str) -> list[Sheet]:
    """The carriers, best first."""
    mean = Table(row for row in table if "run" not in row)

    def of_each(row: dict) -> str:
        every = table.pick(carrier=row["carrier"], metric="recovery")
        return " ".join(f"{row['point']:.3f}" for row in every if "run" in row)

    columns = [("recovery", "recovery", ".3f"), ("of each run", "recovery", of_each), ("gain, nats", "gain", "+.4f")]
    columns += [("than", "behind", "+.3f"), ("verdict", "behind", told)]
    order = [name for name in mean.ranked(metric="recovery") if name != MORE_RAW]
    title = (
        f"{len(scores):,} histories of {scores.documents:,} documents, S = {sizes['segment']},"
        f" R = {sizes['recency']}, hash {scores.block_hash()}; none costs {table.point(metric='cost'):.3f} nat, as many"
        f" more raw tokens recover {cell(mean.one(carrier=MORE_RAW, metric='recovery'))}"
    )
    return [pivot(title, mean, columns, heading=BLOCKS, order=order, strong=[subject])]


def options(given: Options) -> None:
    given.runs("run folders of gist stages, such as seeds")
    given.path()
    given.number("segment", 128, "S, scored tokens")
    given.add("--recency", type=int, help="R, raw tokens before them (default: as the first run has it)")
    given.number("tokens", 1024, "of a document")
    given.number("count", 2000, "histories at most")
    given.add("--only", nargs="+", metavar="NAME", help="of the runs' compressors (default: all)")
    given.controls()


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Measure the compressors of runs, and the controls, behind histories.

    Raises:
        ValueError: a setting that is not allowed, runs that do not belong together, or no text that is long enough.
    """
    runs = [_only(run, args.only) if args.only else run for run in load(args.runs)]
    same(runs)
    base, block = runs[0].base, runs[0].main.block_size
    sizes = {"segment": args.segment, "recency": runs[0].recency if args.recency is None else args.recency}
    for name, value in sizes.items():
        multiple(name, value, block)
    at_least("tokens", args.tokens, 2 * block + sum(sizes.values()), ", a sink, a block, R and S")
    batches = held_out(base, args.path, block, 1, args.tokens, args.count)
    nets = {_key(run.name, name): net.to(base.model.device) for run in runs for name, net in run.nets.items()}
    controls = {"avgpool": AvgPool(block)} | untrained(base, block, runs[0].main.position)
    nets |= chosen(controls, args.controls)
    found, of = segments(batches, block, args.count, **sizes), identity(base, nets, **sizes)
    folder = runs[0].folder / "histories"
    scores = kept(folder, of, found, lambda some: measure_history(base, nets, some, **sizes))
    table, subject = summarise(scores, {run.name: list(run.nets) for run in runs}), next(iter(runs[0].nets))
    about = {"base": runs[0].base_name, "runs": [run.name for run in runs], "text": args.path, "tokens": args.tokens}
    about |= sizes | {"subject": subject, "hash": scores.block_hash(), "histories": len(scores)}
    tables = sheets(table, scores, sizes, subject)
    yield folder, Report("Histories", table, tables, LEGEND, about=about)


main = command("histories", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
