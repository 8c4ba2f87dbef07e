"""Exact recall of trained gists: a number, a UUID, a name, a path, a word, told in an old block and asked for later.

    python -m megactx.studies.probes RUN [RUN ...]                        runs of a gist stage, on the embedded text
    python -m megactx.studies.probes RUN --path TEXTS --per-class 100     between texts of your own

Every compressor of a run answers three times: over gists only, with the block that told it expanded, over the full
context (``megactx.evaluation.probes``). What a base LM cannot answer with everything in front of it is no measure of
gists, and the table says so. It also shows what is guessed with nothing in place of the old blocks.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megactx.data.probes import KINDS, make_probes
from megactx.evaluation.bootstrap import wilson
from megactx.evaluation.measure import untrained
from megactx.evaluation.probes import READERS, measure_probes
from megactx.evaluation.table import BLOCKS, Report, Sheet, Table, pivot
from megactx.framework.bar import bar

from .study import Options, command, multiple
from .trained import NOTHING, Nothing, held_out, load

DOCUMENTS = 200  # of text around the probes; with fewer, some come again
ALL = "all"
GISTS, EXPANDED, FULL = READERS
LEGEND = (
    "accuracy: share of probes of which every token of the answer is the argmax; brackets: 95 %, Wilson's interval of a"
    f" share. nats: NLL per token of the answer. {NOTHING}: what is guessed without the old blocks."
)


def summarise(answers: dict[str, list[dict]]) -> Table:
    """Rows of ``measure_probes`` by carrier -> the long table: a reader is a span, a class of probes a domain."""
    table = Table()
    for number, (carrier, rows) in enumerate(answers.items()):
        for reader in READERS:
            if reader == FULL:  # it reads no carrier, so it is the same beside all of them
                carrier = FULL
            for kind in [*dict.fromkeys(row["kind"] for row in rows), ALL] * (reader != FULL or not number):
                own = [row[reader] for row in rows if kind in (ALL, row["kind"])]
                about = {"carrier": carrier, "span": reader, "domain": kind, "n": len(own)}
                table.add("accuracy", wilson(sum(answer["right"] for answer in own), len(own)), **about)
                table.add("nll", sum(answer["nll"] for answer in own) / len(own), **about)
    return table


def sheets(table: Table, about: dict) -> list[Sheet]:
    """Accuracy over gists only, accuracy with the block expanded, and the nats of both."""
    full, words = table.pick(carrier=FULL, metric="nll"), {GISTS: "gists only"}
    words[EXPANDED] = "the block that told it expanded, gists in place of the others"
    what = (
        f"{about['run']}: {full.one(domain=ALL)['n']} documents, {about['blocks']} old blocks of"
        f" {about['block_size']} tokens, {about['recency']} raw tokens"
    )
    out = []
    for metric, title, form in (("accuracy", "accuracy", ".2f"), ("nll", "nats per token of the answer", ".3f")):
        for reader, word in words.items():
            own = table.pick(span=reader) + table.pick(span=FULL)
            columns = [
                (f"{row['domain']} ({row['n']})", {"metric": metric, "domain": row["domain"]}, form) for row in full
            ]
            heading = f"{title}, {word}" + ("" if out else f"; {what}")
            order, strong = [FULL, *_ranked(table.pick(span=reader, domain=ALL))], [about["subject"]]
            out.append(pivot(heading, Table(own), columns, heading=BLOCKS, order=order, strong=strong))
    return out


def _ranked(table: Table) -> list[str]:
    """By accuracy; where all are equally wrong, by how wrong."""

    def rank(name: str) -> float:
        return 1e-3 * table.point(carrier=name, metric="nll") - table.point(carrier=name, metric="accuracy")

    return sorted(table.names("carrier"), key=rank)


def notes_on(table: Table) -> list[str]:
    """Every class of which the base LM knows nothing."""
    blocked = {row["domain"]: row["n"] for row in table.pick(carrier=FULL, metric="accuracy") if not row["point"]}
    if ALL in blocked:
        return [
            f"The base is the blocker: even with the full context it answers none of {blocked[ALL]} probes, so accuracy"
            " says nothing about what stands for a block; the nats still do.",
        ]
    return [
        f"{kind}: the base is the blocker, even with the full context it answers none of {of}."
        for kind, of in blocked.items()
    ]


def options(given: Options) -> None:
    given.runs()
    given.path("files for the text around; without it the embedded text")
    given.number("per-class", 40, f"probes of each of {', '.join(KINDS)}")
    given.number("blocks", 8, "old blocks of each document")
    given.add("--recency", type=int, help="raw tokens behind them (default: as the run has it)")
    given.number("seed", 0, "of the probes", least=0)


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Ask every compressor of each run, and the untrained controls.

    Raises:
        ValueError: a setting that is not allowed, or no text that is long enough; the message names it.
    """
    for run in load(args.runs):
        block, recency = run.main.block_size, run.recency if args.recency is None else args.recency
        multiple("recency", recency, block)
        tokens = (args.blocks + 1) * block + recency
        texts = [batch["ids"][0].numpy() for batch in held_out(run.base, args.path, block, 1, tokens, DOCUMENTS)]
        sizes = (block, recency, args.blocks, args.seed)
        probes = make_probes(run.base.tokenizer, texts, args.per_class, *sizes)
        if (longest := max(len(probe.ids) for probe in probes)) > run.base.max_positions:
            most = run.base.max_positions
            raise ValueError(f"--blocks={args.blocks}: a probe has {longest} tokens, the base takes {most}")
        nets = run.nets | {NOTHING: Nothing(block)} | untrained(run.base, block, run.main.position)
        answers = {}
        for name, net in nets.items():
            shown = bar(f"{run.name}: {name}")(probes)
            answers[name] = measure_probes(run.base, net.to(run.base.model.device), shown, recency)
        about = {"base": run.base_name, "run": run.name, "subject": next(iter(run.nets)), "seed": args.seed}
        about |= {"text": args.path, "block_size": block, "tokens": tokens, "blocks": args.blocks, "recency": recency}
        table = summarise(answers)
        report = Report("Exact recall", table, sheets(table, about), LEGEND, notes_on(table), about)
        yield run.folder / "probes", report


main = command("probes", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
