"""Work for the workers of Ray whose worker is killed, as by a host that runs out of memory: on the first try of a shard.

A line for each try is left in a file beside the session's folder.
"""

import os
import signal

SHARD = 2  # number of the range that it happens to


def make_gists(job):
    from megactx.apps import corpus  # here: the other workers need no torch

    tries = job.folder.parents[2] / f"range-{job.first:06d}.tries"
    with tries.open("a") as file:
        file.write(f"{os.getpid()}\n")
    if job.first == SHARD * len(job.ids) and len(tries.read_text().splitlines()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return corpus.make_gists(job)


def square(shard: int) -> int:
    if shard < 0:
        raise ValueError(f"shard={shard} is not allowed")
    return shard**2


def never(shard: int) -> int:
    """Shard 1 takes every worker with it."""
    if shard == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return shard
