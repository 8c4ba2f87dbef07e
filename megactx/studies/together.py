"""Parts that learned together against parts that learned apart: every run on the same held-out documents.

    python -m megactx.studies.together RUN [RUN ...]             the first run is what the others are compared with
    python -m megactx.studies.together GIST LENS ALTERNATING END_TO_END --documents 100 --budgets 0.25 0.125

A run is a folder of a gist, lens, alternating or end_to_end stage. One without a LensNet has the cold start as its
windows. Cost is the NLL of the tokens behind a window, above that of the untouched base LM over the full context: so a
base LM that was adapted gains nothing by being worse without windows. Tokens are those that a joint run counted, of
documents that it learned from or measured with; FLOPs are those of a run with ``callbacks=counted``.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megactx.evaluation.bootstrap import mean_interval, recovery_intervals
from megactx.evaluation.focus import FULL, LENS, RECENCY, FocusScores, measure_focus
from megactx.evaluation.measure import measure
from megactx.evaluation.sheets import Sheet, number
from megactx.focus.lensnet import LensNet
from megactx.framework.resume import best, read
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.stages.export import load_run
from megactx.stages.gist import GistStage
from megactx.stages.joint_report import lost, plain_nll
from megactx.stages.lens import LensStage

from .tables import show, write
from .trained import bar, held_out, quiet

BODY = 4  # the first offset of recovery_body
TITLE = "Learned together, learned apart"


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
    stage: object  # of a joint run, which knows the untouched base LM; None of another one


def parts_of(folder: str | Path) -> Parts:
    """Read a run of any of the four stages.

    Raises:
        ValueError: there is no checkpoint, or it is of another stage.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such run folder")
    path = best(folder)
    checkpoint = read(path)
    given = checkpoint["hyper_parameters"]
    settings = {"map_location": "cpu", "weights_only": True}
    lens, tokens, joint = None, None, None
    if "train_base" in given:
        stage, _ = load_run(folder)
        joint, tokens = stage, int(stage.tokens)
    elif "controls" in given:
        stage = GistStage.load_from_checkpoint(path, **settings)
    elif "lensnet" in given:
        stage = LensStage.load_from_checkpoint(path, **settings)
    else:
        raise ValueError(f"{folder}: it is of no gist, lens, alternating or end_to_end stage")
    stage.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    lens = getattr(stage, "lens", None) or LensNet(stage.base.width, stage.gistnet.block_size).to(stage.device).eval()
    return Parts(
        name=folder.resolve().name if folder.resolve().parent.name == "runs" else "/".join(folder.resolve().parts[-2:]),
        base=stage.base.float(),
        base_name=given["base"]["name"],
        gistnet=stage.gistnet,
        lens=lens,
        allocator=dict(given.get("allocator", {})),
        horizon=given["horizon"],
        steps=checkpoint["global_step"],
        tokens=tokens,
        flops=checkpoint.get("callbacks", {}).get("Flops", {}).get("total"),
        stage=joint,
    )


@torch.no_grad()
def measure_run(run: Parts, documents: list[dict], blocks: list[dict], budgets: list[float]) -> dict:
    """Plain numbers of one run, see ``summarise``."""
    allocator = run.allocator or {"kind": "greedy"}
    progress = bar(f"{run.name}: windows")
    scores = measure_focus(run.base, run.gistnet, run.lens, allocator, documents, budgets, progress=progress)
    spans = measure(run.base, {"gistnet": run.gistnet}, blocks, run.horizon, with_controls=False)
    found = {"name": run.name, "steps": run.steps, "tokens": run.tokens, "flops": run.flops, "scores": scores}
    found["recovery_body"] = recovery_intervals(spans, ["gistnet"], BODY)["gistnet"]._asdict()
    if run.stage is not None:
        return found | lost(run.stage, documents)
    plain = [plain_nll(run.base, document["ids"].to(run.base.model.device)) for document in documents]
    mean = sum(plain) / len(plain)
    return found | {"nll_before": mean, "nll_after": mean, "adapter_parameters": 0}


@torch.no_grad()
def untouched(name: str, documents: list[dict], device) -> Tensor:
    """NLL of what follows each document's cursor, over the full context: [documents] nats per token."""
    base, out = BaseLM.from_pretrained(name, "float32").freeze().to(device), []
    for document in documents:
        ids = document["ids"].to(device)[None]
        hidden = base(base.embed(ids[:, :-1]), None)[0, document["cursor"] - 1 :]
        logits = base.logits(hidden).float()
        out.append(torch.nn.functional.cross_entropy(logits, ids[0, document["cursor"] :]).item())
    return torch.tensor(out, dtype=torch.float64)


def summarise(found: list[dict], full: Tensor) -> list[dict]:
    """Rows: a run at a budget, with the interval of its cost and of what it costs less than the first run."""
    first: FocusScores = found[0]["scores"]
    document, rows = torch.tensor(first.document), []
    for run in found:
        scores: FocusScores = run["scores"]
        for budget, nll in scores.nll.items():
            mine, theirs = (torch.tensor(s.nll[budget][LENS], dtype=torch.float64) for s in (scores, first))
            recency = torch.tensor(nll[RECENCY], dtype=torch.float64)
            told = [value for value in scores.telemetry[budget]["swap_rate"] if value == value]
            rows.append(
                {
                    "run": run["name"],
                    "steps": run["steps"],
                    "tokens": run["tokens"],
                    "flops": run["flops"],
                    "budget": budget,
                    "nll": float(mine.mean()),
                    "cost": mean_interval(document, mine - full)._asdict(),
                    "less": mean_interval(document, mine - theirs)._asdict(),
                    "recency": mean_interval(document, recency - full)._asdict(),
                    "own_full": float(torch.tensor(nll[FULL], dtype=torch.float64).mean() - full.mean()),
                    "recovery_body": run["recovery_body"],
                    "swap_rate": sum(told) / max(1, len(told)),
                    "base_lost": run["nll_after"] - run["nll_before"],
                    "adapter_parameters": run["adapter_parameters"],
                }
            )
    return rows


def sheet(rows: list[dict], budget: str) -> Sheet:
    """The table of one budget."""
    head = [
        "run",
        "steps",
        "tokens",
        "FLOPs",
        "cost",
        "than the first",
        "its recency",
        "recovery h>=4",
        "swaps",
        "base lost",
    ]
    lines = [
        [
            row["run"],
            f"{row['steps']:,}",
            "-" if row["tokens"] is None else f"{row['tokens']:,}",
            "-" if row["flops"] is None else f"{row['flops']:.1e}",
            _interval(row["cost"]),
            _interval(row["less"]),
            number(row["recency"]["point"]),
            number(row["recovery_body"]["point"], "{:.2f}"),
            number(row["swap_rate"], "{:.2f}"),
            number(row["base_lost"], "{:+.3f}"),
        ]
        for row in rows
        if row["budget"] == budget
    ]
    return Sheet(f"budget {budget} of the tokens; cost in nats per token above the untouched base LM", head, lines)


def _interval(value: dict) -> str:
    if value["low"] != value["low"]:
        return number(value["point"])
    return f"{value['point']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def study(folders: list[str], documents: int, tokens: int, budgets: list[float], path: str | None, blocks: int) -> dict:
    """Measure all runs on the same documents and blocks; -> ``rows`` of ``summarise``, and what was measured.

    Args:
        documents: held-out ones at most, of ``tokens`` tokens before the cursor.
        budgets: entries of a window over them.
        path: files; ``None``: the held-out tenth of the embedded text.
        blocks: about so many, of documents of a quarter of the tokens, for recovery.

    Raises:
        ValueError: runs of other base LMs or horizons; no text is that long.
    """
    runs = [parts_of(folder) for folder in folders]
    for what in ("base_name", "horizon"):
        if len(values := {run.name: getattr(run, what) for run in runs}) and len({*values.values()}) > 1:
            raise ValueError(f"the runs differ in {what}: {values}")
    first = runs[0]
    block, horizon = first.gistnet.block_size, first.horizon
    long = held_out(first.base, path, block, horizon, tokens + horizon, None)
    chosen = [
        {"ids": batch["ids"][0], "cursor": tokens, "domain": batch["domain"][0], "text": int(batch["document"][0])}
        for batch in long[:documents]
    ]
    spans = held_out(first.base, path, block, horizon, max(tokens // 4, 2 * block + horizon), blocks)
    full = untouched(first.base_name, chosen, first.base.model.device)
    found = [measure_run(run, chosen, spans, budgets) for run in runs]
    about = {"documents": len(chosen), "tokens": tokens, "horizon": horizon, "base": first.base_name}
    return about | {"full": float(full.mean()), "rows": summarise(found, full)}


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.studies.together", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--documents", type=int, default=100, help="held-out ones at most")
    parser.add_argument("--tokens", type=int, default=4096, help="T, before the cursor")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.25, 0.125], help="entries of a window over T")
    parser.add_argument("--blocks", type=int, default=400, help="about so many, for recovery")
    parser.add_argument("--path", help="files to measure on; without it the held-out embedded text")
    parser.add_argument("--out", type=Path, default=Path("runs/together"), help="stem of .md, .csv and .json")
    asked = parser.parse_args(arguments)
    quiet()
    try:
        found = study(asked.runs, asked.documents, asked.tokens, asked.budgets, asked.path, asked.blocks)
    except ValueError as error:
        print(f"megactx: {error}", file=sys.stderr)
        return 2
    sheets = [sheet(found["rows"], budget) for budget in dict.fromkeys(row["budget"] for row in found["rows"])]
    notes = [
        f"{found['documents']} held-out documents of {found['tokens']:,} tokens, H = {found['horizon']}; the untouched"
        f" base LM has {found['full']:.3f} nats per token there. Intervals: 95 %, paired bootstrap over documents.",
        "its recency: the cost of that run's cold starts. base lost: nats of its own NLL, without any windows.",
    ]
    show(sheets, notes)
    flat = [{k: v["point"] if isinstance(v, dict) else v for k, v in row.items()} for row in found["rows"]]
    write(asked.out, TITLE, sheets, notes, flat, found)
    print(f"Tables: {asked.out.with_suffix('.md')}, .csv and .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
