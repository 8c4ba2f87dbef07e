"""Stage ``base_lm``: train a small base LM that uses its context, from random weights or from those of an earlier one.

Muon for the matrices with AdamW for the rest, warm-up, flat, linear decay; lengths grow as ``PretrainingBatches`` says.
The result is a Hugging Face folder with a model card of measured figures.
"""

from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.data.documents import VALIDATION, cut
from megactx.evaluation.context_use import context_use
from megactx.evaluation.model_card import write_model_card
from megactx.framework.files import IN_RUN, replacing
from megactx.framework.optimizers import MuonWithAdamW, fast_dtype, warmup_stable_decay
from megactx.lm import BaseLM
from megactx.lm.masks import CAUSAL


class BaseLMStage(lightning.LightningModule):
    """Next-token training of a base LM from random weights.

    Args:
        config: Hugging Face config with ``model_type``; the vocabulary and special ids are the tokenizer's.
        weights: Hugging Face name, folder or ``asset:NAME`` of that config to go on from; ``None``: random weights.
        muon_lr, adamw_lr, weight_decay: optimizer settings.
        warmup: steps of linear warm-up.
        decay: share of all steps in the final linear decay.
        max_steps: optimizer steps in all.
        card: what the model card says of ``name``, ``data`` and ``license``.
    """

    monitor = "val/nll"  # of which a new minimum is worth a checkpoint

    def __init__(
        self,
        config: dict,
        weights: str | None,
        muon_lr: float,
        adamw_lr: float,
        weight_decay: float,
        warmup: int,
        decay: float,
        max_steps: int,
        card: dict,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.base = BaseLM.from_config(config)
        if weights is not None:
            self._start_from(weights)

    def _start_from(self, weights: str) -> None:
        given, wanted = BaseLM.from_pretrained(weights, "float32").model.state_dict(), self.base.model.state_dict()
        wrong = [name for name in {**given, **wanted} if name not in given or name not in wanted]
        wrong += [name for name in given if name in wanted and given[name].shape != wanted[name].shape]
        if wrong:
            raise ValueError(
                f"stage.weights={weights} are not of stage.config: {len(wrong)} tensors are missing, too many or of"
                f" another shape, the first is {wrong[0]}"
            )
        self.base.model.load_state_dict(given)

    def prepare(self, datamodule) -> None:
        """Refuse a tokenizer with ids beyond the embedding rows."""
        ids = len(datamodule.tokenizer)
        if ids > self.base.vocab_size:
            raise ValueError(
                f"stage.config.vocab_size={self.base.vocab_size} is too small: the tokenizer of base.name has {ids} ids"
            )

    def loss_per_token(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids, positions [B, T] -> NLL [B, T - 1] in nats."""
        hidden = self.base(self.base.embed(ids), positions, CAUSAL)
        logits = self.base.logits(hidden[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)

    def training_step(self, batch: dict) -> Tensor:
        nll = self.loss_per_token(batch["ids"], batch["positions"])
        copied = batch["copied"][:, 1:]
        for name, chosen in (("train/nll", ~copied), ("train/nll_copied", copied)):
            total, count = self._over_processes(nll.detach()[chosen].sum(), chosen.sum())
            if count:  # not every batch has a passage that comes back
                self.log(name, total / count, prog_bar=True)
        self.log("train/tokens", float((self.global_step + 1) * batch["ids"].numel() * self.trainer.world_size))
        return nll.mean()

    def _over_processes(self, *values: Tensor) -> Tensor:
        """Scalars -> their sums over all processes [n], float64."""
        return self.trainer.strategy.reduce(torch.stack([value.double() for value in values]), reduce_op="sum")

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # NLL, NLL of copies, batches

    def validation_step(self, batch: dict, batch_index: int) -> None:
        nll = self.loss_per_token(batch["ids"], batch["positions"])
        copied = batch["copied"][:, 1:]
        self.sums += torch.stack([nll[~copied].mean(), nll[copied].mean(), nll.new_ones(())]).double()

    def on_validation_epoch_end(self) -> None:
        nll, copied, batches = self._over_processes(*self.sums)  # processes may have had different numbers of batches
        self.log("val/nll", nll / batches, prog_bar=True)
        self.log("val/nll_copied", copied / batches, prog_bar=True)

    def configure_optimizers(self):
        matrices, others = [], []
        embeddings = {id(p) for p in self.base.model.get_input_embeddings().parameters()}
        embeddings |= {id(p) for p in self.base.model.get_output_embeddings().parameters()}
        for p in self.base.parameters():
            (matrices if p.ndim == 2 and id(p) not in embeddings else others).append(p)
        h = self.hparams
        optimizer = MuonWithAdamW(
            [
                {"params": matrices, "lr": h.muon_lr, "weight_decay": h.weight_decay, "muon": True},
                {"params": others, "lr": h.adamw_lr, "weight_decay": 0.0},  # embeddings and norms are not pulled to 0
            ],
            betas=(0.9, 0.95),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warmup_stable_decay(step, h.warmup, h.max_steps, h.decay)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def finish(self, folder: Path, datamodule) -> None:
        """Write ``folder/model``: a Hugging Face folder in bf16 with tokenizer and a model card of measured figures."""
        print("Measuring how the base uses its context", flush=True)
        base, tokenizer = self.base.to(torch.bfloat16).freeze(), datamodule.tokenizer  # as it is kept
        final, use = folder / "model", self._context_use(base.to(fast_dtype(self.device)), datamodule)
        base.to(torch.bfloat16)  # nothing is lost on the way
        with replacing(final, IN_RUN) as part:
            base.model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            write_model_card(part, self._facts(datamodule, use), use)
        for distance, value in use["copy_gain"].get("overall", {}).items():
            print(f"A passage the second time, at distance {distance}: {value['mean']:+.2f} nat per token gained")
        print(f"Model and card: {final}")
        print(f"Next: python train.py experiment=demo base.name={final}")

    @staticmethod
    def _context_use(base: BaseLM, datamodule) -> dict:
        held_out, _ = cut(datamodule.rows, VALIDATION, datamodule.tokenizer, 1, min(CARD_TOKENS, base.max_positions))
        # All in windows of one length, so that the same documents stand in every row of a table.
        length = max(len(document["input_ids"]) for document in held_out)
        documents = [document for document in held_out if len(document["input_ids"]) == length]
        return context_use(base, _balanced(documents, CARD_DOCUMENTS), length)

    def _facts(self, datamodule, use: dict) -> dict:
        h = self.hparams
        windows = ", ".join(f"{p['steps']} steps of {p['batch']} x {p['tokens']}" for p in datamodule.phases)
        return {
            **h.card,
            "weights": h.weights,
            "steps": self.global_step,
            "tokens": datamodule.tokens(self.global_step),
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "validation": {domain: _mean_loss(buckets) for domain, buckets in use["loss_by_position"].items()},
            "training": {
                "windows of tokens": windows,
                "optimizer": f"Muon {h.muon_lr} for matrices, AdamW {h.adamw_lr} for the rest, linear decay over the "
                f"last {h.decay:.0%}",
                "windows in which a passage comes back": f"{datamodule.repeat:.0%}",
                "windows with position skips": f"{datamodule.settings['skip']:.0%}",
            },
        }


CARD_DOCUMENTS, CARD_TOKENS = 90, 4096  # what the model card is measured on


def _balanced(documents: list[dict], count: int) -> list[dict]:
    """At most ``count`` documents, in equal parts of every domain, the first of each text first."""
    order, seen = [], {}
    for document in documents:
        piece = seen[document["text"]] = seen.get(document["text"], -1) + 1
        order.append((piece, document["text"], document))
    domains = sorted({document["domain"] for document in documents})
    out = []
    for domain in domains:
        own = sorted((entry for entry in order if entry[2]["domain"] == domain), key=lambda entry: entry[:2])
        out += [document for *_, document in own[: count // len(domains)]]
    return out


def _mean_loss(buckets: dict) -> float:
    """Mean over all positions from the means of buckets named ``first-last``."""
    widths = [int(name.split("-")[1]) - int(name.split("-")[0]) + 1 for name in buckets]
    means = [value["mean"] for value in buckets.values()]
    return sum(w * m for w, m in zip(widths, means, strict=True)) / sum(widths)
