"""Stage ``sft``: a base LM learns to answer, from conversations by its chat template.

Loss is on answers alone, each with the end of its turn. Several conversations share a row; none sees another, and the
positions of each begin at 0. The result is a Hugging Face folder that ``megactx.apps.chat`` talks with.
"""

import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.data.turns import Turns
from megactx.evaluation.model_card import write_model_card
from megactx.evaluation.table import Table
from megactx.framework.files import IN_RUN, replacing
from megactx.lm import masks

from .base_lm import BaseLMStage
from .work import Work


class SFTStage(BaseLMStage):
    """Training on answers. Arguments are those of ``BaseLMStage``."""

    def flops_ahead(self, data: dict, preset: dict) -> float:
        batch = {"ids": torch.empty(data["batch"], data["tokens"], device="meta")}
        return Work.of_base(self.base)(batch) * self.hparams.max_steps * preset["accumulate"]

    def losses(self, batch: dict) -> Tensor:
        """A packed batch -> NLL in nats of every token of an answer, in order [A]; see ``ConversationBatches``."""
        mask = masks.packed(batch["conversation"])
        hidden = self.base(self.base.embed(batch["ids"]), batch["positions"], mask)
        answers = batch["answers"][:, 1:]
        logits = self.base.logits(hidden[:, :-1][answers])
        return F.cross_entropy(logits.float(), batch["ids"][:, 1:][answers], reduction="none")

    def training_step(self, batch: dict) -> Tensor:
        nll = self.losses(batch)
        total, count = self._over_processes(nll.detach().sum(), nll.new_tensor(len(nll)))
        self.log("train/nll", total / count, prog_bar=True)
        self.log("train/answer_tokens", count.float())
        self.log("train/tokens", float(self.trainer.datamodule.tokens(self.global_step + 1)))
        return nll.mean()

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # NLL, tokens of answers

    def validation_step(self, batch: dict, batch_index: int) -> None:
        nll = self.losses(batch)
        self.sums += torch.stack([nll.double().sum(), nll.new_tensor(len(nll)).double()])

    def on_validation_epoch_end(self) -> None:
        nll, count = self._over_processes(*self.sums)
        self.log("val/nll", nll / count, prog_bar=True)

    def finish(self, folder: Path, datamodule) -> None:
        """Write ``folder/model``: a Hugging Face folder in bf16 with tokenizer, chat template and a model card."""
        tokenizer, final = datamodule.tokenizer, folder / "model"
        reached = self.trainer.callback_metrics.get("val/nll")
        base = self.base.to(torch.bfloat16).freeze()
        base.model.generation_config.eos_token_id = _ends(tokenizer)
        with replacing(final, IN_RUN) as part:
            base.model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            write_model_card(part, self._card(datamodule, reached), Table())
        print(f"Model and card: {final}")
        print(f"Next: python -m megactx.apps.chat --megacontext none --model {shlex.quote(str(final))}")

    def _card(self, datamodule, reached: Tensor | None) -> dict:
        h = self.hparams
        return {
            **h.card,
            "weights": h.weights,
            "steps": self.global_step,
            "tokens": datamodule.tokens(self.global_step),
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "validation": {} if reached is None else {"answers of held-out conversations": float(reached)},
            "training": {
                "loss": "on answers and the ends of their turns",
                "rows": f"{datamodule.batch} of {datamodule.row} tokens, several conversations in each",
                "optimizer": f"Muon {h.muon_lr} for matrices, AdamW {h.adamw_lr} for the rest, linear decay over the "
                f"last {h.decay:.0%}",
            },
        }


def _ends(tokenizer) -> list[int]:
    """Ids that end an answer: EOS, and the template's own end of a turn, which is often another one."""
    asked = {"role": "user", "content": "."}
    ids, answers = Turns(tokenizer)([asked, {"role": "assistant", "content": "."}])
    own = int(ids[answers.nonzero()[0][-1]])
    return list(dict.fromkeys(one for one in (tokenizer.eos_token_id, own) if one is not None))
