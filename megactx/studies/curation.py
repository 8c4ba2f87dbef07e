"""What curation frees and what it costs: one long history before and after each policy, beside two controls.

    python -m megactx.studies.curation --path TEXTS --tokens 1000000
    python -m megactx.studies.curation --configs default unread 'low_information,policies.entropy.share=0.5'

Facts are planted in the old part of a history. Sessions go on with it, and windows open the facts that every second
question asks for. Then each config of the group ``curation`` is applied to a copy, and so are two controls: random
spans of as many bytes as the first config takes, and all that is old, whatever was opened.

A question is answered where its fact, read in full beside the newest text as keys that find it would have it read,
lowers the NLL of the answer by 0.5 nats per token. What is gone cannot be read, so it lowers nothing.

N tokens of the history, K of a block, A of an answer.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megactx.apps.command_line import curation_of
from megactx.data.files import Files
from megactx.data.planted import BLOCKS, KINDS, plant
from megactx.evaluation import curation as evaluation
from megactx.evaluation.bootstrap import mean_interval, wilson
from megactx.evaluation.planted import USABLE
from megactx.evaluation.table import Report, Table, pivot
from megactx.focus import moves
from megactx.focus.earned import Found, earned
from megactx.framework.bar import bar
from megactx.memory import MegaContextTree, WorkingContext, storage
from megactx.memory.archive import RECENT
from megactx.memory.curation import Curated
from megactx.parts.models import Models, load_models
from megactx.runtime import Controller, Settings

from .study import Options, command, usable

BEFORE, RANDOM, ALL = "before", "random spans of the same bytes", "all that is old"
NEAR, TRIES, PIECE, PROTECTED, SPAN = 2048, 20, 64, 20, 4096
LEGEND = (
    "MB: what tokens and gists take, and the archive. dNLL: of the text that follows the history, nats per token,"
    " above before. opened, others: planted questions answered before that are answered after, of those whose fact a"
    " window had opened and of the rest. kept: of the blocks that the last sessions opened, how many are there still."
    " protected, restored: 1 where every protected block is there, and where restore brings all back bit for bit."
    " Brackets: 95 %, bootstrap over pieces of 64 tokens, or Wilson."
)


def options(given: Options) -> None:
    given.add("model", nargs="?", metavar="MODEL", help="base, GistNet and LensNet; without it the embedded models")
    given.path("files of the history; without it the embedded text")
    given.number("tokens", 1_000_000, "tokens of the history", least=3 * RECENT)
    given.number("budget", 1024, "entries of a window", least=512)
    given.number("sessions", 8, "sessions over the history, of 256 tokens each", least=2)
    given.number("planted", 100, "planted questions", least=4)
    given.number("continuation", 1024, "tokens that follow and are scored", least=2 * PIECE)
    given.number("measured", 500, "blocks whose dNLL is measured for the configs that ask for it", least=0)
    given.number("seed", 0, "of places and facts", least=0)
    given.add("--configs", nargs="+", default=["default", "unread", "budget", "low_information"], help="of the group")
    given.add("--out", type=Path, default=Path("curation"), help="folder of the tables")


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Build the history, then measure it before and after each config.

    Raises:
        ValueError: a number or a config that is not allowed, no LensNet, or too little text.
    """
    stem = usable(args.out) / "curation"
    configs = {text: curation_of(text) for text in args.configs}
    models = load_models(args.model, setting="MODEL")
    if models.gistnet is None or models.lensnet is None:
        raise ValueError(f"MODEL={args.model}: the study needs a GistNet and a LensNet")
    about = {name: getattr(args, name) for name in ("path", "tokens", "budget", "sessions", "planted", "seed")}
    with tempfile.TemporaryDirectory() as scratch:
        history = History(models, Path(scratch) / "history", args)
        rows = {BEFORE: history.measured(history.folder)}
        yield stem, report(rows, about | {"model": models.name})
        plans = {}
        for name, settings in configs.items():
            tree, named = Curated(history.folder, settings.floor), dict(settings.named)
            if "budget" in named:
                named["budget"] = {"megabytes": tree.bytes / 2e6}  # half of what is there
            plans[name] = tree.plan(named)
            tree.file.close()
        plans[RANDOM] = history.random_plan(sum(a["bytes"] for a in plans[args.configs[0]]["actions"]))
        plans[ALL] = history.plan_of(lambda tree: tree.may)
        for name, plan in bar("policies")(list(plans.items())):
            place = Path(scratch) / "copy"
            shutil.copytree(history.folder, place)
            rows[name] = history.after(place, plan, forget=name in (RANDOM, ALL))
            shutil.rmtree(place)
            yield stem, report(rows, about | {"model": models.name})


class History:
    """A long history on disk with planted facts and sessions over it.

    Args:
        folder: of its tree.
    """

    def __init__(self, models: Models, folder: Path, args: argparse.Namespace):
        self.models, self.folder, self.args = models, folder, args
        self.block = models.gistnet.block_size
        settings = Settings(budget=args.budget)
        self.focus = Controller(models, settings)
        self.recency = Controller(models, Settings(budget=args.budget, megacontext="recency"))
        self.rng = np.random.default_rng(args.seed)
        more = args.continuation + 256 * args.sessions
        text = tokens_of(models, args.path, args.tokens + more)
        history, self.following = text[: args.tokens].clone(), text[args.tokens + 256 * args.sessions :]
        self.cases = self._planted(history)
        tree = self.focus.build_tree(history[None])
        old = max(1, (args.tokens - RECENT) // self.block)
        self.protected = torch.from_numpy(self.rng.choice(np.arange(1, old), PROTECTED, replace=False))
        stream = self.focus.stream(tree=tree)
        between = text[args.tokens : args.tokens + 256 * args.sessions]
        for session in bar("sessions")(between.split(256)):
            before = tree.levels[1].whole("opened")[0].clone()
            stream.append(session[None], score=True)
        now = tree.levels[1].whole("opened")[0]
        self.last = (now[: len(before)] > before).nonzero()[:, 0]  # what the last session opened
        for case in self.cases[::2]:
            opened(tree, args.budget - 256, case["needed"])
        tree.save(folder)
        self.open = tree.levels[1].whole("opened")[0] > 0
        tree.cache.close()
        if args.measured:
            curated = Curated(folder)
            numbers = evaluation.sample(curated, args.measured, args.seed)
            evaluation.measure(curated, models.base, models.gistnet, numbers, bar("measured"))
            curated.file.close()

    def _planted(self, history: Tensor) -> list[dict]:
        """Facts, put into the old part of the history in place; of each its question, answer and blocks."""
        k, tokenizer, out = self.block, self.models.base.tokenizer, []
        end = (len(history) - RECENT - NEAR) // k
        free = [*self.rng.permutation(np.arange(1, end // SLOT)) * SLOT]
        for number in range(self.args.planted):
            for _ in range(TRIES):
                at, other = (int(n) for n in self.rng.integers(0, len(history) - NEAR - k, 2))
                document = {"ids": history[at : at + NEAR].clone(), "cursor": NEAR}
                others = [history[other : other + NEAR].numpy()]
                kind = KINDS[number % len(KINDS)]
                if len(free) and (case := plant(document, others, tokenizer, kind, k, self.rng)):
                    first, told = case["told"][0]
                    start = int(free.pop()) * k
                    history[start : start + len(told)] = told
                    needed = [n - first // k + start // k for n in case["needed"]]
                    asked, answer = case["ids"][NEAR - case["cue"] : NEAR], case["ids"][NEAR:]
                    out.append({"asked": asked, "answer": answer, "needed": needed, "kind": kind})
                    break
        if len(out) < 4:
            raise ValueError(f"--tokens={len(history)}: only {len(out)} facts could be planted, at least 4 are needed")
        return out

    def plan_of(self, choose) -> dict:
        """A plan that compacts the blocks that ``choose`` says, bool [N]."""
        tree = Curated(self.folder)
        edges = torch.nn.functional.pad(choose(tree).int(), (1, 1)).diff()
        spans = zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True)
        actions = [
            {"start": first * tree.size, "stop": end * tree.size, "action": "compact", "floor": 1, "reason": "control"}
            | {"bytes": (end - first) * tree.freed}
            for first, end in spans
        ]
        tree.file.close()
        return {"format": 1, "tokens": tree.tokens, "actions": actions}

    def random_plan(self, size: int) -> dict:
        """Spans at random places, of so many bytes in all."""

        def choose(tree: Curated) -> Tensor:
            each = SPAN // tree.size
            rank = torch.from_numpy(self.rng.permutation(-(-len(tree.may) // each)))
            order = rank.repeat_interleave(each)[: len(tree.may)].argsort(stable=True)
            order = order[tree.may[order]][: size // tree.freed]
            return torch.zeros_like(tree.may).index_fill_(0, order, True)

        return self.plan_of(choose)

    def after(self, place: Path, plan: dict, forget: bool) -> dict:
        """Apply a plan to a copy, and measure it.

        Args:
            forget: it may take what was opened, too.
        """
        blocks = torch.arange(len(self.open))
        if forget:
            self._write(place, blocks, opened=torch.zeros_like(blocks))
        self._write(place, self.protected, protected=torch.ones(PROTECTED, dtype=torch.bool))  # since the plan
        tree = Curated(place)
        whole = bodies(tree)
        tree.apply(plan)
        tree.file.close()
        self._write(place, self.protected, protected=torch.zeros(PROTECTED, dtype=torch.bool))  # windows may show them
        found = self.measured(place)
        tree = Curated(place)
        floor = tree.floor
        found["kept"] = (floor[self.last] == 0).double() if len(self.last) else torch.ones(1)
        found["protected"] = bool((floor[self.protected] == 0).all())
        tree.restore(0, tree.tokens)
        tree.file.close()
        tree = Curated(place)
        found["restored"] = all(map(torch.equal, bodies(tree), whole)) and not tree.floor.any()
        tree.file.close()
        return found

    def measured(self, folder: Path) -> dict:
        """``nll`` of the text that follows, [pieces], ``gain`` of each planted fact in nats per token, and bytes."""
        tree = Curated(folder)
        sizes = tree.file.sizes()
        tree.file.close()
        tree = self._tree(folder)
        nll = self.focus.stream(tree=tree).append(self.following[None], score=True)[0]
        tree.cache.close()
        tree, gains = self._tree(folder), []
        for case in bar("questions")(self.cases):
            ids = torch.cat([case["asked"], case["answer"]])
            closed, fine = (
                self._asked(tree, needed, ids)[-len(case["answer"]) :].mean().item() for needed in ([], case["needed"])
            )
            gains.append(closed - fine)
        tree.cache.close()
        return {"nll": nll[: len(nll) // PIECE * PIECE].view(-1, PIECE).mean(1), "gain": torch.tensor(gains)} | sizes

    def _write(self, folder: Path, blocks: Tensor, **facts: Tensor) -> None:
        """Change facts about blocks [M] of a saved tree."""
        tree = self._tree(folder)
        tree.levels[1].write(torch.zeros_like(blocks), blocks, **facts)
        tree.save(folder)
        tree.cache.close()

    def _tree(self, folder: Path) -> MegaContextTree:
        return MegaContextTree.load(folder, self.models.gistnet, self.models.base)

    def _asked(self, tree: MegaContextTree, needed: list[int], ids: Tensor) -> Tensor:
        """NLL of ids [T] behind the newest text and, where they are there, blocks in full, as keys that find them would
        have them read, [T]."""
        stream, there = self.recency.stream(tree=tree), int(tree.lengths[0])
        context = WorkingContext.recency(tree, self.args.budget - 256)
        context.budget = self.args.budget
        stream.restore(context)
        blocks = torch.tensor(needed, dtype=torch.long)
        found = blocks[tree.openable(torch.zeros_like(blocks), torch.ones_like(blocks), blocks)].tolist()
        protected, held = self.recency.settings.protected, Found([found], [len(found)], [None])

        def shown(context: WorkingContext, *_question):
            return earned(context, self.args.budget, moves(context, protected), None, 0.0, protected, held)[:2]

        stream.focus.shown = shown
        nll = stream.append(ids[None], score=True)[0]
        storage.shorten(tree, there)  # the next question does not see this answer
        return nll


SLOT = max(BLOCKS.values()) + 1  # blocks of one fact, apart from the next


def opened(tree: MegaContextTree, budget: int, needed: list[int]) -> None:
    """A window of the newest text within ``budget`` entries opens the way down to blocks, as far as the tree has it."""
    context = WorkingContext.recency(tree, budget)
    context.budget = budget + 256
    for block in needed:
        while True:
            start, stop = context.starts()[0], context.starts()[0] + context.widths()[0]
            at = block * tree.block_size
            column = int(((start <= at) & (at < stop)).nonzero()[0, 0])
            lod, index = context.lod[0, column : column + 1], context.index[0, column : column + 1]
            if int(lod) == 0 or not bool(tree.openable(torch.zeros_like(lod), lod, index)):
                break
            context.expand(column)


def bodies(tree: Curated) -> list[Tensor]:
    """Tokens and gists of all levels."""
    return [level.whole(name).clone() for level in tree.levels for name in level.parts()["body"]]


def tokens_of(models: Models, path: str | None, count: int) -> Tensor:
    """The first tokens of texts, [count].

    Raises:
        ValueError: there are fewer.
    """
    from megactx.data.embedded import Embedded

    found, there = [torch.tensor([models.base.tokenizer.bos_token_id or 0])], 1
    for row in (Files(path) if path else Embedded()).load():
        ids = models.base.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        found.append(torch.tensor(ids, dtype=torch.long))
        there += len(ids)
        if there >= count:
            return torch.cat(found)[:count]
    raise ValueError(f"--path={path}: {there:,} tokens are there, {count:,} are needed")


def report(rows: dict[str, dict], about: dict) -> Report:
    """As tables."""
    table, before = Table(), rows[BEFORE]
    answered = before["gain"] >= USABLE
    chosen = torch.arange(len(answered)) % 2 == 0
    for name, row in rows.items():
        pieces = torch.arange(len(row["nll"]))
        for what in ("tokens", "gists", "archive"):
            table.add(what, row[what] / 1e6, carrier=name)
        if name == BEFORE:
            table.add("nll", mean_interval(pieces, row["nll"]), carrier=name)
        else:
            table.add("dnll", mean_interval(pieces, row["nll"] - before["nll"]), carrier=name)
            table.add("kept", float(row["kept"].mean()), carrier=name)
            for what in ("protected", "restored"):
                table.add(what, float(row[what]), carrier=name)
        for what, mine in (("opened", chosen), ("others", ~chosen)):
            of = answered & mine
            if of.any():
                share = wilson(int((row["gain"][of] >= USABLE).sum()), int(of.sum()))
                table.add(what, share, carrier=name, n=int(of.sum()))
    columns = [("tokens MB", "tokens", ".2f"), ("gists MB", "gists", ".2f"), ("archive MB", "archive", ".2f")]
    columns += [
        ("NLL", "nll", ".3f"),
        ("dNLL", "dnll", "+.4f"),
        ("opened", "opened", ".2f"),
        ("others", "others", ".2f"),
    ]
    columns += [("kept", "kept", ".3f"), ("protected", "protected", ".0f"), ("restored", "restored", ".0f")]
    told = f"{int(answered.sum())} of {len(answered)} questions are answered before"
    title = f"{about['tokens']:,} tokens, {about['sessions']} sessions; {told}"
    return Report("Curation", table, [pivot(title, table, columns, heading="policy")], LEGEND, about=about)


main = command("curation", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
