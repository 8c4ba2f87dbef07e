"""Stage ``end_to_end``: GistNet, LensNet and where asked the base LM learn at once, from windows (method 12).

document of C tokens -> tree -> N1 windows, one of them the cold start -> LensNet, allocator -> N2 variants
-> each kind once -> one packed pass of all [window | H true tokens] -> loss on the H
   -> gradient into the gists that are shown, so into GistNet, and into the base LM where it learns
   -> WC* = argmin of loss + lambda x distance among the variants of a source, for LensNet
"""

from typing import Annotated, TypedDict

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from megactx.focus.packed import Windows, accumulated, continuation_loss, encode_shown, unique_windows
from megactx.focus.window_variants import WindowVariants, focus_losses, make_variants, same_rows
from megactx.framework.config.types import ArgumentsOf, Count, NonNegative
from megactx.memory.pyramid import Attention

from .joint import JointStage
from .lens_labels import sizes_ahead
from .window_work import WindowWork

SOFT = {"lod1": 1, "lod2": 2}  # term -> LOD of the gist that is predicted


class WindowsPerDocument(TypedDict):
    """``sources`` (N1), ``variants`` (N2), and how many the base LM reads at once."""

    sources: Count
    variants: Count
    per_pass: Count


class EndToEndStage(JointStage):
    """All parts at once.

    Args:
        windows: ``sources`` (N1) and ``variants`` (N2, a multiple of N1) per document; ``per_pass``: windows that the
            base LM reads at once, the others wait: gradients are the same.
        weights: of the terms of the loss: ``window``, ``lens``, and of soft gists ``lod1`` and ``lod2``; within that of
            LensNet ``choice``, see ``focus_losses``.
        attention: keyword arguments of ``Attention``, by which windows are read, in training and in the report.
        distance: lambda, nats per share of a window's entries that edits create or remove.
        recompute: keep no activations of GistNet: they are computed again during backward.
        max_steps: length of the cosine.
        settings: of ``JointStage``.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    def __init__(
        self,
        windows: WindowsPerDocument,
        weights: dict[str, NonNegative],
        distance: NonNegative,
        recompute: bool,
        max_steps: Count,
        attention: Annotated[dict, ArgumentsOf(Attention)] | None = None,
        **settings,
    ):
        super().__init__(**settings)
        self.attention = Attention(**attention or {}).check(self.gistnet.block_size)
        sources, variants = windows["sources"], windows["variants"]
        if variants % sources or variants < 2 * sources:
            raise ValueError(
                f"stage.windows.variants={variants} is not allowed: a multiple of stage.windows.sources={sources}, at"
                " least twice as many"
            )
        self.shown: list[tuple[int, dict]] = []
        k, horizon = self.gistnet.block_size, self.hparams.horizon
        for term, lod in SOFT.items():
            if weights[term] and horizon % k**lod:
                raise ValueError(
                    f"stage.weights.{term}={weights[term]}: horizon.tokens={horizon} is no multiple of {k**lod}"
                )
            if weights[term] and (self.gistnet.left_context or self.gistnet.needs_hidden):
                raise ValueError(f"stage.weights.{term}={weights[term]}: a GistNet that reads more than its block: 0")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.learns("gist", "lens", "lora")

    def flops(self, batch: dict) -> float:
        """Of the step that was just taken."""
        work, documents, total = WindowWork.of(self), batch["windows"], 0.0
        for number, (document, (kinds, nodes)) in enumerate(zip(documents, self.shown, strict=True)):
            cursor = document["cursor"]
            horizon = len(document["ids"]) - cursor
            entries = self.budget(cursor, batch["index"] * len(documents) + number)
            total += work.tree(cursor) + work.full(cursor, horizon) + work.shown(nodes)
            total += 4 * work.lensnet(self.hparams.windows["sources"], entries) + kinds * work.window(entries, horizon)
        return total

    def training_step(self, batch: dict, batch_index: int) -> Tensor:
        documents, total = batch["windows"], 0.0
        self.shown = []  # of each document: kinds of windows that were read, and gists in them by level
        for number, document in enumerate(documents):
            text = batch["index"] * len(documents) + number
            losses = self.losses(document["ids"][None], document["cursor"], text)
            total = total + losses["loss"] / len(documents)
            for name, value in losses.items():
                self.log(f"train/{name}", value.detach(), prog_bar=name in ("loss", "window"))
        self.count_tokens(sum(len(document["ids"]) for document in documents))
        return total

    def flops_ahead(self, data: dict, preset: dict) -> float:
        """About how many floating-point operations the training takes; ``data`` and ``preset`` are of the config."""
        body, tokens, window = sizes_ahead(self, data)
        read = self.hparams.windows["variants"] * 3 * (window + self.hparams.horizon)
        return self.hparams.max_steps * data["documents"] * 2 * body * (2 * tokens + read)

    def losses(self, ids: Tensor, cursor: int, text: int) -> dict[str, Tensor]:
        """Of one document ids [1, C + H].

        Args:
            cursor: C.
            text: its number: all choices are a function of it and of the seed.

        Returns:
            ``loss``, its terms ``window``, ``lens``, ``lod1`` and ``lod2``, and what is only watched: ``cost`` (nats
            above the untouched base LM over the full context), ``best`` (the same of the best variants), ``kinds``.
        """
        hparams, before = self.hparams, ids[:, :cursor]
        generator = Generator().manual_seed(self.data.seed * 2**32 + text)
        with torch.no_grad():
            document = self.document(before)
            trees = same_rows(
                self.gistnet, self.base, document, hparams.windows["sources"], hparams.windows["variants"]
            )
        try:
            variants = make_variants(trees, self.budget(cursor, text), self.lens, dict(hparams.allocator), generator)
        except ValueError as error:
            raise ValueError(f"stage.budgets={list(hparams.budgets)}: {error}; take larger shares") from error
        total, found, kind = self.read(variants, document, ids, cursor)
        nll, full = found[:, 0][kind], found[0, 1]
        focus = focus_losses(self.lens, variants, nll, hparams.distance, hparams.weights["choice"])
        terms = {"window": found[:, 2].mean(), "lens": focus["loss"]}
        soft = self._soft(ids.shape[1] - cursor)
        terms |= {term: found[:, 3 + at].mean() for at, term in enumerate(SOFT) if term in soft}
        watched = {"cost": nll.mean() - full, "best": nll.view(-1, variants.each).amin(1).mean() - full}
        watched |= {name: focus[name] for name in ("huber", "choice", "gained")}
        watched["kinds"] = torch.tensor(float(len(found)))
        return {"loss": total + hparams.weights["lens"] * focus["loss"]} | terms | watched

    def read(self, variants: WindowVariants, document, ids: Tensor, cursor: int) -> tuple[Tensor, Tensor, Tensor]:
        """The packed pass: (the weighted loss, numbers of each kind of window [U, 5], the kind of each variant [N2]).

        Numbers are the NLL, that over the full context, the loss, and both soft terms, in nats but for the last two.
        """
        hparams, targets = self.hparams, ids[0, cursor:]
        first, kind = unique_windows(variants.context)
        windows, full = Windows.of(variants.context, self.attention)[first], self.full(ids, cursor)
        gists = encode_shown(self.gistnet, self.base, document, windows.nodes, hparams.recompute)
        self.shown.append((len(first), {lod: len(index) for lod, index in windows.nodes.items()}))
        with torch.no_grad(), self.original() as original:
            logits = original.logits(full).float()
            best = F.cross_entropy(logits, targets)
            true = {term: self._gists(self.base.embed(targets[None]), term) for term in self._soft(len(targets))}
        reference = self._reference[0] if self._reference else None

        def run(part: slice, gists: Tensor) -> tuple[Tensor, Tensor]:
            hidden = windows[part].read(self.base, gists, targets, self.gistnet)
            loss, nll = continuation_loss(self.base, hidden, full, targets, hparams.objective, reference)
            soft = self._soft_terms(hidden, true)
            total = hparams.weights["window"] * loss.mean(1) + sum(hparams.weights[term] * soft[term] for term in soft)
            terms = [soft.get(term, torch.zeros_like(nll[:, 0])) for term in SOFT]
            numbers = [nll.mean(1), best.expand(len(nll)), loss.mean(1), *terms]
            return total.sum() / len(first), torch.stack([number.detach().float() for number in numbers], dim=1)

        step = hparams.windows["per_pass"]
        parts = [slice(start, start + step) for start in range(0, len(first), step)]
        total, found = accumulated(run, parts, gists, [self.base, self.gistnet])
        return total, found, kind

    def _soft(self, horizon: int) -> list[str]:
        """Terms that have a weight; the answer to a planted question may be shorter than a block."""
        return [t for t, lod in SOFT.items() if self.hparams.weights[t] and horizon >= self.gistnet.block_size**lod]

    def _soft_terms(self, hidden: Tensor, true: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cosine distance of the gists of what is predicted from those of what comes: term -> [N].

        What is predicted is no token but a mean of all embeddings, by their probabilities; GistNet reads it all the
        same, so the gradient goes through it into the gists of the window.
        """
        if not true:
            return {}
        table = self.base.embed(torch.arange(self.base.vocab_size, device=hidden.device))  # as they are read
        expected = F.softmax(self.base.logits(hidden).float(), dim=-1).to(table.dtype) @ table  # [N, H, D]
        return {
            term: (1 - F.cosine_similarity(self._gists(expected, term), gists, dim=-1)).mean(1)
            for term, gists in true.items()
        }

    def _gists(self, embeddings: Tensor, term: str) -> Tensor:
        """embeddings [N, H, D] -> the gists of their whole spans of an LOD, [N, H / K^lod, D]."""
        (n, h, d), lod = embeddings.shape, SOFT[term]
        tokens = self.gistnet.block_size**lod
        spans = embeddings[:, : h // tokens * tokens].reshape(-1, tokens, d)
        return self.gistnet.encode_lod(spans, lod).view(n, -1, d)
