"""Several devices: a process each. The first one starts the others, decides, writes and speaks.

Lightning starts them by the same command (``trainer=ddp``), or somebody else does (torchrun, SLURM). Each builds the
same stage from the same config; what the first one decided, the folder and the checkpoint, they take from it.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

_DECIDED = "MEGACTX_RUN"  # reaches the processes that Lightning starts
_PLACE = ["LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", _DECIDED]


def rank() -> int:
    """Which process of its run this is, as whoever started it says; 0 is the first one, or the only one."""
    return int(next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), 0))


def carry(name: str) -> None:
    """A variable of the environment that the processes of one run share, and the next run must not have."""
    _PLACE.append(name)


def hush() -> None:
    """Only the first process speaks; errors of the others go to stderr."""
    if rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


@contextlib.contextmanager
def own_environment():
    """What Lightning leaves in the environment of the first process must not reach the next run that it makes."""
    before = {name: os.environ[name] for name in _PLACE if name in os.environ}
    try:
        yield
    finally:
        for name in _PLACE:
            os.environ.pop(name, None)
        os.environ.update(before)


def agreed(decide: Callable[[], tuple[Path | None, Path]]) -> tuple[Path | None, Path]:
    """The checkpoint to go on from and the run folder, as ``decide`` says in the first process."""
    if rank() and _DECIDED in os.environ:
        checkpoint, folder = json.loads(os.environ[_DECIDED])
        return checkpoint and Path(checkpoint), Path(folder)
    checkpoint, folder = decide()
    os.environ[_DECIDED] = json.dumps([checkpoint and str(checkpoint.absolute()), str(folder.absolute())])
    return checkpoint, folder


def joint(code: int, done: int) -> int:
    """The exit code where all processes end for the same reason: the first one's, which also says why; else ``done``.

    One that fails alone ends with its own code: Lightning then ends the others.
    """
    return done if rank() else code


def refuse_own_folders(hosts: int, named: bool) -> None:
    """Each host would find a folder of its own.

    Raises:
        ValueError: there are several hosts, and no folder is named.
    """
    if hosts > 1 and not named:
        raise ValueError(
            f"trainer.num_nodes={hosts}: set folder=... to the same place on every host, one that all of them see"
        )


def refuse_sweep(count: int) -> None:
    """A job of a sweep takes one device.

    Raises:
        ValueError: it would take more: the processes that it starts would all run the whole sweep again.
    """
    if count > 1:
        raise ValueError(f"trainer.devices={count}: not with -m, each process would run the whole sweep again; take 1")


def leave(trainer) -> bool:
    """End the processes' common work behind the training; -> whether this is the first one, which goes on alone."""
    if trainer.world_size > 1:
        import torch.distributed as dist

        gather = getattr(trainer.strategy, "gather", None)
        if gather is not None:  # a sharded base: whole again, so that one process can use it
            gather()
        trainer.strategy.barrier()
        dist.destroy_process_group()  # else a metric of the report would wait for processes that are gone
    return trainer.is_global_zero


def stop_others(trainer) -> None:
    """End the processes that this one has started: they wait for it in vain."""
    others = getattr(trainer.strategy.launcher, "procs", [])
    for other in others:
        other.kill()
        other.wait()
    others.clear()  # Lightning watches this list, and would end us because they have ended
