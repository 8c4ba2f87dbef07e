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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megactx.evaluation.bootstrap import recovery_intervals
from megactx.evaluation.focus import focused
from megactx.evaluation.measure import measure
from megactx.focus.lensnet import LensNet
from megactx.focus.values import continuation_nll
from megactx.framework.bar import bar
from megactx.framework.command_line import run
from megactx.framework.run.resume import best, read
from megactx.gist import GistNet
from megactx.gist.scoring import nll
from megactx.lm import BaseLM
from megactx.lm.adapters import adapters_of
from megactx.memory import MegaContextTree, WorkingContext
from megactx.stages.export import load_run
from megactx.stages.gist import GistStage
from megactx.stages.lens import LensStage

from .tables import show, usable, write
from .together_plot import plot
from .together_report import sheet, summarise
from .trained import held_out, quiet

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
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such run folder")
    path = best(folder)
    checkpoint = read(path)
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
    stage.to("cuda" if torch.cuda.is_available() else "cpu").eval()
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
    device = base.model.device
    found = []
    for document in documents:
        ids = document["ids"].to(device)[None]
        found.append(nll(base, base(base.embed(ids[:, :-1]), None)[0], ids[0, 1:]).cpu())
    return found


def behind(document: dict, values: Tensor) -> float:
    """Mean over what follows the cursor."""
    return values[document["cursor"] - 1 :].mean().item()


@torch.no_grad()
def measure_run(
    run: Parts, documents: list[dict], blocks: list[dict], horizon: int, budgets: list[float], full: list[Tensor]
) -> dict:
    """Plain numbers of one run, see ``summarise``.

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
    found = {}
    for share in budgets:
        for document in documents:
            cut = document["cursor"] - int(share * document["cursor"])
            near = {"ids": document["ids"][cut:], "cursor": document["cursor"] - cut}
            found.setdefault(f"{share:g}", []).append(behind(near, plain(base, [near])[0]))
    return found


def study(folders: list[str], documents: int, tokens: int, budgets: list[float], path: str | None, blocks: int) -> dict:
    """Measure all runs on the same documents and blocks; -> ``rows`` of ``summarise``, and what was measured.

    Args:
        documents: held-out ones at most, of ``tokens`` tokens before the cursor.
        budgets: entries of a window over them.
        path: files; ``None``: the held-out tenth of the embedded text.
        blocks: about so many, of documents of a quarter of the tokens, for recovery.

    Raises:
        ValueError: runs of other base LMs or blocks of other sizes; no text is that long.
    """
    for name, value, least in (("documents", documents, 1), ("tokens", tokens, 256), ("blocks", blocks, 1)):
        if value < least:
            raise ValueError(f"--{name}={value} is not allowed: at least {least}")
    for share in budgets:
        if not 0 < share <= 1:
            raise ValueError(f"--budgets={share:g} is not allowed: above 0, and at most 1, the whole text")
    runs = [parts_of(folder) for folder in folders]
    for what in ("base_name", "block_size"):
        if len({*(values := {run.name: getattr(run, what) for run in runs}).values()}) > 1:
            raise ValueError(f"the runs differ in {what}: {values}")
    first = runs[0]
    block, horizon = first.block_size, first.horizon  # others may have learned from farther
    long = held_out(first.base, path, block, horizon, tokens + horizon, None)
    chosen = [
        {"ids": batch["ids"][0], "cursor": tokens, "domain": batch["domain"][0], "text": int(batch["document"][0])}
        for batch in long[:documents]
    ]
    spans = held_out(first.base, path, block, horizon, max(tokens // 4, 2 * block + horizon), blocks)
    untouched = BaseLM.from_pretrained(first.base_name, "float32").freeze().to(first.base.model.device)
    every = plain(untouched, chosen)
    dropped = dropping(untouched, chosen, budgets)
    found = [measure_run(run, chosen, spans, horizon, budgets, every) for run in runs]
    full = torch.tensor([behind(*pair) for pair in zip(chosen, every, strict=True)], dtype=torch.float64)
    text = torch.tensor([document["text"] for document in chosen])
    about = {"documents": len(chosen), "tokens": tokens, "horizon": horizon, "base": first.base_name}
    return about | {"full": float(full.mean()), "rows": summarise(found, full, text, dropped)}


def command(asked: argparse.Namespace) -> None:
    """Measure, show and write, with a picture."""
    quiet()
    usable(asked.out.parent)
    found = study(asked.runs, asked.documents, asked.tokens, asked.budgets, asked.path, asked.blocks)
    sheets = [sheet(found["rows"], budget) for budget in dict.fromkeys(row["budget"] for row in found["rows"])]
    notes = [
        f"{found['documents']} held-out documents of {found['tokens']:,} tokens, H = {found['horizon']}; the untouched"
        f" base LM has {found['full']:.3f} nats per token there. Means over seeds; intervals: 95 %, paired bootstrap"
        " over documents.",
        "its recency: the cost of that run's cold starts. base lost: nats of its own NLL, without any windows.",
    ]
    show(sheets, notes)
    flat = [{k: v["point"] if isinstance(v, dict) else v for k, v in row.items()} for row in found["rows"]]
    write(asked.out, TITLE, sheets, notes, flat, found)
    picture = asked.out.with_name(f"{asked.out.name}.png")
    plot(picture, found["rows"])
    print(f"Tables: {asked.out}.md, .csv and .json   picture: {picture}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.studies.together", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="run folders of gist, lens, alternating or end_to_end stages"
    )
    parser.add_argument("--documents", type=int, default=100, help="held-out ones at most (default 100)")
    parser.add_argument("--tokens", type=int, default=4096, help="T, before the cursor (default 4096)")
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.25, 0.125],
        help="entries of a window over T (default 0.25 0.125)",
    )
    parser.add_argument("--blocks", type=int, default=400, help="about so many, for recovery (default 400)")
    parser.add_argument("--path", help="files to measure on; without it the held-out embedded text")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/together"),
        help="stem of .md, .csv, .json and .png (default runs/together)",
    )
    return run(command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
