"""What a base LM is worth as a base: how it uses its context, and how many tokens one vector can hold.

    python -m megactx.studies.base_card MODEL                                on the held-out part of the embedded text
    python -m megactx.studies.base_card smollm2 --path TEXTS --length 8192   on text of your own

The measures are those of the card of a base that was trained here (``megactx.evaluation.context_use``), so that any
two bases stand beside each other. A base that gains nothing from far text has nothing to lose by compressing it. A base
whose vectors hold fewer tokens than a block cannot have lossless gists, however they are trained.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from megactx.data.documents import VALIDATION, cut, tokenised
from megactx.data.embedded import Embedded
from megactx.data.files import Files
from megactx.data.spans_module import in_turn
from megactx.data.tokenizer import bos_id
from megactx.evaluation.bootstrap import mean_interval
from megactx.evaluation.capacity import capacity
from megactx.evaluation.context_use import each_use
from megactx.evaluation.model_card import card_sheets
from megactx.evaluation.table import OVERALL, Report, Sheet, Table, cell
from megactx.framework.bar import bar
from megactx.parts.models import load_models

from .study import Options, command, usable

LONGEST = 128  # tokens of a passage that a vector is fitted to
LEGEND = "Means over documents, nats per token; brackets: 95 % bootstrap intervals over texts."


def options(given: Options) -> None:
    given.add(
        "model", metavar="MODEL", help="a folder, a GGUF file, or the name of an asset such as tiny-base, smollm2"
    )
    given.path()
    given.number("length", 4096, "tokens of the longest windows", least=256)
    given.number("documents", 30, "documents of so many tokens, at most, in equal parts of every domain")
    given.number("passages", 20, "passages that vectors are fitted to; 0: none", least=0)
    given.number("patience", 300, "steps of Adam that a vector has for one token more")
    given.add(
        "--rate", type=float, default=0.5, help="of that Adam, over the embeddings' root mean square (default 0.5)"
    )
    given.add("--precision", choices=("32-true", "bf16-mixed"), default="32-true", help="of fitting (default 32-true)")
    given.number("block", 32, "tokens of a block")
    given.add("--out", type=Path, default=Path("base_card"), help="folder of the tables")


def held(args: dict) -> Table:
    """Passages' capacities -> rows of the long table."""
    table = Table()
    for metric, values in args.items():
        rows = torch.arange(len(values))
        table.add(metric, mean_interval(rows, values.double()), domain=OVERALL, n=len(values))
    return table


def sheet(table: Table, block: int) -> Sheet:
    exact, share = table.one(metric="capacity"), table.one(metric="capacity_block")
    rows = [
        ["tokens that greedy decoding gives back exactly", cell(exact, ".1f")],
        [f"share of the {block} tokens of a block, teacher-forced", cell(share, ".2f")],
    ]
    return Sheet(f"What one vector can hold: {exact['n']} passages", ["", "mean"], rows)


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Measure a base LM.

    Raises:
        ValueError: there is no such base, or no text is that long; the message names the option.
    """
    stem = usable(args.out) / "base_card"
    base = load_models(args.model, setting="MODEL").base
    if args.length > base.max_positions:
        raise ValueError(f"--length={args.length} is not allowed: the base takes {base.max_positions} positions")
    if not 0 < args.rate < math.inf:
        raise ValueError(f"--rate={args.rate} is not allowed: a number above 0")
    source = Files(args.path) if args.path else Embedded()
    split = None if args.path else VALIDATION
    documents, _ = cut(tokenised(source, base.tokenizer), split, base.tokenizer, args.length, args.length)
    documents = in_turn(documents)[: args.documents]
    about = {"model": args.model, "text": args.path, "length": args.length, "documents": len(documents)}
    if not documents:
        raise ValueError(f"--length={args.length}: no text has so many tokens; give longer ones or lower it")
    for table in bar("measures")(each_use(base, documents, args.length)):
        sheets = card_sheets(table)
        yield stem, Report(f"Base card of {args.model}", table, sheets, LEGEND, [], about)
    if args.passages:
        size = min(LONGEST, args.length // 2)
        middle = slice(args.length // 2, args.length // 2 + size)
        chosen = [torch.from_numpy(document["input_ids"][middle]).long() for document in documents[: args.passages]]
        passages = torch.stack(chosen).to(base.model.device)
        begin, given = bos_id(base.tokenizer), (min(args.block, size), args.patience, args.rate)
        with torch.autocast(base.model.device.type, torch.bfloat16, enabled=args.precision == "bf16-mixed"):
            found = capacity(base, passages, begin, *given, told=_told)
        own = held({"capacity": found.exact, "capacity_block": found.block})
        table = Table([*table, *own])
        about |= {"passages": len(passages), "patience": args.patience, "rate": args.rate, "block": args.block}
        about["precision"] = args.precision
        yield stem, Report(f"Base card of {args.model}", table, [*sheets, sheet(own, args.block)], LEGEND, [], about)


def _told(steps: int, exact: torch.Tensor) -> None:
    print(f"capacity: {steps} steps, {exact.double().mean():.1f} tokens so far", file=sys.stderr, flush=True)


main = command("base_card", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
