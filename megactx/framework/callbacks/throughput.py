"""How fast a run trains: tokens, spans and documents per second, and the share of the card's peak (MFU)."""

import time
from collections import defaultdict

import torch
from lightning.pytorch.callbacks import Callback

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
    How much a batch is says the stage (``Stage.amounts``). What is on the device is added up there and read once per
    row. MFU is shown on a card whose peak is known (``PEAK``), in 16-bit precision, by the stage's own formula
    (``Stage.flops``).
    """

    def setup(self, trainer, pl_module, stage: str) -> None:
        device, half = trainer.strategy.root_device, str(trainer.precision).startswith(("bf16", "16"))
        self.peak = peak(torch.cuda.get_device_name(device)) if half and device.type == "cuda" else None

    def on_train_start(self, trainer, pl_module) -> None:
        self.step = trainer.global_step
        self._restart()

    def _restart(self) -> None:
        self.begin, self.first = time.monotonic(), self.step
        self.flops, self.counts = 0, defaultdict(int)  # become tensors on the device

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        for name, count in pl_module.amounts(batch).items():
            self.counts[name] = self.counts[name] + count
        if self.peak:
            self.flops = self.flops + pl_module.flops(batch)
        if trainer.global_step == self.step:  # gradients are being accumulated
            return
        self.step = trainer.global_step
        if trainer.log_every_n_steps and self.step % trainer.log_every_n_steps == 0:
            for name, value in self._values(trainer.world_size).items():
                pl_module.log(f"speed/{name}", value)
            self._restart()

    def _values(self, processes: int) -> dict[str, float]:
        counts = {name: float(count) for name, count in self.counts.items()}  # waits for the device, then time is right
        flops, seconds = float(self.flops), time.monotonic() - self.begin
        found = {"step_seconds": seconds / (self.step - self.first)}
        found |= {f"{name}_per_second": processes * count / seconds for name, count in counts.items() if count}
        if flops:
            found["mfu"] = flops / seconds / self.peak
        return found

    def on_validation_start(self, trainer, pl_module) -> None:
        self.paused = time.monotonic()

    def on_validation_end(self, trainer, pl_module) -> None:
        self.begin += time.monotonic() - self.paused


def peak(name: str) -> float | None:
    """The card's dense bf16 FLOP/s, by its name as CUDA gives it; ``None`` where it is not known."""
    words = name.replace("-", " ").casefold().split()
    if {"laptop", "ti", "d"} & {*words}:  # other chips than the card of that number
        return None
    for card, value in PEAK.items():
        if all(word in words for word in card.casefold().split()):
            return value
    return None
