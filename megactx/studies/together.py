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
from pathlib import Path

import torch
from torch import Tensor

from megactx.evaluation.bootstrap import recovery_intervals
from megactx.evaluation.focus import focused
from megactx.evaluation.measure import measure
from megactx.evaluation.metrics import BODY
from megactx.evaluation.table import Report
from megactx.focus.edit_labels import continuation_nll
from megactx.focus.lensnet import LensNet
from megactx.framework.bar import bar
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.adapters import adapters_of
from megactx.lm.chunked_head import nll
from megactx.memory import MegaContextTree, WorkingContext
from megactx.stages.export import load_run
from megactx.stages.gist import GistStage
from megactx.stages.lens import LensStage

from .study import Options, command, usable
from .together_report import report_of, summarise
from .trained import base_of, checkpoint_of, device, held_out, same


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
    found = {}
    for share in budgets:
        for document in documents:
            cut = document["cursor"] - int(share * document["cursor"])
            near = {"ids": document["ids"][cut:], "cursor": document["cursor"] - cut}
            found.setdefault(f"{share:g}", []).append(behind(near, plain(base, [near])[0]))
    return found


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
