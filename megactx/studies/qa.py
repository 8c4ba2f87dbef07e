"""Questions about a short context: with all of it, with nothing of it, and with gists of all of its blocks.

    python -m megactx.studies.qa smollm2 --path TEXTS --questions 60
    python -m megactx.studies.qa smollm2 --gistnet RUN --path TEXTS --scores kvpress.jsonl

    full context        [begin][ context ................ ][ question ]
    gists               [begin]   g       g       g      g [ question ]    at the positions of their blocks
    nothing             [begin][ question ]
    newest, bm25 ...    [begin][ some tokens of the context ][ question ]  as many as there are gists, or ``--budgets``

The base LM is frozen: nobody taught it to read gists but the GistNet. The score is the teacher-normalised one of the
literature, (compressed - nothing) / (full - nothing), of answers that are right and of the answer's log-likelihood
(Feldman & Artzi 2025, arXiv 2510.20797, with a fixed decoder). Every answer is a line of ``answers.jsonl``: the same
command goes on with those that are missing, and another ``--budgets`` adds to them. ``cases.jsonl`` is for programs of
other environments (``benchmarks/rivals.py``); what they answered comes back by ``--scores``.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megactx.data.knowledge import value_ids
from megactx.data.questions import TASKS, Asked, asked, check_tasks
from megactx.evaluation import rivals
from megactx.evaluation.bootstrap import mean_interval, recovery_intervals, wilson
from megactx.evaluation.knowledge import read_values
from megactx.evaluation.measure import LAST_TOKEN, untrained
from megactx.evaluation.rivals import BLOCK
from megactx.evaluation.scores import BlockScores
from megactx.evaluation.table import BLOCKS, OVERALL, Report, Table, pivot
from megactx.framework.bar import bar
from megactx.framework.files import replacing
from megactx.gist.carrier import SoftTokens
from megactx.gist.parts import find
from megactx.lm.identity import of_net, of_weights
from megactx.lm.prefill import prefill, unread
from megactx.parts.models import Models, load_models
from megactx.parts.read import gistnet_of

from .cognitive_core import Core, prose
from .study import Options, command, multiple, usable

FULL, NOTHING, GISTS, OTHER, RANDOM = "full context", "nothing", "gists", "another context's gists", "random gist"
ALL = "all tasks"
LEGEND = (
    "right: of a fact, the likeliest of eight values; of a needle, greedy decoding says it. NLL: of the answer, nats"
    " for all of its tokens. normalised: (compressed - nothing) / (full - nothing). behind gists: NLL above that over"
    " gists, paired. Brackets: 95 %, Wilson, or bootstrap over questions."
)


def options(given: Options) -> None:
    about = "base and GistNet: an asset, an exported folder, a run; without it the embedded ones"
    given.add("model", nargs="?", metavar="MODEL", help=about)
    given.add(
        "--gistnet", metavar="PATH", help="another GistNet of that base: asset:NAME, a folder, a checkpoint, a run"
    )
    given.add("--tasks", nargs="+", default=["fact", "niah_single_2"], help="of " + ", ".join(TASKS))
    given.number("questions", 60, "questions of each task", least=2)
    given.number("tokens", 128, "tokens of a context, a multiple of K")
    given.add("--policies", nargs="+", default=["newest", "bm25_near"], help="rivals that keep tokens of the context")
    given.add("--budgets", nargs="+", type=int, help="tokens that they keep (default: as many as there are gists)")
    given.number("seed", 0, "of the questions", least=0)
    given.add("--plain", action="store_true", help="no chat template, where the base has one")
    given.add("--scores", nargs="+", default=[], type=Path, metavar="FILE", help="what others answered, see above")
    given.path("prose of the contexts; without it the embedded text")
    given.add("--out", type=Path, default=Path("qa"), help="folder of the tables")


class Reader:
    """A frozen base LM that answers over what stands in place of a context.

    Args:
        models: base and GistNet.
        policies: name -> rival.
        budgets: numbers of tokens that each of them keeps.
    """

    def __init__(self, models: Models, policies: dict, budgets: Iterable[int], plain: bool):
        self.base, self.net = models.base, models.gistnet
        self.policies = {f"{name} {count}": (policy, count) for count in budgets for name, policy in policies.items()}
        self.core = Core(models, models.base.tokenizer, plain)
        self.begin = len(self.core.first)
        controls = untrained(self.base, self.net.block_size, self.net.position)
        self.nets = {GISTS: self.net, LAST_TOKEN: controls[LAST_TOKEN], RANDOM: controls[RANDOM]}
        self.readings = (FULL, NOTHING, *self.nets, OTHER, *self.policies)

    def answer(self, case: Asked, other: Asked, reading: str) -> dict:
        """Whether it is ``right``, ``nll`` of the answer, ``entries`` in place of the context.

        Args:
            other: whose gists are the control ``OTHER``.
            reading: of ``readings``.
        """
        if reading in (FULL, NOTHING):
            return self._over(case, case.ids if reading == FULL else [])
        if reading in self.policies:
            policy, count = self.policies[reading]
            starts = range(0, len(case.ids), BLOCK)
            blocks = [self.base.tokenizer.decode(case.ids[at : at + BLOCK]) for at in starts]
            needed = sorted({n // BLOCK for n in case.needed})
            kept = policy.keep(rivals.Asked(blocks, len(case.ids), needed, case.text, case.ids), count)
            return self._over(case, [case.ids[n] for n in kept])
        net, whose = (self.net, other) if reading == OTHER else (self.nets[reading], case)
        carrier = self._compressed(net, whose)
        return self._said(case, *self._window(case, carrier), entries=carrier.vectors.shape[1] * carrier.slots)

    @torch.no_grad()
    def _compressed(self, net, case: Asked) -> SoftTokens:
        """All blocks of a context."""
        ids = torch.tensor([[*self.core.first, *case.ids]], device=self.base.model.device)
        read = prefill(self.base, ids, with_states=True) if net.needs_hidden else unread(ids)
        return net.compress(self.base, read, self._starts(case))

    def _starts(self, case: Asked) -> Tensor:
        """Of blocks, [1, N]."""
        blocks = torch.arange(0, len(case.ids), self.net.block_size, device=self.base.model.device)
        return self.begin + blocks[None]

    def _over(self, case: Asked, kept: list[int]) -> dict:
        ids = torch.tensor([self.core.window(kept, case)], device=self.base.model.device)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return self._said(case, self.base.embed(ids), positions, None, entries=len(kept))

    def _window(self, case: Asked, carrier: SoftTokens) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows, positions and their standard deviations of a window in which carriers stand for the context."""
        vectors, places = carrier.in_a_row(self._starts(case))
        ids = torch.tensor([self.core.window([], case)], device=vectors.device)
        embedded, positions = self.base.embed(ids), torch.arange(ids.shape[1], device=ids.device)[None]
        first, then = embedded[:, : self.begin], embedded[:, self.begin :]
        rows = torch.cat([first, vectors.to(embedded.dtype), then], dim=1)
        positions = torch.cat([positions[:, : self.begin], places, positions[:, self.begin :] + len(case.ids)], dim=1)
        if carrier.sigma is None:
            return rows, positions, None
        sigma = torch.zeros(positions.shape, device=rows.device)
        sigma[:, self.begin : self.begin + vectors.shape[1]] = carrier.sigma
        return rows, positions, sigma

    def _said(self, case: Asked, rows: Tensor, positions: Tensor, sigma: Tensor | None, entries: int) -> dict:
        values = value_ids(self.base.tokenizer, case.values)
        nll, greedy = read_values(self.base, rows, positions, values, sigma)
        at = case.values.index(case.answer)
        right = int(nll.argmin()) == at if len(values) > 1 else bool(greedy[at])
        return {"right": right, "nll": float(nll[at]), "entries": entries}


class Answers:
    """A line for each question and reading, behind a line that says what was asked.

    Attributes:
        rows: (task, number) -> carrier -> answer.

    Raises:
        ValueError: the file holds answers to something else.
    """

    def __init__(self, path: Path, about: dict):
        self.path, self.rows = path, {}
        if path.exists():
            first, *lines = path.read_text().splitlines()
            then = json.loads(first)
            if wrong := [name for name, value in about.items() if then.get(name) != value]:
                raise ValueError(f"--out={path.parent} holds answers of other settings: {', '.join(wrong)}")
            # A line that a stop has cut is asked again.
            self.rows = read_lines([line for line in lines if line.endswith("}")])
        with replacing(path) as part:
            lines = [about] + [self._line(*key, *own) for key, row in self.rows.items() for own in row.items()]
            part.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def add(self, key: tuple[str, int], carrier: str, answer: dict) -> None:
        self.rows.setdefault(key, {})[carrier] = answer
        with self.path.open("a") as file:
            file.write(json.dumps(self._line(*key, carrier, answer)) + "\n")

    @staticmethod
    def _line(task: str, number: int, carrier: str, answer: dict) -> dict:
        return {"task": task, "number": number, "carrier": carrier} | answer


def read_lines(lines: Iterable[str]) -> dict[tuple[str, int], dict]:
    """Lines with ``task``, ``number``, ``carrier``, ``right``, ``nll``, ``entries`` -> answers by question and carrier.

    Raises:
        ValueError: a line is not JSON, or of another type.
        KeyError: it lacks a column.
    """
    found: dict[tuple[str, int], dict] = {}
    for row in map(json.loads, lines):
        own = {"right": bool(row["right"]), "nll": float(row["nll"]), "entries": int(row["entries"])}
        found.setdefault((row["task"], int(row["number"])), {})[str(row["carrier"])] = own
    return found


def others(paths: list[Path]) -> dict[tuple[str, int], dict]:
    """What other programs answered.

    Raises:
        ValueError: a file cannot be read, or a line lacks a column.
    """
    found: dict[tuple[str, int], dict] = {}
    for path in paths:
        try:
            for key, row in read_lines(path.read_text().splitlines()).items():
                found.setdefault(key, {}).update(row)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--scores={path}: it cannot be read as lines of answers ({error!r})") from error
    return found


def summarise(rows: dict[tuple[str, int], dict]) -> Table:
    """Answers by question -> the long table; a task is a domain."""
    table = Table()
    tasks = [*dict.fromkeys(task for task, _ in rows)]
    for task in [*tasks, OVERALL] if len(tasks) > 1 else tasks:
        own = [row for (name, _), row in rows.items() if task in (name, OVERALL)]
        for name in dict.fromkeys(name for row in own for name in row):
            there = [row for row in own if name in row]
            about, owner = {"carrier": name, "domain": task, "n": len(there)}, torch.arange(len(there))

            def column(carrier: str, metric: str, there=there) -> Tensor:
                return torch.tensor([float(row[carrier][metric]) for row in there], dtype=torch.float64)

            table.add("entries", column(name, "entries").mean().item(), **about)
            table.add("right", wilson(int(column(name, "right").sum()), len(there)), **about)
            table.add("nll", mean_interval(owner, column(name, "nll")), **about)
            if name != GISTS:
                table.add("behind", mean_interval(owner, column(name, "nll") - column(GISTS, "nll")), **about)
            if name in (FULL, NOTHING):
                continue
            for metric, source, sign in (("normalised right", "right", -1), ("normalised nll", "nll", 1)):
                full, drop, carrier = (sign * column(c, source)[:, None] for c in (FULL, NOTHING, name))
                where = {"domain": [task] * len(there), "document": owner, "start": torch.zeros_like(owner)}
                scores = BlockScores(full, drop, {name: carrier}, **where)
                table.add(metric, recovery_intervals(scores, [name])[name], **about)
    return table


COLUMNS = [
    ("entries", "entries", ".0f"),
    ("right", "right"),
    ("normalised", "normalised right"),
    ("NLL", "nll"),
    ("normalised", "normalised nll"),
    ("behind gists", "behind", "+.2f"),
]


def report(rows: dict[tuple[str, int], dict], about: dict) -> Report:
    table = summarise(rows)
    sheets = []
    for task in table.names("domain"):
        own = table.pick(domain=task)
        title = f"{ALL if task == OVERALL else task}: {own.one(carrier=FULL)['n']} questions"
        sheets.append(pivot(title, Table(own), COLUMNS, heading=BLOCKS, strong=[GISTS]))
    title = f"Questions about a context of {about['tokens']} tokens: {about['model']}"
    return Report(title, table, sheets, LEGEND, [], about)


def study(args: argparse.Namespace) -> Iterator[tuple[Path, Report]]:
    """Ask every question over every reading.

    Raises:
        ValueError: no GistNet, an unknown task or policy, sizes that do not go together; names the option.
    """
    stem = usable(args.out) / "qa"
    check_tasks("--tasks", args.tasks)
    kinds = {name: find(rivals, name, "--policies") for name in args.policies}
    for budget in args.budgets or ():
        if not 0 < budget <= args.tokens:
            raise ValueError(f"--budgets={budget} is not allowed: 1 to --tokens={args.tokens}")
    theirs = others(args.scores)
    models = load_models(args.model, setting="MODEL")
    if args.gistnet:
        net = gistnet_of(args.gistnet, models.base, "--gistnet", slots=True).to(models.base.model.device)
        models = Models(models.base, net, name=models.name, keys=models.keys)
    if models.gistnet is None:
        raise ValueError(f"MODEL={args.model}: there is no GistNet for it, give one: --gistnet PATH")
    multiple("tokens", args.tokens, models.gistnet.block_size)
    text = prose(args.path)
    policies = {
        name: kind(models, None) if getattr(kind, "needs_models", False) else kind() for name, kind in kinds.items()
    }
    budgets = args.budgets or [args.tokens // models.gistnet.block_size * models.gistnet.slots]
    reader, tokenizer = Reader(models, policies, budgets, args.plain), models.base.tokenizer
    cases = {
        (task, number): asked(task, number, args.tokens, tokenizer, text, args.seed)
        for task in args.tasks
        for number in range(args.questions)
    }
    about = {"model": models.name, "gistnet": args.gistnet, "path": args.path, "tokens": args.tokens}
    about |= {"seed": args.seed, "plain": args.plain, "nets": [of_weights(models.base), of_net(models.gistnet)]}
    about["text"] = hashlib.sha256("\0".join(text).encode()).hexdigest()[:16]
    answers = Answers(args.out / "answers.jsonl", about)
    for_others(args.out / "cases.jsonl", cases.values(), reader.core)

    def report_so_far() -> Report:
        done = {key: answers.rows[key] | theirs.get(key, {}) for key in cases if GISTS in answers.rows.get(key, {})}
        return report(done, about)

    for count, (key, case) in enumerate(bar("questions")(cases.items()), 1):
        other = cases[case.task, (case.number + 1) % args.questions]
        missing = [name for name in reader.readings if name not in answers.rows.get(key, {})]
        for name in missing:
            answers.add(key, name, reader.answer(case, other, name))
        if missing and not count % 10:
            yield stem, report_so_far()
    yield stem, report_so_far()


def for_others(path: Path, cases, core: Core) -> None:
    """The questions for programs of other environments, with RULER's columns, and ids where text is not exact."""
    with path.open("w") as file:
        for case in cases:
            window = core.window([], case)
            row = asdict(case) | {"begin": core.first, "end": window[len(core.first) :], "question": case.text}
            row |= {"answer_prefix": case.prefix, "answer": [case.answer], "needed": [*case.needed]}
            row["max_new_tokens"] = 16
            row["value_ids"] = value_ids(core.base.tokenizer, case.values)
            file.write(json.dumps(row) + "\n")


main = command("qa", __doc__, options, study)

if __name__ == "__main__":
    sys.exit(main())
