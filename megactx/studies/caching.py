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
from collections.abc import Iterator
from pathlib import Path

import torch

from megactx.evaluation.measure import LAST_TOKEN, in_eval_mode
from megactx.framework.bar import bar
from megactx.framework.command_line import run
from megactx.gist.carrier import Compressor
from megactx.gist.carriers.avgpool import AvgPool
from megactx.gist.carriers.last_token import LastToken
from megactx.gist.substitution import teach
from megactx.lm import BaseLM
from megactx.parts.read import gistnet_of

from .caching_cost import measure_answers, measure_making
from .caching_overlap import measure_overlap
from .caching_report import notes_on, rows_of, sheets
from .drift import check, measure_drift
from .prompts import again, cached, compressed, levels
from .tables import show, usable, write
from .trained import NOTHING, Nothing, Trained, held_out, load, quiet, same
from .transfer import measure_transfer

BASE, GISTNET, BLOCK, HORIZON = "asset:tiny-base", "asset:tiny-gistnet", 32, 32  # without a run
SIZES = ("tokens", "input", "answer", "documents", "blocks", "repeats")


def study(asked: argparse.Namespace) -> Iterator[dict]:
    """Everything that was asked for, as plain numbers: more of it after each part.

    Raises:
        ValueError: a setting that is not allowed, runs that do not belong together, or no text that is long enough.
    """
    _check(asked)
    runs = load(asked.runs)
    same(runs)
    base, block, horizon = _subject(asked, runs)
    if asked.tokens % block or asked.tokens < 2 * block:
        raise ValueError(f"--tokens={asked.tokens} is not allowed: a multiple of block_size={block}, at least twice it")
    counts = levels(asked.tokens, block, asked.compression or [2**n for n in range(block.bit_length())])
    if (whole := asked.tokens + asked.input + asked.answer) > base.max_positions:
        raise ValueError(f"--tokens, --input and --answer: {whole} tokens, but the base takes {base.max_positions}")
    nets, controls = _nets(asked, runs, base, block), {LAST_TOKEN: LastToken(block), NOTHING: Nothing(block)}
    batches = held_out(base, asked.path, block, horizon, asked.tokens + asked.input, asked.blocks)
    numbers = {
        "base": asked.base or BASE if not runs else runs[0].base_name,
        "runs": [run.name for run in runs],
        "block_size": block,
        "horizon": horizon,
        "text": asked.path,
        "threads": torch.get_num_threads(),
        "device": base.model.device.type,
    }
    numbers |= {name: getattr(asked, name) for name in SIZES} | {"seed": asked.seed}
    with in_eval_mode(*nets.values()):
        prompt = batches[0]["ids"][:, : asked.tokens].to(base.model.device)
        rest = batches[0]["ids"][:, asked.tokens :].to(base.model.device)
        leader = next(iter(nets.values()))
        numbers["costs"] = _costs(base, leader, prompt, rest, counts, asked)
        numbers["making"] = measure_making(base, nets, prompt)
        yield numbers
        own = {
            "tokens": asked.tokens,
            "answer": asked.answer,
            "levels": counts,
            "progress": bar("greedy continuations"),
        }
        numbers["overlap"] = measure_overlap(base, nets | controls, batches[: asked.documents], **own)
        yield numbers
        if runs:
            numbers["transfer"] = measure_transfer(runs, batches, horizon, bar("domains"))
            yield numbers
        drifting = {"seed": asked.seed, "progress": bar("drift")}
        if asked.drift:
            numbers["drift"] = measure_drift(base, nets, asked.drift, batches, horizon, **drifting)
            yield numbers


def _costs(base: BaseLM, net: Compressor, ids, rest, counts: dict[float, int], asked) -> list[dict]:
    """Every form in which the prompt can be kept; what the carriers say does not change what they cost."""
    teacher = teach(base, ids, net.needs_hidden)
    prompts = {("again", None, 0): again(base, ids), ("cache", None, 0): cached(base, teacher)}
    for compression, count in counts.items():
        for form, prompt in compressed(base, net, teacher, count).items():
            prompts[form, compression, count] = prompt
    found = measure_answers(base, prompts, rest, asked.answer, asked.repeats, bar("answers"))
    return [{"form": form, "compression": c, "gists": n} | cost for (form, c, n), cost in found.items()]


def _subject(asked, runs: list[Trained]) -> tuple[BaseLM, int, int]:
    if runs:
        return runs[0].base, runs[0].main.block_size, min(run.horizon for run in runs)
    quiet()
    base = BaseLM.from_pretrained(asked.base or BASE, "float32").freeze()
    return base.to("cuda" if torch.cuda.is_available() else "cpu"), BLOCK, HORIZON


def _nets(asked, runs: list[Trained], base: BaseLM, block: int) -> dict[str, Compressor]:
    """All compressors of one run, the main ones of several; and the best that needs no training."""
    if len(runs) == 1:
        nets = dict(runs[0].nets)
    elif runs:
        nets = {run.name: run.main for run in runs}
    else:
        nets = {} if asked.base else {"gistnet": gistnet_of(GISTNET, base).to(base.model.device)}
    return nets | {"avgpool": AvgPool(block)}


def _check(asked) -> None:
    for name in SIZES:
        if getattr(asked, name) < 1:
            raise ValueError(f"--{name}={getattr(asked, name)} is not allowed: at least 1")
    if asked.runs and asked.base:
        raise ValueError(f"--base={asked.base} is not allowed with runs: they name their own base")
    for change in asked.drift:
        check(change)


def command(asked: argparse.Namespace) -> None:
    """Measure, and write the tables after every part."""
    own = asked.out or not asked.runs
    stem = (usable(asked.out or Path("runs/caching")) if own else Path(asked.runs[0])) / "caching"
    for numbers in study(asked):
        tables, notes = sheets(numbers), notes_on(numbers)
        write(stem, "Gist caching", tables, notes, rows_of(numbers), numbers)
    show(tables, notes)
    print(f"Caching: {stem}.md, .csv and .json")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.studies.caching", description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders of gist stages; none: the embedded GistNet")
    parser.add_argument("--base", help=f"a base LM without a GistNet (default: {BASE} and {GISTNET})")
    parser.add_argument("--path", help="files to measure on; without it the held-out part of the embedded text")
    parser.add_argument("--tokens", type=int, default=1024, help="of a prompt (default 1024)")
    parser.add_argument("--input", type=int, default=32, help="tokens behind it that are read raw (default 32)")
    parser.add_argument("--answer", type=int, default=32, help="tokens of a continuation (default 32)")
    parser.add_argument("--compression", type=float, nargs="+", help="of what is behind the sink (default 1 2 4 .. K)")
    parser.add_argument("--documents", type=int, default=48, help="prompts to continue (default 48)")
    parser.add_argument("--blocks", type=int, default=200, help="about so many, for recovery (default 200)")
    parser.add_argument("--repeats", type=int, default=7, help="of every timing (default 7)")
    parser.add_argument(
        "--drift",
        nargs="*",
        default=["0.01", "0.03", "0.1"],
        metavar="CHANGE",
        help="of the base: a relative size, steps=N, a folder (default 0.01 0.03 0.1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default 0)")
    parser.add_argument("--out", type=Path, help="folder for the tables (default: the first run's, else runs/caching)")
    return run(command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
