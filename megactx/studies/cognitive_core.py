"""A core whose facts lie in a tree: does its answer follow the tree? (method 22)

    python -m megactx.studies.cognitive_core --model smollm2 --questions 40 --policies needed bridge newest
    python -m megactx.studies.cognitive_core --model RUN/model tiny-base

Generated facts are told in real prose, and stand in a knowledge tree on disk. A policy opens blocks of it into a window
of ``--budget`` tokens, a question stands behind, and the core says which of V values it thinks likeliest. Then one more
fact for each question is appended to the tree; and in another tree each fact says something else. With several models
all of them read the windows of one tree, which is that of the first. Every answer is a line of ``answers.jsonl``: the
same command goes on with those that are missing, and so does one with more questions, policies or models.
"""

import argparse
import functools
import hashlib
import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megactx.data.documents import VALIDATION
from megactx.data.embedded import Embedded
from megactx.data.files import NARRATIVE, Files
from megactx.data.knowledge import Fact, Knowledge, Question, asked_ids, blocks, encoded, sentences, tell, value_ids
from megactx.data.questions import around
from megactx.data.tokenizer import tokenizer_hash
from megactx.evaluation import rivals
from megactx.evaluation.bootstrap import mean_interval, wilson
from megactx.evaluation.knowledge import ckri, value_nll
from megactx.evaluation.rivals import BLOCK, SINK, Asked
from megactx.evaluation.table import Report, Table, pivot
from megactx.framework.bar import bar
from megactx.framework.files import write
from megactx.gist.parts import find, names
from megactx.lm.identity import of_weights
from megactx.memory import MegaContextTree
from megactx.parts.models import Models, load_models

from .study import Options, at_least, command, usable

TOLD, UPDATED, POISONED, TWO_HOPS = "as told", "updated", "poisoned", "two hops"
NOTHING = "no knowledge"
MEGABYTES = 2.0  # of the embedded text: its sentences are read in turn, and again from the first
LEGEND = (
    "Accuracy among the V values of the attribute. in window: answers whose facts were in the window. provenance: of"
    " right answers, those that lose most where the block is taken out that tells the fact; by chance: what a random"
    " block of the window would get. without: the same window without the needed blocks. CKRI: (L_drop - L_full) /"
    " L_full, L the NLL of the right answer in nats. Brackets: 95 %, Wilson, or bootstrap over questions."
)


def options(given: Options) -> None:
    given.add("--model", nargs="+", default=["tiny-base"], help="cores: folders, GGUF files, or names of assets")
    given.number("entities", 100, "people that facts are told of", least=4)
    given.number("between", 2, "sentences of prose between two facts, on average", least=0)
    given.number("questions", 40, "of each kind, at most")
    given.add("--provenance", type=int, help="of these, questions whose blocks are taken out one by one (default all)")
    given.number("budget", 256, "tokens of the tree in a window", least=SINK + 4 * BLOCK)
    given.number("seed", 0, "of facts, prose and questions", least=0)
    given.add("--policies", nargs="+", default=["needed", "bridge"], help="of " + ", ".join(names(rivals)))
    given.add("--keys", type=Path, help="folder of keys for the policy of that name (default: the first model's own)")
    given.add("--plain", action="store_true", help="no chat template, where a core has one")
    given.path("prose between the facts; without it the embedded text")
    given.add("--out", type=Path, default=Path("cognitive_core"), help="folder of the tables and the trees")


class Mean:
    """The mean of a block: gists for the tree of a base LM that has no GistNet. Nobody reads them here."""

    block_size = BLOCK

    def __init__(self, width: int):
        self.width = width

    def encode_block(self, embeddings: torch.Tensor, seen=None) -> torch.Tensor:  # [E, K, D] -> [E, D]
        return embeddings.mean(dim=1)

    def offset_in(self, tokens: int) -> int:
        return tokens // 2


class Store:
    """A knowledge tree in a folder, and where in it each fact is told.

    Args:
        models: whose tokenizer, embeddings and GistNet the tree is made with.

    Raises:
        ValueError: their GistNet has blocks of another size than the policies open.
    """

    def __init__(self, folder: Path, models: Models):
        self.folder, self.models = folder, models
        self.encoder = models.gistnet or Mean(models.base.width)
        if self.encoder.block_size != BLOCK:
            size = self.encoder.block_size
            raise ValueError(f"--model={models.name}: its GistNet has blocks of {size} tokens, policies open {BLOCK}")
        self.spans: dict[tuple, range] = {}

    def write(self, text: str, facts: list[Fact]) -> None:
        """A new tree in place of one that may be there."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        ids, self.spans = encoded(text, facts, self.models.base.tokenizer)
        device = self.models.base.model.device
        tree = MegaContextTree.from_tokens(torch.from_numpy(ids)[None].to(device), self.encoder, self.models.base)
        tree.save(self.folder)
        tree.cache.close()

    def append(self, text: str, facts: list[Fact]) -> None:
        """Open the tree, append a text, and save what has changed."""
        ids, spans = encoded(text, facts, self.models.base.tokenizer)
        tree = self.open()
        before = int(tree.lengths[0])
        tree.append(torch.from_numpy(ids)[None])
        tree.save(self.folder)
        tree.cache.close()
        self.spans |= {key: range(span.start + before, span.stop + before) for key, span in spans.items()}

    def open(self) -> MegaContextTree:
        device = self.models.base.model.device
        return MegaContextTree.load(self.folder, self.encoder, self.models.base, device=device)


class Core:
    """A base LM that answers from windows of somebody's tree.

    Args:
        models: of the core.
        tokenizer: of the tree. Where it is another one than the core's, the core reads the text.
    """

    def __init__(self, models: Models, tokenizer, plain: bool):
        self.base, self.name, self.theirs = models.base, models.name, tokenizer
        own = self.base.tokenizer
        self.same = tokenizer_hash(own) == tokenizer_hash(tokenizer)
        self.first, self.behind = around(own, plain)

    @functools.cached_property
    def identity(self) -> str:
        """Of the weights, the tokenizer and what stands around a window."""
        about = [of_weights(self.base), tokenizer_hash(self.base.tokenizer), self.first, self.behind]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def _ids(self, text: str) -> list[int]:
        return self.base.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def window(self, kept: list[int], question: Question) -> list[int]:
        """Ids of what is kept of the tree -> those of the window, up to the answer."""
        known = kept if self.same else self._ids(self.theirs.decode(kept))
        asked, prefix = asked_ids(self.base.tokenizer, question)
        return [*self.first, *known, *asked, *self.behind, *prefix]

    def nll(self, kept: list[int], question: Question, values: tuple[str, ...] | None = None) -> torch.Tensor:
        """NLL of each value [V], of those of the question if no others are named."""
        found = value_ids(self.base.tokenizer, values or question.values)
        return value_nll(self.base, self.window(kept, question), found)


@dataclass
class Window:
    """What a policy opens of a tree for a question."""

    question: Question
    blocks: dict[int, list[int]]  # number of a block -> its tokens that are there, in their order
    needed: list[int]  # blocks that tell the facts of the answer
    telling: list[int]  # those that tell the last of them, which names the answer
    held: bool  # all needed tokens are there

    def ids(self, without: set[int] = frozenset()) -> list[int]:
        return [token for number, tokens in self.blocks.items() if number not in without for token in tokens]


def windows(store: Store, questions: list[Question], keep: Callable, budget: int) -> list[Window]:
    """Open the tree, and let a policy choose what of it each question reads."""
    tree, found = store.open(), []
    count, device = int(tree.lengths[0]), tree.device
    ids = tree.tokens[0].tolist()
    texts = store.models.base.tokenizer.batch_decode([ids[at : at + BLOCK] for at in range(0, count, BLOCK)])
    for question in bar("windows")(questions):
        spans = [store.spans[fact.key] for fact in question.needed]
        needed = sorted({number for span in spans for number in blocks(span, BLOCK)})
        kept = keep(Asked(texts, count, needed, question.text, ids), budget)
        at = torch.tensor(kept, device=device)
        read = tree.levels[0].read("token", torch.zeros_like(at), at).tolist()
        opened: dict[int, list[int]] = {}
        for n, token in zip(kept, read, strict=True):
            opened.setdefault(n // BLOCK, []).append(token)
        held = {*kept}.issuperset(n for span in spans for n in span)
        found.append(Window(question, opened, needed, [*blocks(spans[-1], BLOCK)], held))
    tree.cache.close()
    return found


class Answers:
    """Answers of this call and of earlier ones, each by all that it depends on: a line of a file."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("}\n")]  # one that a stop has cut is asked again
            self.rows = {row.pop("key"): row for row in map(json.loads, whole)}
            if len(whole) < len(lines):
                write(path, "".join(whole))

    def of(self, about: list, answer: Callable[[], dict]) -> dict:
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        if key not in self.rows:
            self.rows[key] = answer()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key} | self.rows[key]) + "\n")
        return self.rows[key]


def measured(core: Core, found: list[Window], provenance: int | None = None, answers: Answers | None = None):
    """What a core says behind each window: see ``said``. What a right answer rests on is asked of the first
    ``provenance`` windows, for it takes a pass for each block."""
    rows = []
    for number, window in enumerate(bar(core.name)(found)):
        rests = provenance is None or number < provenance
        if answers is None:
            rows.append(said(core, window, rests))
            continue
        about = [core.identity, core.window(window.ids(), window.question), window.question.values, rests]
        about += [window.question.answer, [*window.blocks], window.needed, window.telling]
        rows.append(answers.of(about, lambda window=window, rests=rests: said(core, window, rests)))
    return rows


def said(core: Core, window: Window, rests: bool) -> dict:
    """``right``, ``without`` (right without the needed blocks), ``held``, the NLL ``full`` and ``drop``; and with
    ``rests`` of a right answer: whether ``block``, what it rests on, tells it, and the share that do ``by_chance``."""
    question, right = window.question, window.question.values.index(window.question.answer)
    full, drop = (core.nll(window.ids(out), question) for out in (set(), {*window.needed}))
    row = {"right": int(full.argmin()) == right, "without": int(drop.argmin()) == right, "held": window.held}
    row |= {"full": float(full[right]), "drop": float(drop[right]), "block": None}
    if row["right"] and rests:
        cost = {n: float(core.nll(window.ids({n}), question, (question.answer,))) for n in window.blocks}
        row["block"] = max(cost, key=cost.get) in window.telling
        row["by_chance"] = len({*window.telling} & cost.keys()) / len(cost)
    return row


def tabled(table: Table, rows: list[dict], **about) -> None:
    """The figures of a core, a policy and a kind of question, added to the table."""

    def share(metric: str, values: list[bool]) -> None:
        if values:
            table.add(metric, wilson(sum(values), len(values))._asdict(), n=len(values), **about)

    for metric, key in (("accuracy", "right"), ("without", "without"), ("in window", "held")):
        share(metric, [row[key] for row in rows])
    blamed = [row for row in rows if row["block"] is not None]
    share("provenance", [row["block"] for row in blamed])
    if blamed:
        table.add("by chance", sum(row["by_chance"] for row in blamed) / len(blamed), n=len(blamed), **about)
    full, drop = ([row[key] for row in rows] for key in ("full", "drop"))
    for metric, values in (("L_full", full), ("L_drop", drop)):
        table.add(
            metric, mean_interval(torch.arange(len(values)), torch.tensor(values))._asdict(), n=len(values), **about
        )
    table.add("CKRI", ckri(full, drop), n=len(rows), **about)


def prose(path: str | None) -> list[str]:
    """Sentences between the facts."""
    rows = (Files(path) if path else Embedded(MEGABYTES)).load()
    return sentences(row["text"] for row in rows if path or row["domain"] == NARRATIVE)


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Build the trees, let each policy open them, and ask each core.

    Raises:
        ValueError: an unknown policy or model, more questions than can be asked, too little prose, or windows that a
            core does not take; names the option.
    """
    kinds = {name: find(rivals, name, "--policies") for name in args.policies}
    if args.provenance is not None:
        at_least("provenance", args.provenance, 0)
    usable(args.out)
    draw = random.Random(f"knowledge/{args.seed}")
    knowledge = Knowledge(args.entities, draw, VALIDATION)
    asked, hops = knowledge.questions(args.questions, draw), knowledge.questions(args.questions, draw, hops=2)
    text = prose(args.path)
    if not text:
        raise ValueError(f"--path={args.path}: there is no sentence of prose")
    models = [load_models(name, setting="--model") for name in args.model]
    first, tokenizer = models[0], models[0].base.tokenizer
    policies = {
        name: kind(first, args.keys) if getattr(kind, "needs_models", False) else kind() for name, kind in kinds.items()
    }
    cores = [Core(one, tokenizer, args.plain) for one in models]
    table = Table()
    chance = sum(1 / len(question.values) for question in asked) / len(asked)
    table.add("chance", chance, domain=TOLD, n=len(asked))
    for core in cores:
        right = [int(core.nll([], q).argmin()) == q.values.index(q.answer) for q in bar(NOTHING)(asked)]
        about = {"run": core.name, "carrier": NOTHING, "span": 0, "domain": TOLD}
        table.add("accuracy", wilson(sum(right), len(right))._asdict(), n=len(right), **about)

    def told(facts: list[Fact]) -> tuple[str, list[Fact]]:
        return tell(facts, text, args.between, random.Random(f"prose/{args.seed}"))

    store = Store(args.out / "trees" / "told", first)
    store.write(*told(knowledge.facts))
    for kind, questions in ((TOLD, asked), (TWO_HOPS, hops)):
        yield from asked_of(args, table, store, kind, questions, policies, cores)
    wrong = {question.needed[-1].key: question.needed[-1].poison(draw) for question in asked}
    other = Store(args.out / "trees" / "poisoned", first)
    other.write(*told([wrong.get(fact.key, fact) for fact in knowledge.facts]))
    poisoned = [replace(question, needed=(wrong[question.needed[-1].key],)) for question in asked]
    yield from asked_of(args, table, other, POISONED, poisoned, policies, cores)
    updates = [question.needed[-1].update(draw) for question in asked]
    more, facts = told(updates)
    store.append(f" {more}", [replace(fact, start=fact.start + 1, end=fact.end + 1) for fact in facts])
    updated = [replace(question, needed=(fact,)) for question, fact in zip(asked, updates, strict=True)]
    yield from asked_of(args, table, store, UPDATED, updated, policies, cores)


def asked_of(args, table: Table, store: Store, kind: str, questions, policies, cores) -> Iterator[tuple[Path, Report]]:
    """One tree, one kind of question: every policy opens it, every core answers."""
    for name, policy in policies.items():
        found = windows(store, questions, policy.keep, args.budget)
        for core in cores:
            about = {"run": core.name, "carrier": name, "span": args.budget, "domain": kind}
            tabled(table, measured(core, found, args.provenance, Answers(args.out / "answers.jsonl")), **about)
            yield args.out / "cognitive_core", report(table, args)


def report(table: Table, args: argparse.Namespace) -> Report:
    kinds = [kind for kind in (TOLD, UPDATED, POISONED, TWO_HOPS) if kind in table.names("domain")]
    lines = [name for name in table.names(("run", "carrier")) if None not in name]
    answers = [(kind, {"metric": "accuracy", "domain": kind}) for kind in kinds]
    answers.append(("without", {"metric": "without", "domain": TOLD}))
    sheets = [pivot("Accuracy", table, answers, ("run", "carrier"), ["run", "policy"], lines, label=list)]
    lines = [line for line in lines if line[1] != NOTHING]
    for kind in kinds:
        columns = [(metric, {"metric": metric, "domain": kind}) for metric in BEHIND]
        sheets.append(pivot(kind, table, columns, ("run", "carrier"), ["run", "policy"], lines, label=list))
    about = {name: getattr(args, name) for name in ("model", "entities", "between", "budget", "seed", "plain", "path")}
    notes = [f"By chance {table.point(metric='chance'):.3f}. A window has {args.budget} tokens of the tree at most."]
    return Report("Facts that lie in a tree", table, sheets, LEGEND, notes, about)


BEHIND = ("in window", "provenance", "by chance", "L_full", "L_drop", "CKRI")


main = command("cognitive_core", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
