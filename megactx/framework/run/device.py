"""Which devices and precision a run takes, and why."""

import functools
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """``accelerator`` and ``precision`` are Lightning's words; ``why`` is one line for a person."""

    accelerator: str
    precision: str
    why: str
    count: int = 1  # devices of this machine, a process each


def choose(accelerator: str, precision: str, devices=1, choice: str = "auto", strategy="auto") -> Device:
    """Resolve ``auto`` against the machine.

    Args:
        accelerator: auto, cpu or cuda.
        precision: auto, or a precision of Lightning.
        devices: of ``trainer.devices``: how many, or auto for all cards of the machine (one process on a CPU).
        choice: the option of the group ``trainer``, for the message.
        strategy: of ``trainer.strategy``.

    Raises:
        ValueError: CUDA is asked for where there is none, more devices than there are, or a strategy that starts its
            processes from inside this one: what they end with would not come back.
    """
    import torch

    if devices != "auto" and not (str(devices).isdecimal() and int(devices) > 0):
        raise ValueError(f"trainer.devices={devices}: allowed is a whole number from 1, or auto")
    if any(word in str(strategy) for word in ("spawn", "fork", "notebook")):
        raise ValueError(f"trainer.strategy={strategy}: several devices are trained on with trainer=ddp")
    if accelerator not in ("auto", "cpu", "cuda", "gpu"):
        raise ValueError(f"trainer.accelerator={accelerator}: allowed is auto, cpu or cuda")
    has_cuda = torch.cuda.is_available()
    if accelerator in ("cuda", "gpu") and not has_cuda:
        raise ValueError(f"trainer={choice}: it needs CUDA, and this machine has none; use trainer=auto or trainer=cpu")
    if has_cuda and accelerator != "cpu":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        auto, why = ("bf16-mixed", "the card has bf16") if native else ("32-true", "the card has no bf16")
        where = f"CUDA ({torch.cuda.get_device_name(0)})"
        kind, there = "cuda", torch.cuda.device_count()
        count = there if devices == "auto" else int(devices)
        if count > there:
            raise ValueError(f"trainer.devices={devices}: this machine has {there} CUDA devices")
    else:
        units = cpu_bf16_units()
        auto, why = ("bf16-mixed", f"the CPU has {units}") if units else ("32-true", "the CPU has no bf16 units")
        where = f"CPU ({torch.get_num_threads()} threads)"
        kind, count = "cpu", 1 if devices == "auto" else int(devices)
        if accelerator == "auto":
            where += ", no CUDA here"
    if count > 1:
        where += f", {count} processes"
    if precision == "auto":
        return Device(kind, auto, f"{where}; {auto}: {why}", count)
    return Device(kind, precision, f"{where}; {precision}: as set", count)


@functools.cache
def cpu_bf16_units() -> str:
    """The name of the CPU's bf16 matrix units, or an empty string.

    ``MEGACTX_CPU_BF16=none`` hides them, another value is taken for their name: to try what another machine would do.
    """
    import torch

    if (told := os.environ.get("MEGACTX_CPU_BF16")) is not None:
        return "" if told == "none" else told
    able = torch.cpu.get_capabilities()
    return next((name for name in ("amx_bf16", "avx512_bf16") if able.get(name)), "")
