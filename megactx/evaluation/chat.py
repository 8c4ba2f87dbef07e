"""How well models answer: held-out conversations, obedience to the chat template, and recall far behind the window.

    python -m megactx.evaluation.chat RUN/run10_base RUN/run10_sft RUN/run10_export/model

nll         of the answers of held-out conversations, in nats per token
stops       share of greedy answers that end by themselves
obeys       share of greedy answers without a sign of the template before their end
right       share of greedy answers to tasks that are the right one; and of answers to RULER's single needle and
            BABILong's qa1 that are by the rules of each
recall      share of talks whose fact of the second turn is in the last answer, in a window that it has left
recall nll  of that answer, in nats per token

A model with a GistNet reads facts, needle and qa1 with its own window (``focus``), and all models by dropping what is
old; needle and qa1 also with all of the text in detail (``full``), where the base LM takes so many positions.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.data import ruler
from megactx.data.conversations import ConversationFiles
from megactx.data.documents import VALIDATION, split_of
from megactx.data.embedded_conversations import EmbeddedConversations
from megactx.data.tasks import Tasks, recall, turns_of
from megactx.data.turns import ASSISTANT, Turns
from megactx.framework.command_line import run
from megactx.parts.models import Models, load_models
from megactx.runtime import Controller, Session, Settings
from megactx.runtime.text import special_tokens

from .bootstrap import mean_interval, wilson
from .table import Report, Sheet, Table, pivot

TASKS, FILES = "tasks", "files"
FOCUS, DROPPING, FULL = "focus", "dropping", "full"
MEMORY = ("niah_single_1", "qa1")
COLUMNS = (
    ("nll", ".3f"),
    ("stops", ".0%"),
    ("obeys", ".0%"),
    ("right", ".0%"),
    ("recall", ".0%"),
    ("recall nll", ".3f"),
)


def held_out(path: str | None, count: int, embedded: bool = True) -> dict[str, list[list[dict]]]:
    """domain -> turns of held-out conversations, ``count`` at most: of files, or tasks and embedded ones."""
    sources = {FILES: ConversationFiles(path)} if path else {TASKS: Tasks(20 * count, seed=1)}
    if embedded and not path:
        sources["embedded"] = EmbeddedConversations(20 * count)
    found = {}
    for domain, source in sources.items():
        every = (row["messages"] for row in source.documents())
        # The side of the split on which training does not learn, whatever it took of the same source.
        held = [turns for turns in every if split_of("\0".join(turn["content"] for turn in turns)) == VALIDATION]
        found[domain] = [turns for turns in held if turns[-1]["role"] == ASSISTANT][:count]
        if not found[domain]:
            raise ValueError(f"{domain}: none of the conversations is held out (one in ten is, by a hash); give more")
    return found


def recall_talks(count: int, turns: int) -> list[list[dict]]:
    """Talks whose second turn tells what the last one asks for, ``turns`` questions each."""
    drawn = (np.random.default_rng([7, index]) for index in range(count))
    return [turns_of(recall(rng, max(0, turns - 3), first=False)) for rng in drawn]


def memory_cases(task: str, count: int, length: int, tokenizer) -> list[dict]:
    """Rows of ``ruler.case`` of about ``length`` tokens, in the prose that the package brings."""
    try:
        return [ruler.case(task, length, tokenizer, seed, ruler.sentences(None)) for seed in range(count)]
    except ValueError as error:
        raise ValueError(str(error).replace("--lengths", "--length")) from error


class Chatting:
    """One model that is measured.

    Args:
        models: of ``load_models``.
        tokens: of an answer at most.

    Raises:
        ValueError: its tokenizer has no chat template.
    """

    def __init__(self, models: Models, tokens: int):
        if not models.base.tokenizer.chat_template:
            raise ValueError(f"MODEL={models.name}: its tokenizer has no chat template; train it with experiment=sft")
        self.models, self.tokens, self.turns = models, tokens, Turns(models.base.tokenizer)
        end = self._asked([{"role": "user", "content": "."}])[1]
        special = special_tokens(models.base.tokenizer)
        self.end, self.signs = special.get(end, ""), set(special) - {end}

    def _asked(self, turns: list[dict]) -> tuple[list[int], int]:
        """Turns up to a question -> ids up to where the answer begins, BOS first; and the id that would end it."""
        ids, answers = self.turns([*turns, {"role": ASSISTANT, "content": ""}])
        last = int(answers.nonzero()[0][-1])
        return ids[:last].tolist(), int(ids[last])

    @torch.no_grad()
    def nll(self, turns: list[dict]) -> Tensor:
        """NLL of every token of the answers of a conversation, [A]."""
        base = self.models.base
        ids, answers = self.turns(turns, base.max_positions)
        ids = torch.as_tensor(ids, dtype=torch.long, device=base.model.device)
        hidden = base(base.embed(ids[None]), None)[0, :-1]
        chosen = torch.as_tensor(answers[1:], device=ids.device)
        return F.cross_entropy(base.logits(hidden[chosen]).float(), ids[1:][chosen], reduction="none").cpu()

    def answer(self, session: Session, turns: list[dict]) -> tuple[str, bool, bool]:
        """The greedy answer to the last of some turns; whether it ended by itself; and without a sign before."""
        session.append(self._asked(turns)[0][1:])  # the session has its BOS
        pieces = list(session.generate(self.tokens, stop=[self.end] * bool(self.end)))
        stopped = pieces[-1].stopped != "length"
        said = pieces[:-1] if stopped else pieces
        return "".join(piece.text for piece in pieces), stopped, not any(piece.token in self.signs for piece in said)

    def begun(self, row: dict) -> list[int]:
        """A row of ``memory_cases`` up to where the rest of the answer is to stand, BOS first."""
        asked = [{"role": "user", "content": f"{row['context']}\n{row['question']}"}]
        answer = self.models.base.tokenizer(f" {row['answer_prefix']}", add_special_tokens=False)["input_ids"]
        return [*self._asked(asked)[0], *answer]

    def found(self, session: Session, row: dict) -> float:
        """The score of the greedy answer to a row of ``memory_cases``."""
        session.append(self.begun(row)[1:])  # the session has its BOS
        said = ""
        for piece in session.generate(row["max_new_tokens"], stop=[self.end] * bool(self.end)):
            said += piece.text
            if ruler.settled(row["task"], said, row["answer"]):
                break
        return ruler.score(row["task"], said, row["answer"])

    def session(self, window: int, kind: str) -> Session:
        """A new one; ``kind``: ``focus`` with the model's own nets, ``dropping`` without, ``full`` without an end."""
        if kind == FULL:
            return self.plain()
        models = self.models if kind == FOCUS else replace(self.models, gistnet=None, lensnet=None, keys=None)
        how = "focus" if kind == FOCUS else "recency"
        return Session(Controller(models, Settings(budget=window, megacontext=how)))

    def plain(self) -> Session:
        models = replace(self.models, gistnet=None, lensnet=None, keys=None)
        return Session(Controller(models, Settings(megacontext="none")))


def measure(
    models: Models, name: str, held: dict, talks: list[list[dict]], window: int, tokens: int, memory=(0, 0)
) -> Table:
    """All figures of one model.

    Args:
        name: its run in the table.
        memory: cases of a needle and of qa1, and tokens of each.
    """
    table, one = Table(), Chatting(models, tokens)
    for domain, every in held.items():
        room = models.base.max_positions - tokens
        conversations = [turns for turns in every if len(one._asked(turns[:-1])[0]) <= room]
        if not conversations:
            raise ValueError(f"MODEL={models.name}: it takes {room + tokens} positions, too few for any of {domain}")
        about = {"run": name, "domain": domain, "n": len(conversations)}
        losses = [one.nll(turns) for turns in conversations]
        document = torch.repeat_interleave(torch.arange(len(losses)), torch.tensor([len(loss) for loss in losses]))
        table.add("nll", mean_interval(document, torch.cat(losses)), **about)
        told = [one.answer(one.plain(), turns[:-1]) for turns in conversations]
        for metric, index in (("stops", 1), ("obeys", 2)):
            table.add(metric, wilson(sum(answer[index] for answer in told), len(told)), **about)
        if domain == TASKS:
            right = [t[0].strip() == turns[-1]["content"] for t, turns in zip(told, conversations, strict=True)]
            table.add("right", wilson(sum(right), len(right)), **about)
    kinds = (DROPPING, *([FOCUS] if models.gistnet else []))
    for kind in kinds:
        about = {"run": name, "carrier": kind, "domain": "recall", "span": f"window {window}", "n": len(talks)}
        if found := list(_recalled(one, talks, window, kind)):
            table.add("recall", wilson(sum(right for right, _ in found), len(found)), **about)
            document = torch.repeat_interleave(torch.arange(len(found)), torch.tensor([len(nll) for _, nll in found]))
            table.add("recall nll", mean_interval(document, torch.cat([nll for _, nll in found])), **about)
    count, length = memory
    for task in MEMORY if count else ():
        rows = memory_cases(task, count, length, models.base.tokenizer)
        fits = all(len(one.begun(row)) + row["max_new_tokens"] <= models.base.max_positions for row in rows)
        for kind in (*[FULL] * fits, *kinds):
            solved = sum(one.found(one.session(window, kind), row) == 1 for row in rows)
            span = f"{length:,} tokens, window {window}" if kind != FULL else f"{length:,} tokens"
            table.add("right", wilson(solved, count), run=name, carrier=kind, domain=task, span=span, n=count)
    return table


def _recalled(one: Chatting, talks: list[list[dict]], window: int, kind: str) -> Iterator[tuple[bool, Tensor]]:
    for turns in talks:
        value = turns[-1]["content"].partition(" is ")[2].removesuffix(".")
        text, *_ = one.answer(one.session(window, kind), turns[:-1])
        session, asked = one.session(window, kind), one._asked(turns[:-1])[0]
        session.append(asked[1:])
        answer = one.turns(turns)[0][len(asked) :]
        yield value in text, session.append(answer.tolist(), score=True).cpu()


def sheets(table: Table) -> list[Sheet]:
    """A sheet per domain, a line per model."""
    found = []
    for domain in table.names("domain"):
        own = table.pick(domain=domain)
        for carrier in own.names("carrier") or [None]:
            rows = own.pick(carrier=carrier) if carrier else own
            columns = [(metric, {"metric": metric}, form) for metric, form in COLUMNS if rows.pick(metric=metric)]
            title = f"{domain}, {carrier}, {rows[0]['span']}" if carrier else f"held-out conversations: {domain}"
            found.append(pivot(f"{title} (n = {rows[0]['n']})", rows, columns, "run", "run"))
    return found


def _command(args: argparse.Namespace) -> None:
    for name in ("conversations", "tokens", "turns", "window", "length"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} is not allowed: 1 or more")
    for name in ("recall", "memory"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name}={getattr(args, name)} is not allowed: 0 or more")
    names = {(path if len(args.models) > 1 else Path(path).name): path for path in args.models}
    held, talks, table = held_out(args.path, args.conversations), recall_talks(args.recall, args.turns), Table()
    for name, folder in names.items():
        loaded, memory = load_models(folder, setting="MODEL"), (args.memory, args.length)
        table += measure(loaded, name, held, talks, args.window, args.tokens, memory)
    report = Report("Chat", table, sheets(table))
    report.show()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(report.write(args.out))


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.evaluation.chat", description=__doc__.partition("\n")[0])
    parser.add_argument("models", metavar="MODEL", nargs="+", help="run folder of a base LM, or a model's folder")
    parser.add_argument("--path", help="conversations to measure on (jsonl, parquet); else tasks, and embedded ones")
    for name, default, what in (
        ("conversations", 40, "held-out ones of each kind at most"),
        ("recall", 8, "talks with a fact far back; 0: none"),
        ("turns", 40, "questions of such a talk"),
        ("window", 512, "tokens or entries that are read at once there, and of texts with a needle"),
        ("memory", 8, "texts with a needle, and of BABILong's qa1; 0: none"),
        ("length", 2048, "tokens of such a text"),
        ("tokens", 48, "of an answer at most"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--out", type=Path, default=Path("runs/chat"), help="stem of the files")
    return run(_command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
