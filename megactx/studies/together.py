"""Parts that learned together against parts that learned apart: every run on the same held-out documents.

    python -m megactx.studies.together RUN [RUN ...]             the first run is what the others are compared with
    python -m megactx.studies.together GIST LENS ALTERNATING END_TO_END --documents 100 --budgets 0.25 0.125
    python -m megactx.studies.together runs/apart/* runs/end/*   folders apart/0, apart/1, ... are seeds of one row

A run is a folder of a gist, lens, alternating or end_to_end stage. One without a LensNet has the cold start as its
windows. Cost is the NLL of the tokens behind a window, above that of the untouched base LM over the full context: so a
base LM that was adapted gains nothing by being worse without windows. Tokens are those that a joint run counted, of
documents that it learned from or measured with; FLOPs are those of a run with ``callbacks=counted``.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megactx.evaluation.bootstrap import mean_interval, recovery_intervals
from megactx.evaluation.focus import focused, newest, plain_nll
from megactx.evaluation.measure import measure
from megactx.evaluation.metrics import BODY
from megactx.evaluation.pictures import colours_of, legend, line, panel, picture
from megactx.evaluation.table import Report, Sheet, Table, pivot
from megactx.focus.edit_labels import continuation_nll
from megactx.focus.lensnet import LensNet
from megactx.framework.bar import bar
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.adapters import adapters_of
from megactx.memory import MegaContextTree, WorkingContext
from megactx.stages.export import load_run
from megactx.stages.gist import GistStage
from megactx.stages.lens import LensStage

from .study import Options, command, usable
from .trained import base_of, checkpoint_of, device, held_out, same

DROP = "newest tokens alone"
TAKEN = {"tokens": "training tokens", "flops": "training FLOPs"}
COUNTS = ("seeds", "steps", "tokens", "flops", "adapter_parameters")
LEGEND = "its recency: the cost of that run's cold starts. base lost: nats of its own NLL, without any windows."


@dataclass
class Parts:
    """What a run has learned."""

    name: str
    base: BaseLM
    base_name: str
    gistnet: GistNet
    lens: LensNet
    allocator: dict
    horizon: int
    steps: int
    tokens: int | None
    flops: int | None
    changed: bool  # whether the base LM is no longer what it was

    @property
    def block_size(self) -> int:
        """K, tokens."""
        return self.gistnet.block_size


def parts_of(folder: str | Path) -> Parts:
    """Read a run of any of the four stages.

    Raises:
        ValueError: there is no checkpoint, or it is of another stage.
    """
    folder = Path(folder).expanduser()
    path, checkpoint = checkpoint_of(folder)
    given = checkpoint["hyper_parameters"]
    settings = {"map_location": "cpu", "weights_only": True}
    tokens, changed = None, False
    if "train_base" in given:
        stage, _ = load_run(folder)
        tokens, changed = int(stage.tokens), stage.train_base != "frozen"
    elif "controls" in given:
        stage = GistStage.load_from_checkpoint(path, **settings)
    elif "lensnet" in given:
        stage = LensStage.load_from_checkpoint(path, **settings)
    else:
        raise ValueError(f"{folder}: it is of no gist, lens, alternating or end_to_end stage")
    stage.to(device()).eval()
    lens = getattr(stage, "lens", None) or LensNet(stage.base.width, stage.gistnet.block_size).to(stage.device).eval()
    return Parts(
        name=name_of(folder),
        base=stage.base.float(),
        base_name=given["base"]["name"],
        gistnet=stage.gistnet,
        lens=lens,
        allocator=dict(stage.hparams.get("allocator", {})),
        horizon=given["horizon"],
        steps=checkpoint["global_step"],
        tokens=tokens,
        flops=checkpoint.get("callbacks", {}).get("Flops", {}).get("total"),
        changed=changed,
    )


def name_of(folder: Path) -> str:
    """The folder's own, and of the one above unless that is ``runs``; a folder that is a number is a seed of it."""
    folder = folder.resolve()
    folder = folder.parent if folder.name.isdigit() else folder
    return folder.name if folder.parent.name == "runs" else "/".join(folder.parts[-2:])


@torch.no_grad()
def plain(base: BaseLM, documents: list[dict]) -> list[Tensor]:
    """NLL of every token but the first over the full context: a tensor [T + H - 1] per document, in nats."""
    return [plain_nll(base, document["ids"].to(base.model.device)[None]).cpu() for document in documents]


def behind(document: dict, values: Tensor) -> float:
    """Mean over what follows the cursor."""
    return values[document["cursor"] - 1 :].mean().item()


@torch.no_grad()
def measure_run(
    run: Parts, documents: list[dict], blocks: list[dict], horizon: int, budgets: list[float], full: list[Tensor]
) -> dict:
    """What ``summarise`` takes of one run.

    Args:
        horizon: H, of the recovery.
        full: of ``plain`` with the untouched base LM.
    """
    allocator, device = run.allocator, run.base.model.device
    found = {name: getattr(run, name) for name in ("name", "steps", "tokens", "flops")}
    found |= {"lens": {}, "recency": {}, "swap_rate": {}}
    for document in bar(f"{run.name}: windows")(documents):
        ids, cursor = document["ids"].to(device)[None], document["cursor"]
        tree = MegaContextTree.from_tokens(ids[:, :cursor], run.gistnet, run.base)
        for share in budgets:
            budget, telemetry = int(share * cursor), {}
            windows = {"recency": WorkingContext.recency(tree, budget)}
            windows["lens"] = focused(tree, budget, run.lens, allocator, telemetry)
            for name, context in windows.items():
                cost = continuation_nll(run.base, context, ids[:, cursor:]).mean().item()
                found[name].setdefault(f"{share:g}", []).append(cost)
            told = [value for value in telemetry["swap_rate"] if value == value]
            found["swap_rate"].setdefault(f"{share:g}", []).extend(told)
    spans = measure(run.base, {"gistnet": run.gistnet}, blocks, horizon, with_controls=False)
    found["recovery_body"] = recovery_intervals(spans, ["gistnet"], BODY)["gistnet"]._asdict()
    own = plain(run.base, documents) if run.changed else full
    found["own_full"] = [behind(document, values) for document, values in zip(documents, own, strict=True)]
    found["base_lost"] = float(torch.stack([(a - b).mean() for a, b in zip(own, full, strict=True)]).mean())
    found["adapter_parameters"] = sum(p.numel() for p in adapters_of(run.base).values())
    return found


@torch.no_grad()
def dropping(base: BaseLM, documents: list[dict], budgets: list[float]) -> dict[str, list[float]]:
    """NLL of what follows behind the newest raw tokens alone, by the untouched base LM: budget -> per document."""
    shares = {f"{share:g}": share for share in budgets}
    return {name: [newest(base, d, int(share * d["cursor"])) for d in documents] for name, share in shares.items()}


def summarise(found: list[dict], full: Tensor, document: Tensor, dropped: dict[str, list[float]]) -> Table:
    """Runs of one name at a budget (a span), with their cost and how much less that is than the first run's.

    Args:
        found: of ``measure_run``; those of one name are seeds, in their order.
        full: NLL of the untouched base LM over the full context, [documents].
        document: which text each is of, [documents].
        dropped: of ``dropping``.
    """
    groups, table = {}, Table()
    for run in found:
        groups.setdefault(run["name"], []).append(run)
    first = next(iter(groups.values()))

    def costs(runs: list[dict], kind: str, budget: str) -> Tensor:
        return torch.tensor([run[kind][budget] for run in runs], dtype=torch.float64) - full  # [seeds, documents]

    for budget, drop in dropped.items():
        theirs = costs(first, "lens", budget)
        for name, seeds in groups.items():
            mine, about = costs(seeds, "lens", budget), {"run": name, "span": budget, "n": len(full)}
            paired = min(len(mine), len(theirs))
            less = mine[:paired] - theirs[:paired]
            table.add("cost", mean_interval(document, mine.mean(0)), **about)
            table.add("less", mean_interval(document, less.mean(0)), **about)
            table.add("recency", mean_interval(document, costs(seeds, "recency", budget).mean(0)), **about)
            for seed, values in enumerate(mine):
                table.add("cost", values.mean().item(), carrier=f"seed {seed}", **about)
            for seed, values in enumerate(less):
                table.add("less", values.mean().item(), carrier=f"seed {seed}", **about)
            own = torch.tensor([run["own_full"] for run in seeds], dtype=torch.float64) - full
            body, swaps = [run["recovery_body"]["point"] for run in seeds], [run["swap_rate"][budget] for run in seeds]
            means = {"own_full": float(own.mean()), "recovery_body": sum(body) / len(body)}
            means["swap_rate"] = sum(map(sum, swaps)) / max(1, sum(map(len, swaps)))
            means["base_lost"] = sum(run["base_lost"] for run in seeds) / len(seeds)
            counts = {"seeds": len(seeds)} | {name: seeds[0][name] for name in COUNTS[1:]}
            table.add_all(means | counts, "metric", **about)
        cost, about = torch.tensor(drop, dtype=torch.float64) - full, {"run": DROP, "span": budget, "n": len(full)}
        table.add("cost", mean_interval(document, cost), **about)
        table.add("less", mean_interval(document, cost - theirs.mean(0)), **about)
    return table


def report_of(table: Table, about: dict) -> Report:
    """The report; ``about``: ``documents``, ``tokens``, ``horizon``, ``base``, and ``full``, the base LM's own NLL."""
    sheets = [sheet(table, budget) for budget in table.names("span")]
    note = (
        f"{about['documents']} held-out documents of {about['tokens']:,} tokens, H = {about['horizon']}; the untouched"
        f" base LM has {about['full']:.3f} nats per token there. Means over seeds; intervals: 95 %, paired bootstrap"
        " over documents."
    )
    title = "Learned together, learned apart"
    return Report(title, table, sheets, LEGEND, [note], about, partial(plot, table))


def sheet(table: Table, budget: str) -> Sheet:
    """The sheet of one budget."""

    def each(row: dict) -> str:
        seeds = table.pick(metric="less", run=row["run"], span=budget)
        return " ".join(f"{row['point']:+.3f}" for row in seeds if "carrier" in row)

    def count(row: dict | None, form: str = ",") -> str:
        return "-" if row is None or row["point"] is None else format(row["point"], form)

    columns = [(name, name, count) for name in ("seeds", "steps", "tokens")]
    columns += [("FLOPs", "flops", partial(count, form=".1e")), ("cost", "cost", ".3f")]
    columns += [("than the first", "less", ".3f"), ("of each seed", "less", each)]
    columns += [("its recency", "recency", lambda row: "-" if row is None else f"{row['point']:.3f}")]
    columns += [("recovery h>=4", "recovery_body"), ("swaps", "swap_rate"), ("base lost", "base_lost", "+.3f")]
    title = f"budget {budget} of the tokens; cost in nats per token above the untouched base LM"
    return pivot(title, table.pick(span=budget), columns, "run", "run")


def plot(table: Table, path: Path) -> None:
    """What it brought over what it took: a line of two panels per budget; what was not counted is missing there."""
    budgets, colours = table.names("span"), colours_of(table.names("run"))
    with picture(path, (12, 4.2 * len(budgets)), len(budgets), len(TAKEN)) as grid:
        for budget, panels in zip(budgets, grid, strict=True):
            for axes, (metric, label) in zip(panels, TAKEN.items(), strict=True):
                for row in table.pick(metric="less", span=budget, carrier=None):
                    taken = table.one(metric=metric, run=row["run"], span=budget)
                    if taken and taken["point"]:
                        line(axes, [(taken["point"], row)], color=colours[row["run"]], label=row["run"])
                title = f"windows of {float(budget):g} of the tokens"
                panel(axes, title, label, "nats per token above the first", zero=True)
        for axes in grid.flat:
            legend(axes)


def options(given: Options) -> None:
    given.runs("run folders of gist, lens, alternating or end_to_end stages")
    given.number("documents", 100, "held-out ones at most")
    given.number("tokens", 4096, "T, before the cursor", least=256)
    given.add("--budgets", type=float, nargs="+", default=[0.25, 0.125], help="entries of a window over T")
    given.number("blocks", 400, "about so many, for recovery")
    given.path()
    given.add("--out", type=Path, default=Path("runs/together"), help="stem of .md, .csv, .json and .png")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Measure all runs on the same documents, and their recovery on blocks of documents of a quarter of the tokens.

    Raises:
        ValueError: runs of other base LMs or blocks of other sizes; no text is that long.
    """
    for share in args.budgets:
        if not 0 < share <= 1:
            raise ValueError(f"--budgets={share:g} is not allowed: above 0, and at most 1, the whole text")
    usable(args.out.parent)
    runs, tokens = [parts_of(folder) for folder in args.runs], args.tokens
    same(runs)
    first = runs[0]
    base, block, horizon = first.base, first.block_size, first.horizon  # others may have learned from farther
    long = held_out(base, args.path, block, horizon, tokens + horizon, None)
    chosen = [
        {"ids": batch["ids"][0], "cursor": tokens, "domain": batch["domain"][0], "text": int(batch["document"][0])}
        for batch in long[: args.documents]
    ]
    spans = held_out(base, args.path, block, horizon, max(tokens // 4, 2 * block + horizon), args.blocks)
    untouched = base_of(first.base_name)
    every = plain(untouched, chosen)
    dropped = dropping(untouched, chosen, args.budgets)
    found = [measure_run(run, chosen, spans, horizon, args.budgets, every) for run in runs]
    full = torch.tensor([behind(*pair) for pair in zip(chosen, every, strict=True)], dtype=torch.float64)
    text = torch.tensor([document["text"] for document in chosen])
    about = {"documents": len(chosen), "tokens": tokens, "horizon": horizon, "base": first.base_name}
    yield args.out, report_of(summarise(found, full, text, dropped), about | {"full": float(full.mean())})


main = command("together", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
