"""Stage ``core``: a base LM learns to read its facts from blocks of a knowledge tree (method 22).

Loss is on the answers to all questions of a window, which is read once. With the drop margin the answer to its first
question must also be less likely without the blocks that tell it:

    L_full + max(0, m - (L_drop - L_full)),   L in nats of an answer, means over questions, and over first questions

and with ``text`` the next tokens of the windows count too: weights that have read nothing learn to read by them.

The result is a Hugging Face folder that ``megactx.studies.cognitive_core`` measures over a tree.
"""

import shlex
from pathlib import Path
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.data.knowledge_module import Case
from megactx.evaluation.bootstrap import wilson
from megactx.evaluation.knowledge import ckri, value_nll
from megactx.evaluation.model_card import write_model_card
from megactx.evaluation.table import OVERALL, Report, Table, pivot
from megactx.framework.config.types import Count, NonNegative
from megactx.framework.files import IN_RUN, replacing
from megactx.framework.optimizers import fast_dtype
from megactx.lm import BaseLM
from megactx.lm.adapters import adapt, adapters_of, merged
from megactx.lm.masks import CAUSAL

from .base_lm import BaseLMStage
from .joint import Lora
from .work import Work

WINDOWS = ("with", "dropped", "without")  # the window, that without the needed blocks, and the question alone


class Questions(TypedDict):
    """Of the table at the end."""

    questions: Count


class CoreStage(BaseLMStage):
    """Training on questions behind windows of knowledge.

    Args:
        knowledge: whether questions can read the blocks; false is the control: they see the first token alone.
        margin: m, nats.
        text: weight of the NLL of a token of a window, in nats.
        lora: adapters of the base LM that learn in place of its weights, see ``adapt``, ``rank`` 0: the weights learn.
            They are in the model at the end.
        evaluate: ``questions``: held-out ones that the table at the end is measured on.
        settings: of ``BaseLMStage``.
    """

    stock = False  # its facts are read from a tree

    def __init__(
        self, knowledge: bool, margin: NonNegative, text: NonNegative, lora: Lora, evaluate: Questions, **settings
    ):
        super().__init__(evaluate=evaluate, **settings)
        if lora["rank"]:
            self.base.freeze()
            for parameter in adapt(self.base, **lora):
                parameter.requires_grad_(True)

    def groups(self) -> list[dict]:
        if not self.hparams.lora["rank"]:
            return super().groups()
        return [{"params": [*adapters_of(self.base).values()], "lr": self.hparams.adamw_lr, "weight_decay": 0.0}]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.hparams.lora["rank"] and str(self.trainer.precision).startswith("bf16"):
            self.base.to(torch.bfloat16)  # frozen weights need no fp32 master, whose casts every call would repeat
            for parameter in adapters_of(self.base).values():
                parameter.data = parameter.data.float()

    def flops_ahead(self, data: dict, preset: dict) -> float:
        step = Work.of_base(self.base)({"ids": torch.empty(data["batch"], data["tokens"], device="meta")})
        passes = 2 if self.hparams.knowledge and self.hparams.margin else 1
        return passes * step * self.hparams.max_steps * preset["accumulate"]

    def flops(self, batch: dict) -> Tensor | float:
        b, q, r = batch["asked"].shape
        read = [(b, batch["window"].shape[1] + q * r)]
        if self.hparams.knowledge and self.hparams.margin:
            read.append((b, batch["dropped"].shape[1] + r))
        return sum(self.work({"ids": torch.empty(shape, device="meta")}) for shape in read)

    def amounts(self, batch: dict) -> dict:
        return {"tokens": batch["window"].numel(), "documents": len(batch["window"])}

    def answer_nll(self, window: Tensor, lengths: Tensor, asked: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """NLL of each answer behind its window, nats for all of its tokens [B, Q], 0 where there is none; and the
        hidden states of the window [B, T, D].

        Args:
            window, lengths: ids [B, T], of which each row has the first ``lengths`` [B].
            asked, answers: ids [B, Q, R] behind the window, and which of them are the answer, bool [B, Q, R].
        """
        from transformers import DynamicCache

        (b, q, r), device = asked.shape, asked.device
        cache, places = DynamicCache(config=self.base.config), torch.arange(window.shape[1], device=device)
        # Padding is seen by no question.
        read = self.base(self.base.embed(window), places.expand_as(window), CAUSAL, cache)
        columns = [(layer.keys, layer.values) for layer in cache.layers]
        seen = lengths[:, None].expand(b, q)
        positions = seen[..., None] + torch.arange(r, device=device)
        hidden = self.base.forward_branches(self.base.embed(asked), positions, columns, seen)
        chosen = answers[..., 1:]
        nll = F.cross_entropy(
            self.base.logits(hidden[:, :, :-1][chosen]).float(), asked[..., 1:][chosen], reduction="none"
        )
        row, question, _ = chosen.nonzero(as_tuple=True)
        return nll.new_zeros(b * q).index_add(0, row * q + question, nll).view(b, q), read

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """A batch of ``CaseBatches`` -> ``full``, NLL of all answers [n]; and with a drop margin ``drop`` and
        ``margin`` [B]: NLL of the first answers, and how far each is from the margin; and ``text`` [m]: NLL of the
        tokens of all windows."""
        asked, answers, lengths = batch["asked"], batch["answers"], batch["lengths"]
        there = torch.arange(batch["window"].shape[1], device=lengths.device) < lengths[:, None]
        if not self.hparams.knowledge:
            lengths = torch.ones_like(lengths)  # the first token of a text; the window is read for nobody
        full, read = self.answer_nll(batch["window"], lengths, asked, answers)
        found = {"full": full[answers.any(dim=-1)]}
        if self.hparams.text:
            known = there[:, 1:]
            logits = self.base.logits(read[:, :-1][known]).float()
            found["text"] = F.cross_entropy(logits, batch["window"][:, 1:][known], reduction="none")
        if self.hparams.knowledge and self.hparams.margin:
            drop, _ = self.answer_nll(batch["dropped"], batch["dropped_lengths"], asked[:, :1], answers[:, :1])
            margin = F.relu(self.hparams.margin - (drop[:, 0] - full[:, 0]))
            found |= {"drop": drop[:, 0], "margin": margin}
        return found

    def training_step(self, batch: dict) -> Tensor:
        found = self.losses(batch)
        for name, values in found.items():
            count = values.new_tensor(float(len(values)))
            total, questions = self._over_processes(values.detach().sum(), count)
            self.log(LOGGED[name].format("train"), total / questions, prog_bar=name == "full")
        self.log("train/tokens", float(self.trainer.datamodule.tokens(self.global_step + 1)))
        weights = {"full": 1.0, "margin": 1.0, "text": self.hparams.text}
        return sum(weight * found[name].mean() for name, weight in weights.items() if name in found)

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.device)

    def validation_step(self, case: Case, batch_index: int) -> None:
        full, drop = (self.said(self.base, case, window) for window in WINDOWS[:2])
        right, wrong = float(full[case.right]), float(drop[case.right])
        margin = max(0.0, self.hparams.margin - (wrong - right))
        hit = float(int(full.argmin()) == case.right)
        self.sums += torch.tensor([right, wrong, margin, hit, 1.0], dtype=torch.float64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        *sums, count = self._over_processes(*self.sums)
        for name, total in zip(("full", "drop", "margin", "accuracy"), sums, strict=True):
            self.log(LOGGED[name].format("val"), total / count, prog_bar=name in ("full", "accuracy"))

    def said(self, base: BaseLM, case: Case, window: str) -> Tensor:
        """NLL of each value of a case behind one of ``WINDOWS`` [V]; the control reads none."""
        alone = case.window[:1]
        before = {"with": case.window, "dropped": case.dropped, "without": alone}[window]
        return value_nll(base, [*(before if self.hparams.knowledge else alone), *case.asked], case.values)

    def finish(self, folder: Path, datamodule) -> None:
        """Write ``folder/model``, a Hugging Face folder in bf16 with a card, and ``report``: held-out questions."""
        base = merged(self.base) if self.hparams.lora["rank"] else self.base
        base, tokenizer, final = base.to(torch.bfloat16).freeze(), datamodule.tokenizer, folder / "model"
        base.to(fast_dtype(self.device))
        cases = [datamodule.validation[n] for n in range(self.hparams.evaluate["questions"])]
        report = self.report(base, cases)
        base.to(torch.bfloat16)  # nothing is lost on the way
        with replacing(final, IN_RUN) as part:
            base.model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            write_model_card(part, self._facts_of(datamodule, report.table), Table())
        told = report.write(folder / "report")
        report.show()
        print(told)
        print(f"Model and card: {final}")
        print(f"Next: python -m megactx.studies.cognitive_core --model {shlex.quote(str(final))}")

    @torch.no_grad()
    def report(self, base: BaseLM, cases: list[Case]) -> Report:
        """Accuracy and NLL of held-out questions, with their window, without the needed blocks, and alone."""
        table = Table()
        found = [{window: self.said(base, case, window) for window in WINDOWS} for case in cases]
        for kind in (OVERALL, *dict.fromkeys(case.kind for case in cases)):
            own = [pair for pair in zip(cases, found, strict=True) if kind in (OVERALL, pair[0].kind)]
            about = {"domain": kind, "n": len(own)}
            nll = {}
            for window in WINDOWS:
                right = sum(int(nlls[window].argmin()) == case.right for case, nlls in own)
                table.add("accuracy", wilson(right, len(own))._asdict(), carrier=window, **about)
                nll[window] = [float(nlls[window][case.right]) for case, nlls in own]
                table.add("nll", sum(nll[window]) / len(own), carrier=window, **about)
            table.add("chance", sum(1 / len(case.values) for case, _ in own) / len(own), **about)
            table.add("CKRI", ckri(nll["with"], nll["dropped"]), **about)
            tokens = sum(len(case.values[case.right]) for case, _ in own)
            table.add("nll per token", sum(nll["with"]) / tokens, **about)
        columns = [(f"accuracy {name}", {"metric": "accuracy", "carrier": name}) for name in WINDOWS]
        columns += [("chance", "chance", ".3f")]
        columns += [(f"L {name}", {"metric": "nll", "carrier": name}) for name in WINDOWS] + [("CKRI", "CKRI")]
        title = f"{len(cases)} questions about people of no training window"
        sheet = pivot(title, table, columns, "domain", "question")
        legend = "dropped: without the needed blocks. without: the question alone. L: NLL of the right answer in nats."
        return Report("A core that reads its facts", table, [sheet], f"{legend} Brackets: 95 %, Wilson.")

    def _facts_of(self, datamodule, table: Table) -> dict:
        h = self.hparams
        rates = f"Muon {h.muon_lr} for matrices, AdamW {h.adamw_lr} for the rest"
        if h.lora["rank"]:
            rates = f"AdamW {h.adamw_lr}"
        read = "read behind blocks of generated knowledge" if h.knowledge else "alone: the control without knowledge"
        return {
            **h.card,
            "weights": h.weights,
            "steps": self.global_step,
            "tokens": datamodule.tokens(self.global_step),
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "validation": {
                f"answers, {kind}": table.point(metric="nll per token", domain=kind) for kind in table.names("domain")
            },
            "training": {
                "loss": f"on answers to questions {read}",
                "drop margin": f"{h.margin} nat" if h.knowledge else "none",
                "a step": f"{datamodule.batch} windows, with a question at most {datamodule.row} tokens, up to"
                f" {datamodule.settings['questions']} questions each",
                "what learned": f"adapters of rank {h.lora['rank']}, {h.lora['layers']} layers"
                if h.lora["rank"]
                else "all",
                "optimizer": f"{rates}, linear decay over the last {h.decay:.0%}",
            },
        }


LOGGED = {"full": "{}/nll", "drop": "{}/nll_drop", "margin": "{}/margin", "accuracy": "{}/accuracy"}
LOGGED |= {"text": "{}/nll_text"}
