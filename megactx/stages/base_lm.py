"""Stage ``base_lm``: train a small base LM that uses its context, from random weights or from those of an earlier one.

Muon for the matrices with AdamW for the rest, warm-up, flat, linear decay; lengths grow as ``PretrainingBatches`` says.
The result is a Hugging Face folder with a model card of measured figures.
"""

import logging
import random
import re
from pathlib import Path
from typing import Annotated, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.data.documents import VALIDATION, cut
from megactx.data.tokenizer import bos_id, with_chat
from megactx.evaluation.context_use import context_use
from megactx.evaluation.model_card import write_model_card
from megactx.evaluation.table import OVERALL, Table
from megactx.framework.config.types import ArgumentsOf, Count, NonNegative, Share, Whole
from megactx.framework.files import IN_RUN, replacing
from megactx.framework.optimizers import fast_dtype, warmup_stable_decay
from megactx.framework.run.next_command import next_command
from megactx.framework.run.resume import differences
from megactx.gist import GistNet
from megactx.gist.compressors import build
from megactx.lm import BaseLM
from megactx.lm.masks import CAUSAL

from .base_gists import DROPPED, GISTS, drawn_cut, nll_behind
from .gist_nets import groups_of
from .stage import Stage
from .work import Work

log = logging.getLogger(__name__)


class Evaluate(TypedDict):
    """Of the model card."""

    documents: Count


class BaseLMStage(Stage):
    """Next-token training of a base LM from random weights.

    Args:
        config: Hugging Face config with ``model_type``; the vocabulary and special ids are the tokenizer's. ``None``:
            that of ``weights``; where their tokenizer has no chat template, rows of its special tokens are added.
        weights: Hugging Face name, folder or ``asset:NAME`` of that config to go on from; ``None``: random weights.
        muon_lr, adamw_lr, weight_decay: optimizer settings.
        warmup: steps of linear warm-up.
        decay: share of all steps in the final linear decay.
        max_steps: optimizer steps in all.
        card: what the model card says of ``name``, ``data`` and ``license``.
        evaluate: ``documents``: held-out ones that the model card is measured on.
        gists: share of the steps in whose windows older text stands as gists of a GistNet that learns along, see
            ``nll_behind``; 0: none of them, and no GistNet. ``experiment=demo stage.init=RUN base.name=RUN/model`` goes
            on with it.
        gistnet: keyword arguments of ``GistNet`` other than width and scale, for ``gists``.
    """

    shorter = "preset.steps=N sets the length"
    monitor, timed = "val/nll", True
    betas = (0.9, 0.95)
    takes = {"tokenizer": "base.name", "base": "base.name"}
    gives = {"base": "model"}
    stock = True

    def __init__(
        self,
        config: dict | None,
        weights: str | None,
        muon_lr: NonNegative,
        adamw_lr: NonNegative,
        weight_decay: NonNegative,
        warmup: Whole,
        decay: Share,
        max_steps: Count,
        card: dict,
        evaluate: Evaluate,
        gists: Share = 0.0,
        gistnet: Annotated[dict | None, ArgumentsOf(GistNet)] = None,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.check_settings()
        self.nets, self.cut = torch.nn.ModuleDict(), 0
        # Without a row for padding, which no window has: transformers would never train it, whatever token it is of.
        if config is None and weights is None:
            raise ValueError("stage.config=null is not allowed: set it, or stage.weights, whose own it is then")
        if config is None:
            self.base = _as_it_is(weights)
        else:
            self.base = BaseLM.from_config(config | dict.fromkeys(SPECIAL))
            if weights is not None:
                self._start_from(weights)
        if gists and type(self).training_step is not BaseLMStage.training_step:
            raise ValueError(f"stage.gists={gists} is not allowed here: of base training alone")
        if gists:
            self.nets["gistnet"] = gistnet_beside(self.base, gistnet or {})

    def _start_from(self, weights: str) -> None:
        there, mine = BaseLM.from_pretrained(weights, "float32", "stage.weights").model, self.base.model
        given, wanted = there.state_dict(), mine.state_dict()
        wrong = [name for name in {**given, **wanted} if name not in given or name not in wanted]
        wrong += [name for name in given if name in wanted and given[name].shape != wanted[name].shape]
        if wrong:
            raise ValueError(
                f"stage.weights={weights} are not of stage.config: {len(wrong)} tensors are missing, too many or of"
                f" another shape, the first is {wrong[0]}"
            )
        if changes := changed_function(there.config.to_dict(), mine.config.to_dict()):
            raise ValueError(
                f"stage.weights={weights} are not of stage.config, which makes another function of them:"
                f" {'; '.join(changes)}. Set stage.config alike"
            )
        mine.load_state_dict(given)
        # Two names of one tensor here that were two tensors there: the second has overwritten the first.
        if lost := next((name for name, value in mine.state_dict().items() if not value.equal(given[name])), None):
            raise ValueError(f"stage.weights={weights} are not of stage.config: {lost} is one tensor with another here")

    def flops_ahead(self, data: dict, preset: dict) -> float:
        work, left, total = Work.of_base(self.base), self.hparams.max_steps, 0.0
        for phase in data["phases"]:
            last = phase is data["phases"][-1]
            steps = left if last else min(left, phase["steps"])
            total += steps * work({"ids": torch.empty(phase["batch"], phase["tokens"])})
            left -= steps
        return total * preset["accumulate"]

    def prepare(self, datamodule) -> None:
        """Take the tokenizer's special ids, and refuse one with ids beyond the embedding rows."""
        ids, asked = len(datamodule.tokenizer), self.hparams.config or {}
        datamodule.limit_to(self.base.max_positions)
        for net in self.nets.values():
            shortest = min(phase["tokens"] for phase in datamodule.phases)
            if shortest < 4 * net.block_size:
                raise ValueError(
                    f"datamodule.phases: tokens={shortest} is not allowed with stage.gists: at least 4 blocks of"
                    f" block_size={net.block_size}"
                )
        if ids > self.base.vocab_size:
            raise ValueError(
                f"stage.config.vocab_size={self.base.vocab_size} is too small: the tokenizer of base.name has {ids} ids"
            )
        for name, value in special_ids(datamodule.tokenizer).items():
            if asked.get(name) not in (None, value):
                given = asked[name]
                log.warning("stage.config.%s=%s does not count: the tokenizer of base.name says %s", name, given, value)
            for config in (self.base.config, self.base.model.generation_config):
                setattr(config, name, value)

    def loss_per_token(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids, positions [B, T] -> NLL [B, T - 1] in nats."""
        hidden = self.base(self.base.embed(ids), positions, CAUSAL)
        logits = self.base.logits(hidden[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)

    def training_step(self, batch: dict) -> Tensor:
        draw, self.cut = random.Random(f"gists/{self.global_step}"), 0  # alike in all processes, and after a resume
        if self.nets and draw.random() < self.hparams.gists:
            self.cut = drawn_cut(draw, batch["ids"].shape[1], self.nets["gistnet"].block_size)
            nll, told = nll_behind(self.base, self.nets["gistnet"], batch, self.cut, GISTS)
            copied = batch["copied"][:, told]
            self.log("train/nll_gists", nll.detach().mean(), sync_dist=True)
        else:
            nll = self.loss_per_token(batch["ids"], batch["positions"])
            copied = batch["copied"][:, 1:]
        for name, chosen in (("train/nll", ~copied), ("train/nll_copied", copied)):
            total, count = self._over_processes(nll.detach()[chosen].sum(), chosen.sum())
            if count:  # not every batch has a passage that comes back
                self.log(name, total / count, prog_bar=True)
        self.log("train/tokens", float(self.trainer.datamodule.tokens(self.global_step + 1)))
        return nll.mean()

    def _over_processes(self, *values: Tensor) -> Tensor:
        """Scalars -> their sums over all processes [n], float64."""
        return self.trainer.strategy.reduce(torch.stack([value.double() for value in values]), reduce_op="sum")

    def on_validation_epoch_start(self) -> None:
        # NLL, NLL of copies, batches; and NLL behind gists, and behind nothing, above that behind the tokens
        self.sums = torch.zeros(5, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict, batch_index: int) -> None:
        nll = self.loss_per_token(batch["ids"], batch["positions"])
        copied, above = batch["copied"][:, 1:], nll.new_zeros(2)
        if self.nets:
            cut = drawn_cut(random.Random(f"held out/{batch_index}"), nll.shape[1], self.nets["gistnet"].block_size)
            behind = []
            for older in (GISTS, DROPPED):
                found, told = nll_behind(self.base, self.nets["gistnet"], batch, cut, older)
                behind.append(found[:, told >= cut].mean())
            above = torch.stack(behind) - nll[:, cut - 1 :].mean()
        found = torch.stack([nll[~copied].mean(), nll[copied].mean(), nll.new_ones(())])
        self.sums += torch.cat([found, above]).double()

    def on_validation_epoch_end(self) -> None:
        # Processes may have had different numbers of batches.
        nll, copied, batches, gists, dropped = self._over_processes(*self.sums)
        self.log("val/nll", nll / batches, prog_bar=True)
        self.log("val/nll_copied", copied / batches, prog_bar=True)
        if self.nets:
            self.log("val/dnll_gists", gists / batches, prog_bar=True)
            self.log("val/dnll_dropped", dropped / batches)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.work = Work.of_base(self.base)  # which keeps its fp32 weights: it learns

    def flops(self, batch: dict) -> Tensor | float:
        if not self.cut:
            return self.work(batch)
        (b, t), net = batch["ids"].shape, self.nets["gistnet"]
        gists = self.cut // net.block_size - 1
        read = {"ids": torch.empty(b, t - gists * (net.block_size - 1), device="meta")}
        return self.work(read) + 3 * b * gists * net.flops_per_block(self.base)

    def amounts(self, batch: dict) -> dict:
        return {"tokens": batch["ids"].numel(), "documents": len(batch["ids"])}

    def groups(self) -> list[dict]:
        matrices, others = [], []
        embeddings = {id(p) for p in self.base.model.get_input_embeddings().parameters()}
        embeddings |= {id(p) for p in self.base.model.get_output_embeddings().parameters()}
        for p in self.base.parameters():
            (matrices if p.ndim == 2 and id(p) not in embeddings else others).append(p)
        h = self.hparams
        groups = [
            {"params": matrices, "lr": h.muon_lr, "weight_decay": h.weight_decay, "muon": True},
            {"params": others, "lr": h.adamw_lr, "weight_decay": 0.0},  # embeddings and norms are not pulled to 0
        ]
        if self.nets:
            groups += groups_of(self.nets, h.adamw_lr, h.muon_lr, h.weight_decay, {})
        return groups

    def factor(self, step: int, group: dict) -> float:
        return warmup_stable_decay(step, self.hparams.warmup, self.hparams.max_steps, self.hparams.decay)

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
        for row in use.pick(metric="copy_gain", domain=OVERALL):
            print(f"A passage the second time, at distance {row['span']}: {row['point']:+.2f} nat per token gained")
        print(f"Model and card: {final}")
        kept = {"keep": ("data", "trainer"), "options": ("preset",)}
        init = {"stage.init": folder} if self.nets else {}
        print(f"Next: {next_command(folder, 'demo', {'base.name': final} | init, **kept)}")

    def _context_use(self, base: BaseLM, datamodule) -> Table:
        held_out, _ = cut(datamodule.rows, VALIDATION, datamodule.tokenizer, 1, min(CARD_TOKENS, base.max_positions))
        # All in windows of one length, so that the same documents stand in every row of a table.
        length = max(len(document["input_ids"]) for document in held_out)
        documents = [document for document in held_out if len(document["input_ids"]) == length]
        return context_use(base, _balanced(documents, self.hparams.evaluate["documents"]), length)

    def _facts(self, datamodule, use: Table) -> dict:
        h, losses = self.hparams, use.pick(metric="loss_by_position")
        each = datamodule.each
        windows = ", ".join(f"{p['steps']} steps of {p['batch'] * each} x {p['tokens']}" for p in datamodule.phases)
        return {
            **h.card,
            "weights": h.weights,
            "steps": self.global_step,
            "tokens": datamodule.tokens(self.global_step),
            "parameters": sum(p.numel() for p in self.base.parameters()),
            "validation": {domain: _mean_loss(losses.pick(domain=domain)) for domain in losses.names("domain")},
            "training": {
                "windows of tokens": windows,
                "optimizer": f"Muon {h.muon_lr} for matrices, AdamW {h.adamw_lr} for the rest, linear decay over the "
                f"last {h.decay:.0%}",
                "windows in which a passage comes back": f"{datamodule.repeat:.0%}",
                "windows with position skips": f"{datamodule.settings['skip']:.0%}",
            },
        }


def gistnet_beside(base: BaseLM, settings: dict) -> GistNet:
    """A GistNet that learns with a base LM, from embeddings alone: what the base LM's layers say changes meanwhile.

    Raises:
        ValueError: a setting that wants more than embeddings, or several vectors of a block.
    """
    net = build(base, settings, "gistnet")
    for name, value, allowed in (("slots", 1, not net.makes_levels), ("context", 0, net.left_context)):
        if allowed:
            raise ValueError(f"gistnet.{name}={settings[name]} is not allowed with stage.gists: {value}")
    if net.reads_layers:
        raise ValueError("gistnet.type=base and gistnet.input=hidden are not allowed with stage.gists")
    return net


def _as_it_is(weights: str) -> BaseLM:
    """A base LM with its own config, and a row for each sign of a chat template: the mean of the others."""
    there = BaseLM.from_pretrained(weights, "float32", "stage.weights")
    model, ids = there.model, len(with_chat(there.tokenizer))
    table = model.get_input_embeddings()
    table.padding_idx = None  # it would never be trained, whatever token it is of
    if ids > (before := there.vocab_size):
        model.resize_token_embeddings(ids, mean_resizing=False)
        with torch.no_grad():
            for rows in {id(rows): rows for rows in (table_of(model) for table_of in TABLES)}.values():
                rows[before:] = rows[:before].mean(0)
    return BaseLM(model)


TABLES = (lambda model: model.get_input_embeddings().weight, lambda model: model.get_output_embeddings().weight)


def special_ids(tokenizer) -> dict[str, int | None]:
    """What a config says of a tokenizer. An id that texts have, such as that which opens them, is none of padding."""
    in_texts = (bos_id(tokenizer), tokenizer.unk_token_id)
    found = {name: getattr(tokenizer, name) for name in SPECIAL}
    return found | {"pad_token_id": None if found["pad_token_id"] in in_texts else found["pad_token_id"]}


SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
CARD_TOKENS = 4096  # the longest windows that the model card is measured on

# Of a Hugging Face config: where it came from, special ids, what is drawn at random, and what a caller may ask for. All
# else may change what the same weights compute, so a setting that nobody here knows counts.
NO_FUNCTION = re.compile(
    r"_name_or_path|architectures|transformers_version|(torch_)?dtype|use_cache|(bos|eos|pad|sep|cls|unk)_token_id"
    r"|initializer_(range|factor)|.*(dropout|pdrop|_drop)(_prob|_rate)?|pretraining_tp|id2label|label2id|problem_type"
    r"|return_dict|output_\w+|chunk_size_feed_forward|attn_implementation|experts_implementation|.*_loss_coef|auto_map|summary_\w+"
    r"|use_return_dict|task_specific_params|gradient_checkpointing"
)


def changed_function(there: dict, here: dict) -> list[str]:
    """``key: there -> here`` of the settings of two Hugging Face configs that make another function of one set of
    weights, the kind of model first. Positions beyond those of training are a matter of the length only."""
    kinds = {str(_rotary(config).get("rope_type", "default")) for config in (there, here)}
    free = {"max_position_embeddings"} if kinds <= {"default", "linear", "llama3"} else set()

    def told(config: dict) -> dict:
        return {key: value for key, value in config.items() if key not in free and not NO_FUNCTION.fullmatch(key)}

    changes = differences(told(there), told(here))
    return sorted(changes, key=lambda change: not change.startswith("model_type"))


def _rotary(config: dict) -> dict:
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


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


def _mean_loss(buckets: Table) -> float:
    """Mean over all positions from the means of buckets whose spans are named ``first-last``."""
    spans, means = [row["span"].split("-") for row in buckets], [row["point"] for row in buckets]
    widths = [int(last) - int(first) + 1 for first, last in spans]
    return sum(w * m for w, m in zip(widths, means, strict=True)) / sum(widths)
