"""Somebody asks for a fact of a text that is compressed whole: the gists must have kept it.

    window     [begin] gist 1 gist 2 ... gist n [ question ... answer ]
    scored                                                     answer

What follows a block says most about how the text goes on; a fact that is asked for later must be carried by itself.
Published compressors that answer questions were trained on them (Feldman & Artzi 2025, arXiv 2510.20797).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.data.questions import TASKS
from megactx.framework.config.types import Count, NonNegative, Share, declared
from megactx.gist.carrier import Compressor, SoftTokens
from megactx.gist.loss import Context, Loss
from megactx.lm import BaseLM
from megactx.lm.eval_mode import in_eval_mode
from megactx.lm.masks import CAUSAL
from megactx.lm.prefill import prefill, unread

ANSWER, QUESTION = 4, 32  # tokens of an answer, and of a question with it, about


@declared("loss.questions")
class Questions(Loss):
    """NLL of answers behind the gists of a short context and a question: the mean over answers of that of a token.

    Args:
        weight: its share of the sum.
        count: Q, questions of a step, each with a context of its own.
        tokens: of a context, multiples of K, a step each, in turn. Short ones are learned first: they have one fact.
        tasks: ``fact`` (one of some facts about people), ``niah_single_1`` and ``niah_single_2`` (a number in noise or
            in prose), a step each, in turn.
        framed: share of the steps in which the base's chat template stands around context and question.

    Raises:
        ValueError: no length, or no task.
    """

    needs = ("contexts", "context_starts", "questions", "answers")
    all_vectors = judges = windows = True

    def __init__(
        self,
        weight: NonNegative = 0.0,
        count: Count = 12,
        tokens: list[Count] = (32, 64, 128),
        tasks: list[Literal[tuple(TASKS)]] = ("fact", "niah_single_2"),
        framed: Share = 0.5,
    ):
        super().__init__(weight)
        if weight and not (tokens and tasks):
            given = f"loss.questions.tokens={list(tokens)}, loss.questions.tasks={list(tasks)}"
            raise ValueError(f"{given}: allowed is at least one of each")
        self.count, self.tokens, self.tasks, self.framed = count, tokens, tasks, framed

    def __call__(self, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        nets = context.nets
        losses, right = asked(context.base, nets, context.batch)
        return losses, {
            f"{self.name}/loss": losses[0].detach(),
            **{f"{self.name}/{'' if n == 0 else f'{name}/'}right": right[n] for n, name in enumerate(nets)},
        }

    def flops(self, batch: dict, work) -> Tensor | float:
        count, blocks = batch["context_starts"].shape
        rows = batch["contexts"].shape[1] - blocks * work.block + work.slots * blocks + batch["questions"].shape[1]
        return work.passed(count * rows, count * rows * (rows + 1) / 2) + 4 * work.head * work.carriers * count * ANSWER

    def encoded(self, batch: dict, block: int) -> dict[str, int]:
        return {"contexts": batch["context_starts"].numel()}

    def typical(self, data: dict, block: int) -> dict[str, Tensor]:
        mean = sum(self.tokens) // len(self.tokens)
        shapes = {"contexts": mean + 1, "context_starts": mean // block, "questions": QUESTION, "answers": ANSWER}
        return {name: torch.zeros(self.count, width) for name, width in shapes.items()}

    def held_out(self, base: BaseLM, net: Compressor, datamodule, other: bool = False) -> dict[str, Tensor]:
        """``nll`` of an answer's token and the share that is ``right``, of a batch of each task and length.

        Args:
            other: each question has the gists of the next one's context: the control.
        """
        held, found = datamodule.held_questions, []
        for index in range(held.kinds):  # the same ones in every validation and process
            batch = {name: torch.from_numpy(value).to(base.model.device) for name, value in held[index].items()}
            if other:
                batch["contexts"] = batch["contexts"].roll(1, dims=0)
            with in_eval_mode(net):
                found.append(asked(base, {"net": net}, batch))
        nll, right = (torch.cat(values).mean() for values in zip(*found, strict=True))
        return {"nll": nll, "right": right}

    def told(self, base: BaseLM, net: Compressor, datamodule) -> str:
        own = self.held_out(base, net, datamodule)
        told = (
            f"Of {datamodule.held_questions.kinds * self.count} held-out questions {own['right']:.2f} are right behind"
        )
        told += f" the gists of their contexts (NLL of a token {own['nll']:.2f})"
        if self.count > 1:
            other = self.held_out(base, net, datamodule, other=True)
            told += f", {other['right']:.2f} behind those of another one ({other['nll']:.2f})"
        return f"{told}."


def asked(base: BaseLM, nets: dict[str, Compressor], batch: dict) -> tuple[Tensor, Tensor]:
    """``answered`` for each net, of a batch of ``QuestionBatches``: [C] and [C]."""
    ids, starts = batch["contexts"], batch["context_starts"]
    reads = any(net.needs_hidden for net in nets.values())
    read = prefill(base, ids, with_states=True) if reads else unread(ids)
    found = [answered(base, batch, net.compress(base, read, starts), net.block_size) for net in nets.values()]
    losses, right = zip(*found, strict=True)
    return torch.stack(losses), torch.stack(right)


def answered(base: BaseLM, batch: dict, carrier: SoftTokens, block: int) -> tuple[Tensor, Tensor]:
    """-> (NLL of a token of an answer, mean over answers, with gradient; share of the answers whose tokens are all the
    likeliest ones)."""
    ids, asked, places = batch["contexts"], batch["questions"], batch["answers"]
    vectors, between = carrier.in_a_row(batch["context_starts"])
    begin = ids.shape[1] - block * batch["context_starts"].shape[1]
    embedded = base.embed(torch.cat([ids[:, :begin], asked], dim=1))
    rows = torch.cat([embedded[:, :begin], vectors.to(embedded.dtype), embedded[:, begin:]], dim=1)
    there = torch.arange(begin, device=ids.device).expand(len(ids), -1)
    behind = torch.arange(asked.shape[1], device=ids.device).expand(len(ids), -1) + ids.shape[1]
    sigma = None
    if carrier.sigma is not None:
        sigma = torch.zeros(rows.shape[:2], device=ids.device)
        sigma[:, begin : begin + vectors.shape[1]] = carrier.sigma
    hidden = base(rows, torch.cat([there, between, behind], dim=1), CAUSAL, sigma=sigma)
    # Place i of the question is predicted by the row before it. No row sees the padding, which is behind it.
    at = (places.clamp(min=0) + begin + vectors.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    logits = base.logits(hidden.gather(1, at)).float()  # [Q, A, V]
    targets, inside = asked.gather(1, places.clamp(min=0)), places >= 0
    nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none") * inside
    right = ((logits.argmax(dim=-1) == targets) | ~inside).all(dim=1)
    return (nll.sum(dim=1) / inside.sum(dim=1)).mean(), right.float().mean()
