"""Work for workers of Ray of whom one is killed, as where memory runs out: at the first try of a shard.

A line for each try is left in a file beside the session's folder.
"""

import functools
import os
import signal
import time

from megactx.framework.workers import workers

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


def host(shard: int) -> str:
    """The address of the host that does it; slow enough that a second worker is started for the others."""
    import ray

    time.sleep(0.5)
    return ray.util.get_node_ip_address()


def never(shard: int) -> int:
    """Shard 1 takes every worker with it."""
    if shard == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return shard


CACHED = functools.cache(hex)  # which cannot be sent


def named(shard: int) -> str:
    return CACHED(shard)


if __name__ == "__main__":
    with workers("ray") as each:
        print(*each(named, range(3), "numbers"))
