"""Stage ``core``: a base LM learns to read its facts from blocks of a knowledge tree (method 22).

Loss is on the answers. With the drop margin the answer must also be less likely without the blocks that tell it:

    L_full + max(0, m - (L_drop - L_full)),   L in nats of an answer, a mean over questions

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
from megactx.lm.masks import CAUSAL

from .base_lm import BaseLMStage
from .work import Work

WINDOWS = ("with", "dropped", "without")  # the window, that without the needed blocks, and the question alone


class Questions(TypedDict):
    """Of the table at the end."""

    questions: Count


class CoreStage(BaseLMStage):
    """Training on questions behind windows of knowledge.

    Args:
        knowledge: whether questions can read the blocks; false is the control: the same tokens without a window.
        margin: m, nats.
        evaluate: ``questions``: held-out ones that the table at the end is measured on.
        settings: of ``BaseLMStage``.
    """

    def __init__(self, knowledge: bool, margin: NonNegative, evaluate: Questions, **settings):
        super().__init__(evaluate=evaluate, **settings)

    def flops_ahead(self, data: dict, preset: dict) -> float:
        batch = {"ids": torch.empty(data["batch"], data["tokens"], device="meta")}
        passes = 2 if self.hparams.knowledge else 1
        return passes * Work.of_base(self.base)(batch) * self.hparams.max_steps * preset["accumulate"]

    def flops(self, batch: dict) -> Tensor | float:
        return self.work(batch) * (2 if "dropped" in batch else 1)

    def answer_nll(self, ids: Tensor, answers: Tensor) -> Tensor:
        """ids [B, T], answers bool [B, T] -> NLL of each row's answer, nats for all of its tokens [B]."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden = self.base(self.base.embed(ids), positions, CAUSAL)  # padding stands behind, where nobody looks
        chosen = answers[:, 1:]
        nll = F.cross_entropy(self.base.logits(hidden[:, :-1][chosen]).float(), ids[:, 1:][chosen], reduction="none")
        return nll.new_zeros(len(ids)).index_add(0, chosen.nonzero()[:, 0], nll)

    def losses(self, batch: dict) -> dict[str, Tensor]:
        """A batch of ``CaseBatches`` -> ``full`` [B], and where there is something to drop, ``drop`` and ``margin``
        [B]: how far each question is from the drop margin."""
        if "dropped" not in batch:
            return {"full": self.answer_nll(batch["ids"], batch["answers"])}
        both = (torch.cat([batch[a], batch[b]]) for a, b in (("ids", "dropped"), ("answers", "dropped_answers")))
        full, drop = self.answer_nll(*both).chunk(2)
        return {"full": full, "drop": drop, "margin": F.relu(self.hparams.margin - (drop - full))}

    def training_step(self, batch: dict) -> Tensor:
        found = self.losses(batch)
        count = found["full"].new_tensor(float(len(found["full"])))
        for name, values in found.items():
            total, questions = self._over_processes(values.detach().sum(), count)
            self.log(LOGGED[name].format("train"), total / questions, prog_bar=name == "full")
        self.log("train/tokens", float(self.trainer.datamodule.tokens(self.global_step + 1)))
        return found["full"].mean() + (found["margin"].mean() if "margin" in found else 0.0)

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.device)

    def validation_step(self, case: Case, batch_index: int) -> None:
        full, drop = (said(self.base, case, window) for window in WINDOWS[:2])
        right, wrong = float(full[case.right]), float(drop[case.right])
        margin = max(0.0, self.hparams.margin - (wrong - right))
        hit = float(int(full.argmin()) == case.right)
        self.sums += torch.tensor([right, wrong, margin, hit, 1.0], dtype=torch.float64, device=self.device)

    def on_validation_epoch_end(self) -> None:
        *sums, count = self._over_processes(*self.sums)
        for name, total in zip(("full", "drop", "margin", "accuracy"), sums, strict=True):
            self.log(LOGGED[name].format("val"), total / count, prog_bar=name in ("full", "accuracy"))

    def finish(self, folder: Path, datamodule) -> None:
        """Write ``folder/model``, a Hugging Face folder in bf16 with a card, and ``report``: held-out questions."""
        base, tokenizer, final = self.base.to(torch.bfloat16).freeze(), datamodule.tokenizer, folder / "model"
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
        found = [{window: said(base, case, window) for window in WINDOWS} for case in cases]
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
                "rows": f"{datamodule.batch} of {datamodule.row} tokens",
                "optimizer": f"Muon {h.muon_lr} for matrices, AdamW {h.adamw_lr} for the rest, linear decay over the "
                f"last {h.decay:.0%}",
            },
        }


LOGGED = {"full": "{}/nll", "drop": "{}/nll_drop", "margin": "{}/margin", "accuracy": "{}/accuracy"}


def said(base: BaseLM, case: Case, window: str) -> Tensor:
    """NLL of each value of a case behind one of ``WINDOWS`` [V]."""
    before = {"with": case.window, "dropped": case.dropped, "without": case.window[:1]}[window]
    return value_nll(base, [*before, *case.asked], case.values)
