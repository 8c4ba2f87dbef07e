"""Real text and planted facts after 4k, 32k, 256k, a million tokens of history: what a session keeps, what it costs.

    python -m megactx.studies.length                                                 in minutes, the embedded models
    python -m megactx.studies.length --lengths 4096 --documents 60 --planted 0       the whole system at T = 4,096
    python -m megactx.studies.length --lengths 4096 32768 262144 1048576 --path TEXTS --filler MORE_TEXTS

The same documents end every history, so all comparisons are paired (``length_text``). The next 512 tokens of each are
scored under every policy at the same budgets (``length_policies``): full context while it fits, dropping, a session
with gists only, a session with LensNet. Then facts that were told far back (``length_planted``). Every document and
every case leaves a file in the output folder: the same command goes on with those that are missing.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from megactx.assets import resolve
from megactx.evaluation.planted import in_detail
from megactx.evaluation.table import Report, without_nan
from megactx.framework.bar import bar
from megactx.framework.files import write
from megactx.lm.identity import of_net
from megactx.memory import MegaContextTree
from megactx.memory.encoding import identity_of_base
from megactx.parts.read import load_lensnet
from megactx.runtime import Models, Settings, load_models

from . import length_planted as planted
from .length_policies import (
    DROP,
    EARNED,
    FOCUS,
    FULL,
    KEYS,
    RECALLS,
    RECENCY,
    Found,
    dropping,
    full_context,
    recalled,
    session,
)
from .length_report import report_of, summarise
from .length_text import Texts, gather, tree_of
from .study import Options, command, multiple

SETTINGS = "settings.json"
DOCUMENTS, CASES = "documents", "planted"


class Study:
    """One study: models, texts and settings, and what was measured so far."""

    def __init__(self, models: Models, texts: Texts, args: argparse.Namespace):
        self.models, self.texts, self.args = models, texts, args
        self.block, self.folder = models.gistnet.block_size, Path(args.out)
        there = {RECENCY: True, FOCUS: models.lensnet is not None, EARNED: args.earn, KEYS: args.keys}
        self.kinds = [kind for kind, wanted in there.items() if wanted]

    def placements(self, length: int) -> list[str]:
        """How positions can be at a length of history, the usual one first."""
        fits = length + self.args.tokens <= self.models.base.max_positions
        return [kind for kind in ("absolute", "rebased") if kind == "rebased" or fits and not self.args.rebased]

    def document(self, target: dict, known: MegaContextTree | None) -> dict:
        """Score a target at every length under every policy."""
        scored, rows = self.texts.scored(target), []
        for length in self.args.lengths:
            ids = self.texts.history(target, length)
            tree = tree_of(self.models, ids, known)
            about = {"length": length, "tree_bytes": tree.bytes()}
            for policy, budget, positions, found in self._policies(ids, tree, scored, self.placements(length)):
                nll = [part.mean().item() for part in found.nll.split(self.block)]
                own = {"policy": policy, "budget": budget, "positions": positions, "nll": nll}
                own |= {"mean": found.nll.mean().item(), "seconds": found.seconds / len(scored)}
                rows.append(about | own | found.telemetry)
        return {name: target[name] for name in ("text", "domain", "source")} | {"rows": rows}

    def case(self, case: dict, known: MegaContextTree | None) -> dict:
        """Ask a planted question at every length under every policy."""
        following, rows, gain = case["ids"][self.texts.near :], [], None
        for length in self.args.lengths:
            ids, needed = planted.placed(self.texts, case, length, self.block)
            tree = tree_of(self.models, ids, known)
            if gain is None:  # the first length is the shortest
                gain = planted.gain(self.models, tree, needed, following, min(self.args.budgets))
            usual = self.placements(length)[:1]
            for policy, budget, positions, found in self._policies(ids, tree, following, usual):
                detail = None if found.context is None else in_detail(found.context, [needed])
                if policy == DROP:
                    detail = needed * self.block >= length - (budget - self.block)
                own = {"policy": policy, "budget": budget, "positions": positions, "mean": found.nll.mean().item()}
                rows.append({"length": length, "found": detail} | own)
        return {"kind": case["kind"], "domain": case["domain"], "gain": gain, "rows": rows}

    def _policies(self, ids, tree, scored, placements: list[str]) -> Iterator[tuple[str, int | None, str, Found]]:
        for policy, budget, positions, found in self._shown(ids, tree, scored, placements):
            yield policy, budget, positions, found
            if self.args.recall and policy in RECALLS:
                within = budget if policy == DROP else None
                yield RECALLS[policy], budget, positions, recalled(found, ids, scored, within)

    def _shown(self, ids, tree, scored, placements: list[str]) -> Iterator[tuple[str, int | None, str, Found]]:
        if len(ids) + len(scored) <= self.models.base.max_positions:
            yield FULL, None, "absolute", full_context(self.models, ids, scored)
        for budget in self.args.budgets:
            for positions in placements:
                yield DROP, budget, positions, dropping(self.models.base, ids, scored, budget, self.block, positions)
                for kind in self.kinds:
                    settings = (kind, budget, positions, self.args.limit, self.args.refocuses, self.args.keys)
                    yield kind, budget, positions, session(self.models, tree, scored, *settings)

    def measure(self) -> None:
        """Measure what has no file yet, one domain after the other: each needs the tree of its filler."""
        questions = planted.cases(self.texts, self.models.base.tokenizer, self.args.planted, self.block, self.args.seed)
        work = [(DOCUMENTS, n, target) for n, target in enumerate(self.texts.targets)]
        work += [(CASES, n, case) for n, case in enumerate(questions)]
        work = [item for item in work if not self._path(*item[:2]).exists()]
        work.sort(key=lambda item: (item[2]["domain"], item[0] == CASES, item[1]))
        domain, known = None, None
        for what, number, item in bar("documents and cases")(work):
            if item["domain"] != domain:
                domain, known = item["domain"], None
                if domain in self.texts.fillers:
                    known = tree_of(self.models, self.texts.fillers[domain], None)
            with torch.no_grad():
                found = self.document(item, known) if what == DOCUMENTS else self.case(item, known)
            write(self._path(what, number), json.dumps(without_nan(found)))

    def measured(self, what: str, count: int) -> list[dict]:
        """The first ``count`` documents or cases, of which some may be missing: not every fact can be planted."""
        paths = (self._path(what, number) for number in range(count))
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def about(self) -> dict:
        """What decides about the figures."""
        models, names = self.models, ("tokens", "limit", "lengths", "budgets", "documents", "refocuses", "seed")
        return {name: getattr(self.args, name) for name in names} | {
            "models": models.name,
            "base": identity_of_base(models.base),
            "gistnet": of_net(models.gistnet),
            "lensnet": None if models.lensnet is None else of_net(models.lensnet),
            "text": self.texts.fingerprint,
            "block_size": self.block,
            **({"earn": "what comes again, too"} if self.args.earn else {}),
            **({"recall": True} if self.args.recall else {}),
            **({"rebased": True} if self.args.rebased else {}),
            **({"keys": self.args.keys, "keys_of": of_net(models.keys)} if self.args.keys else {}),
        }

    def claim(self) -> None:
        """Go on in a folder of this very study, or begin one.

        Raises:
            ValueError: the folder holds a study with other settings.
        """
        path, about = self.folder / SETTINGS, self.about()
        if path.exists():
            old = json.loads(path.read_text())
            if wrong := [f"{name}={old.get(name)}, not {now}" for name, now in about.items() if old.get(name) != now]:
                raise ValueError(f"--out={self.folder}: it holds a study with other settings: {'; '.join(wrong)}")
            return
        write(path, json.dumps(about, indent=1))

    def _path(self, what: str, number: int) -> Path:
        return self.folder / what / f"{number:04d}.json"


def options(given: Options) -> None:
    given.add("--model", help="a run folder or an exported folder (default: the embedded models)")
    given.add("--lensnet", help="folder of a LensNet to use in place of the model's own")
    given.path("files with the target documents (default: the held-out part of the embedded text)")
    given.add("--filler", help="files with what stands before them (default: the same source, without the targets)")
    given.add("--domains", nargs="+", help="of the text (default: all)")
    given.add("--lengths", type=int, nargs="+", default=[4096, 32768], help="of the history")
    given.add("--budgets", type=int, nargs="+", default=[512, 1024], help="entries of a window")
    given.number("tokens", 512, "that are scored behind each history")
    given.number("documents", 6, "at most")
    given.number("planted", 12, "cases with a planted fact", least=0)
    given.add("--limit", type=int, help="positions of rebased histories stay below it (default: half of the base's)")
    given.number("refocuses", 0, "more ones at a cold start than a session makes", least=0)
    given.add("--earn", action="store_true", help="measure sessions that read the newest tokens unless more is earned")
    again = "measure each of full context, dropping and --earn also where what came before tells what comes next"
    given.add("--recall", action="store_true", help=again)
    given.number("keys", 0, "measure sessions that read so many blocks too which their keys find, at most", least=0)
    given.add("--rebased", action="store_true", help="measure no absolute positions, where the base takes them")
    given.number("seed", 0, "of the filler's order and the planted facts", least=0)
    given.add("--out", default="runs/length", help="folder of the results, gone on with")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Measure what has no file yet in the output folder, and report on all of it.

    Raises:
        ValueError: a setting that is not allowed, or too little text.
    """
    logging.basicConfig(format="%(message)s")
    models = load_models(args.model, setting="--model")
    if models.gistnet is None:
        raise ValueError(f"--model={args.model}: there is no GistNet in it")
    if args.lensnet:
        lensnet = load_lensnet(resolve(args.lensnet, "--lensnet"), models.gistnet)
        models = replace(models, lensnet=lensnet.to(models.base.model.device))
    if args.keys and models.keys is None:
        raise ValueError(
            f"--keys={args.keys} is not allowed: these models have no keys; megactx.studies.keys trains some"
        )
    models = replace(models, keys=models.keys.ready() if args.keys else None)
    check(args, models)
    near, longest = args.lengths[0], args.lengths[-1]
    sizes = (near, args.tokens, longest, args.documents, args.domains, args.seed)
    here = Study(models, gather(models.base.tokenizer, args.path, args.filler, *sizes), args)
    here.claim()
    here.measure()
    about = here.about() | {"documents": len(here.texts.targets), "learned": here.texts.learned}
    about |= {"device": models.base.model.device.type, "most": models.base.max_positions, "filler": args.filler}
    cases = here.measured(CASES, args.planted)
    yield here.folder / "length", report_of(summarise(here.measured(DOCUMENTS, args.documents), cases), cases, about)


def check(args: argparse.Namespace, models: Models) -> None:
    """Bring the settings into order.

    Raises:
        ValueError: one that is not allowed.
    """
    block, most = models.gistnet.block_size, models.base.max_positions
    args.lengths, args.budgets = sorted({*args.lengths}), sorted({*args.budgets})
    for length in args.lengths:
        multiple("lengths", length, block, least=2)
    multiple("tokens", args.tokens, block)
    least = args.budgets[-1] + 2 * block  # entries of a window, and room for new tokens
    if args.limit is None:
        args.limit = most // 2
    elif not least <= args.limit <= most:
        raise ValueError(f"--limit={args.limit} is not allowed: {least} for these --budgets, to {most} (the base)")
    for budget in args.budgets:
        Settings(budget).fitted(block, args.limit).check(block, args.limit)
        if budget > args.lengths[0]:
            raise ValueError(f"--budgets={budget} is not allowed: at most {args.lengths[0]}, the shortest history")


main = command("length", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
