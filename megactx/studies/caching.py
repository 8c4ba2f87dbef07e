"""Gist caching: what a reused prompt costs that is kept as gists, and what they keep of it (Mu et al. 2023).

    python -m megactx.studies.caching                                    with the embedded base and its GistNet
    python -m megactx.studies.caching RUN [RUN ...] --path TEXTS         with the compressors of runs, on your own texts
    python -m megactx.studies.caching RUN --drift 0.01 steps=20 FOLDER   what stored gists lose when the base changes

Four tables and one more with runs: what an answer costs with the prompt read again, with its plain cache, with gists at
compressions of 1 to K (``prompts``); what the gists cost once; ROUGE-L of the answers with that of the full prompt;
recovery of each run on each domain; drift of stored gists.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from megactx.evaluation.bootstrap import recovery_intervals
from megactx.evaluation.measure import LAST_TOKEN, measure
from megactx.evaluation.table import Report, Table
from megactx.framework.bar import bar
from megactx.gist.carrier import Compressor
from megactx.gist.carriers.avgpool import AvgPool
from megactx.gist.carriers.last_token import LastToken
from megactx.lm import BaseLM
from megactx.lm.eval_mode import in_eval_mode
from megactx.lm.prefill import prefill
from megactx.parts.read import gistnet_of

from .caching_cost import measure_answers, measure_making
from .caching_overlap import measure_overlap
from .caching_report import report_of
from .drift import measure_drift, parsed
from .prompts import again, cached, compressed, levels
from .study import Options, command, multiple, usable
from .trained import NOTHING, Nothing, Trained, base_of, held_out, load, same

BASE, GISTNET, BLOCK, HORIZON = "asset:tiny-base", "asset:tiny-gistnet", 32, 32  # without a run


def options(given: Options) -> None:
    given.runs("run folders of gist stages; none: the embedded GistNet", nargs="*")
    given.add("--base", help=f"a base LM without a GistNet (default: {BASE} and {GISTNET})")
    given.path()
    given.number("tokens", 1024, "of a prompt")
    given.number("input", 32, "tokens behind it that are read raw")
    given.number("answer", 32, "tokens of a continuation")
    given.add("--compression", type=float, nargs="+", help="of what is behind the sink (default 1 2 4 .. K)")
    given.number("documents", 48, "prompts to continue")
    given.number("blocks", 200, "about so many, for recovery")
    given.number("repeats", 7, "of every timing")
    change = "of the base: a relative size, steps=N, a folder"
    given.add("--drift", nargs="*", default=["0.01", "0.03", "0.1"], metavar="CHANGE", help=change)
    given.number("seed", 0, "of the changes", least=0)
    given.add("--out", type=Path, help="folder for the tables (default: the first run's, else runs/caching)")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Everything that was asked for: more of it after each part.

    Raises:
        ValueError: a setting that is not allowed, runs that do not belong together, or no text that is long enough.
    """
    if args.runs and args.base:
        raise ValueError(f"--base={args.base} is not allowed with runs: they name their own base")
    for change in args.drift:
        parsed(change)
    own = args.out or not args.runs
    stem = (usable(args.out or Path("runs/caching")) if own else Path(args.runs[0])) / "caching"
    runs = load(args.runs)
    same(runs)
    base, block, horizon = base_of(args.base or BASE) if not runs else runs[0].base, BLOCK, HORIZON
    if runs:
        block, horizon = runs[0].block_size, min(run.horizon for run in runs)
    multiple("tokens", args.tokens, block, least=2)
    counts = levels(args.tokens, block, args.compression or [2**n for n in range(block.bit_length())])
    if (whole := args.tokens + args.input + args.answer) > base.max_positions:
        raise ValueError(f"--tokens, --input and --answer: {whole} tokens, but the base takes {base.max_positions}")
    nets, controls = _nets(args, runs, base, block), {LAST_TOKEN: LastToken(block), NOTHING: Nothing(block)}
    batches = held_out(base, args.path, block, horizon, args.tokens + args.input, args.blocks)
    about = {name: getattr(args, name) for name in ("tokens", "input", "answer", "documents", "blocks", "repeats")}
    about |= {"base": args.base or BASE if not runs else runs[0].base_name, "runs": [run.name for run in runs]}
    about |= {"block_size": block, "horizon": horizon, "text": args.path, "seed": args.seed}
    about |= {"threads": torch.get_num_threads(), "device": base.model.device.type}
    about["trained"] = bool(runs) or "gistnet" in nets
    table = Table()
    with in_eval_mode(*nets.values()):
        prompt, rest = batches[0]["ids"].to(base.model.device).tensor_split([args.tokens], dim=1)
        _costs(base, next(iter(nets.values())), prompt, rest, counts, args, table)
        measure_making(base, nets, prompt, table)
        yield stem, report_of(table, about)
        sizes = {"tokens": args.tokens, "answer": args.answer, "levels": counts}
        some, shown = batches[: args.documents], bar("greedy continuations")
        about |= measure_overlap(base, nets | controls, some, **sizes, table=table, progress=shown)
        yield stem, report_of(table, about)
        if runs:
            about |= measure_transfer(runs, batches, horizon, table, bar("domains"))
            yield stem, report_of(table, about)
        if args.drift:
            table += measure_drift(base, nets, args.drift, batches, horizon, seed=args.seed, progress=bar("drift"))
            yield stem, report_of(table, about)


def _costs(base: BaseLM, net: Compressor, ids, rest, counts: dict[float, int], args, table: Table) -> None:
    """Every form in which the prompt can be kept; what the carriers say does not change what they cost."""
    read = prefill(base, ids, net.needs_hidden)
    prompts = {("again", None, 0): again(base, ids), ("cache", None, 0): cached(base, read)}
    for compression, count in counts.items():
        for form, prompt in compressed(base, net, read, count).items():
            prompts[form, compression, count] = prompt
    found = measure_answers(base, prompts, rest, args.answer, args.repeats, bar("answers"))
    for (form, compression, _), cost in found.items():
        table.add_all(cost, "metric", carrier=form, span=compression)


def measure_transfer(
    runs: list[Trained],
    batches: Iterable[dict],
    horizon: int,
    table: Table,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict:
    """Compressors trained on some domains, read on others, beside the untrained controls, on the same blocks.

    Args:
        runs: of one base LM and one block size.
        batches, horizon: as for ``measure``.
        table: gets the recovery of each run and control on every domain of the text, and overall.

    Returns:
        ``transfer``: ``first``, the first scored offset, 1 where a run keeps keys and values; ``blocks``,
        ``documents``, ``hash`` of what was measured; ``trained``: run -> domain -> share.
    """
    nets = {run.name: run.main for run in runs}
    scores = measure(runs[0].base, nets, batches, horizon, progress=progress)
    first = int(any(not net.makes_vectors for net in nets.values()))
    for domain, own in scores.by_domain().items():
        found = recovery_intervals(own, list(own.carriers), first)
        table.add_all(found, "carrier", metric="recovery", span=f"h >= {first}", domain=domain)
    about = {"first": first, "blocks": len(scores), "documents": scores.documents}
    about |= {"hash": scores.block_hash(), "trained": {run.name: run.weights for run in runs}}
    return {"transfer": about}


def _nets(args, runs: list[Trained], base: BaseLM, block: int) -> dict[str, Compressor]:
    """All compressors of one run, the main ones of several; and the best that needs no training."""
    if len(runs) == 1:
        nets = dict(runs[0].nets)
    elif runs:
        nets = {run.name: run.main for run in runs}
    else:
        nets = {} if args.base else {"gistnet": gistnet_of(GISTNET, base).to(base.model.device)}
    return nets | {"avgpool": AvgPool(block)}


main = command("caching", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
