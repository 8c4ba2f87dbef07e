"""How fast a run trains: tokens, spans and documents per second, and the share of the card's peak (MFU)."""

import time
from dataclasses import dataclass

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

# Dense bf16 FLOP/s of NVIDIA's data sheets, with fp32 accumulation. Where a sheet prints the figure with sparsity, half
# of it (Lightning's own table has the sparse one for the H200). The first name that a card's name contains counts.
PEAK = {
    "B200": 2250e12,  # HGX B200 data sheet
    "H200 NVL": 835.5e12,  # H200 data sheet
    "H200": 989.5e12,  # H200 data sheet, SXM
    "H100 NVL": 835.5e12,  # H100 data sheet
    "H100 PCIe": 756e12,  # H100 data sheet
    "H100": 989.5e12,  # H100 data sheet, SXM
    "A100": 312e12,  # A100 data sheet
    "A10G": 70e12,  # AWS, EC2 G5
    "A10": 125e12,  # A10 data sheet
    "A40": 149.7e12,  # A40 data sheet
    "L40S": 362e12,  # L40S data sheet
    "L40": 181e12,  # L40 data sheet
    "L4": 121e12,  # L4 data sheet
    "RTX 4090": 165.2e12,  # Ada architecture white paper
    "RTX 3090": 71e12,  # GA102 architecture white paper
}


class Throughput(Callback):
    """``speed/tokens_per_second``, ``spans_per_second``, ``documents_per_second``, ``step_seconds`` and ``mfu``.

    Means over the steps since the last row of the log, validation left out, all processes together; MFU is per card.
    Tokens are those of the documents, without padding, and once more those of the windows that history mode reads, or
    what a stage has counted itself (``stage.tokens``); a window counts as a span. What is on the device is added up
    there and read once per row. MFU is shown on a card whose peak is known (``PEAK``), in 16-bit precision, by the
    formula of ``Work``, or by what a stage says of a batch (``stage.flops``), see ``stages.window_work``.
    """

    def setup(self, trainer, pl_module, stage: str) -> None:  # before a strategy wraps or shards the base
        device, half = trainer.strategy.root_device, str(trainer.precision).startswith(("bf16", "16"))
        self.peak = peak(torch.cuda.get_device_name(device)) if half and device.type == "cuda" else None
        self.work = Work.of(pl_module) if self.peak else None

    def on_train_start(self, trainer, pl_module) -> None:
        self.step = trainer.global_step
        self._restart(pl_module)

    def _restart(self, stage) -> None:
        self.before = _counted(stage)
        self.begin, self.first = time.monotonic(), self.step
        self.tokens = self.flops = 0  # become tensors on the device
        self.spans = self.documents = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if isinstance(batch, dict) and "ids" in batch:
            self.documents += len(batch["ids"])
            self.spans += sum(batch[name].numel() for name in ("starts", "starts2", "segments") if name in batch)
            self.tokens = self.tokens + (batch["lengths"].sum() if "lengths" in batch else batch["ids"].numel())
            if "segments" in batch:  # read once more, behind what is compressed of the rest
                self.tokens = self.tokens + batch["segments"].numel() * _window(pl_module)
        if self.work:
            own = getattr(pl_module, "flops", None)  # a stage whose batches are of another kind
            if own is not None or isinstance(batch, dict) and "ids" in batch:
                self.flops = self.flops + (own or self.work)(batch)
        if trainer.global_step == self.step:  # gradients are being accumulated
            return
        self.step = trainer.global_step
        if trainer.log_every_n_steps and self.step % trainer.log_every_n_steps == 0:
            for name, value in self._values(trainer.world_size, pl_module).items():
                pl_module.log(f"speed/{name}", value)
            self._restart(pl_module)

    def _values(self, processes: int, stage) -> dict[str, float]:
        tokens = float(self.tokens) or _counted(stage) - self.before  # waits for the device, then the time is right
        flops, seconds = float(self.flops), time.monotonic() - self.begin
        found = {"step_seconds": seconds / (self.step - self.first)}
        for name, count in (("tokens", tokens), ("documents", self.documents), ("spans", self.spans)):
            if count:
                found[f"{name}_per_second"] = processes * count / seconds
        if flops:
            found["mfu"] = flops / seconds / self.peak
        return found

    def on_validation_start(self, trainer, pl_module) -> None:
        self.paused = time.monotonic()

    def on_validation_end(self, trainer, pl_module) -> None:
        self.begin += time.monotonic() - self.paused


def _window(stage) -> int:
    """Raw tokens of a segment of history mode and of what is before it, R + S."""
    history = dict(getattr(stage, "hparams", {})).get("history") or {}
    return history.get("segment", 0) + history.get("recency", 0)


def _counted(stage) -> float:
    """Tokens that a stage has learned from, where it counts them."""
    return float(getattr(stage, "tokens", 0))


def peak(name: str) -> float | None:
    """The card's dense bf16 FLOP/s, by its name as CUDA gives it; ``None`` where it is not known."""
    words = name.replace("-", " ").casefold().split()
    if {"laptop", "ti", "d"} & {*words}:  # other chips than the card of that number
        return None
    for card, value in PEAK.items():
        if all(word in words for word in card.casefold().split()):
            return value
    return None


@dataclass(frozen=True)
class Work:
    """Floating-point operations that a batch needs, recomputation left out.

    With P parameters of the base's layers, V D of its head, L layers of attention width A, documents of T tokens, N
    blocks each, C nets, H rows per branch, a branch at start s:

        teacher    2 P T + 2 L A T^2                     per document: forward, causal attention
        branches   2 (2 P + 4 L A (s + (H + 1) / 2))     per row: forward, and backward for activations alone, for the
                                                         base is frozen; no gradient enters the cached prefix
        head       2 V D (1 + 2 C)                       per scored row: the teacher, forward and backward of C students
        nets       3 FLOPs of a block                    per block: forward and backward (the contrastive term's
                                                         neighbours are left out); K + 1 times that for a span of
                                                         K^2 tokens, one gist of K gists

        history    2 (2 P + 4 L A c) + 2 V D (1 + 2 C)   per row and the columns c that it sees: K + M of the stream of
                                                         M carriers, R + S - 1 of a segment, which S scored ones end;
                                                         3 FLOPs of a block for each of the M
        recall     the same                              per row of a window [sink, gists, block, gists, raw, copy]

    A stage that trains its base and has no nets: 6 (P + V D) T + 6 L A T^2 per window.
    """

    body: int  # P
    head: int  # V D
    attention: int  # L A
    carriers: int = 0  # C
    horizon: int = 0  # H
    nets: int = 0  # of all nets for one block, forward
    block: int = 0  # K
    segment: int = 0  # S, of history mode; 0: it is off
    recency: int = 0  # R
    alone: bool = False  # history mode has all of the loss: no single block is replaced
    read: bool = False  # history mode has a share of it
    recall: bool = False  # blocks come back

    @classmethod
    def of(cls, stage) -> "Work | None":
        """Read off a stage; ``None`` for one that has no base."""
        base = getattr(stage, "base", None)
        if base is None:
            return None
        config, model = base.config, base.model
        body = sum(p.numel() for p in model.get_decoder().parameters())
        body -= model.get_input_embeddings().weight.numel()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        head = model.get_output_embeddings().weight.numel()
        attention = config.num_hidden_layers * config.num_attention_heads * width
        if not hasattr(stage, "nets"):
            return cls(body, head, attention)
        with torch.random.fork_rng():  # a net's dropout draws numbers
            nets = sum(net.flops_per_block(stage.base) for net in stage.nets.values())
        block = next(iter(stage.nets.values())).block_size
        asked = dict(stage.hparams)
        history = asked.get("history") or {}
        weight, recall = history.get("weight", 0), bool(history.get("recall"))
        sizes = (history["segment"], history["recency"]) if weight or recall else (0, 0)
        about = (len(stage.nets), asked["horizon"], nets, block, *sizes, weight == 1, weight > 0, recall)
        return cls(body, head, attention, *about)

    @torch.no_grad()
    def __call__(self, batch: dict) -> Tensor | float:
        """Of one batch, as a number on the batch's device; nothing waits for it."""
        if not self.carriers:
            b, t = batch["ids"].shape
            return float(6 * (self.body + self.head) * b * t + 6 * self.attention * b * t**2)
        lengths = batch["lengths"].double()
        work = 2 * self.body * lengths.sum() + 2 * self.attention * lengths.square().sum()  # the teacher
        for name, encoded in (("starts", 1), ("starts2", self.block + 1)):  # blocks that a net encodes for each
            if name not in batch or name == "starts" and self.alone:
                continue
            starts = batch[name].double()
            rows = starts.numel() * self.horizon
            seen = self.horizon * (starts + (self.horizon + 1) / 2).sum()  # columns, over the rows of one net
            work = work + 2 * self.carriers * (2 * self.body * rows + 4 * self.attention * seen)
            work = work + 2 * self.head * (1 + 2 * self.carriers) * rows + 3 * self.nets * encoded * starts.numel()
        return work + self._history(batch["segments"].double()) if self.segment and "segments" in batch else work

    def _history(self, starts: Tensor) -> Tensor:
        """Of segments at starts [B, N]."""
        k, scored = self.block, 2 * self.head * (1 + 2 * self.carriers)
        old = (starts - self.recency).div(k, rounding_mode="floor") - 1  # carriers that each segment sees
        most = old.max()  # all documents have as many
        work = 3 * self.nets * len(starts) * most

        def passed(rows: Tensor, columns: Tensor) -> Tensor:  # rows, and the columns that all of them see together
            return 2 * self.carriers * (2 * self.body * rows + 4 * self.attention * columns)

        if self.read:
            stream, rows = k + most, torch.full_like(starts, self.recency + self.segment - 1)
            work = work + len(starts) * passed(stream, stream * (stream + 1) / 2)
            work = work + passed(rows, rows * (k + old) + rows * (rows + 1) / 2).sum()
            work = work + scored * self.segment * starts.numel()
        if self.recall:
            rows = 3 * k + self.recency + old - 2
            work = work + passed(rows, rows * (rows + 1) / 2).sum() + scored * k * starts.numel()
            again = 2 * self.body * (k - 1) * starts.numel()  # over the full context, forward
            work = work + again + 4 * self.attention * (k - 1) * (starts + k / 2).sum()
        return work
