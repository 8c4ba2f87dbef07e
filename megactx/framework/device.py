"""Which device and precision a run takes, and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """``accelerator`` and ``precision`` are Lightning's words; ``why`` is one line for a person."""

    accelerator: str
    precision: str
    why: str


def choose(accelerator: str, precision: str, devices=1, choice: str = "auto") -> Device:
    """Resolve ``auto`` against the machine.

    Args:
        accelerator: auto, cpu or cuda.
        precision: auto, or a precision of Lightning.
        devices: of ``trainer.devices``.
        choice: the option of the group ``trainer``, for the message.

    Raises:
        ValueError: CUDA is asked for where there is none, or more than one device.
    """
    import torch

    if devices not in (1, "1"):
        raise ValueError(f"trainer.devices={devices}: a run takes 1 device; give each run of a sweep its own")
    if accelerator not in ("auto", "cpu", "cuda", "gpu"):
        raise ValueError(f"trainer.accelerator={accelerator}: allowed is auto, cpu or cuda")
    has_cuda = torch.cuda.is_available()
    if accelerator in ("cuda", "gpu") and not has_cuda:
        raise ValueError(f"trainer={choice}: it needs CUDA, and this machine has none; use trainer=auto or trainer=cpu")
    if has_cuda and accelerator != "cpu":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        auto, why = ("bf16-mixed", "the card has bf16") if native else ("32-true", "the card has no bf16")
        where = f"CUDA ({torch.cuda.get_device_name(0)})"
        kind = "cuda"
    else:
        units = cpu_bf16_units()
        auto, why = ("bf16-mixed", f"the CPU has {units}") if units else ("32-true", "the CPU has no bf16 units")
        where = f"CPU ({torch.get_num_threads()} threads)"
        kind = "cpu"
        if accelerator == "auto":
            where += ", no CUDA here"
    if precision == "auto":
        return Device(kind, auto, f"{where}; {auto}: {why}")
    return Device(kind, precision, f"{where}; {precision}: as set")


def cpu_bf16_units() -> str:
    """The name of the CPU's bf16 matrix units, or an empty string."""
    import torch

    able = torch.cpu.get_capabilities()
    return next((name for name in ("amx_bf16", "avx512_bf16") if able.get(name)), "")
