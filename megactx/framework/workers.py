"""One function over many shards, in this process or by the workers of Ray; results come in the order of the shards.

    with workers(engine) as each:
        for result in each(work, shards, "cases"):
            ...

Ray's workers are processes of this machine, or of all hosts of the cluster that RAY_ADDRESS names. They have the same
version of megactx, and see the same files under the same names. A worker that is killed costs its shard, which another
one does again. What ``work`` is given and what it returns is sent; what is large belongs on the shared disk.
"""

import importlib
import os
import re
import socket
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .bar import bar
from .errors import RunFailed
from .extra import extra

PROCESS, RAY = ENGINES = ("process", "ray")
TRIES = 3  # of a shard whose worker was lost
AHEAD = 4  # shards per core that are given out at most
STORE = 2**27  # bytes of memory in which Ray keeps what it sends, where it is started here
HOST = re.compile(r"([^:/]+):(\d+)")  # of a cluster; there are addresses of other forms
PATIENCE = 10.0  # seconds until a host answers
LOST = (
    "{what}: shard {number} of {count} was tried {tries} times, and its worker was lost each time ({why}). What is"
    " finished is kept: the same command goes on"
)

Each = Callable[[Callable, Collection, str], Iterator]


def add_engine(add: Callable) -> None:
    """``--engine``, by an ``add_argument``."""
    told = "process: this one; ray: all cores of this machine, or of the cluster that RAY_ADDRESS names"
    add("--engine", choices=ENGINES, default=PROCESS, help=f"{told} (default {PROCESS})")


@contextmanager
def workers(engine: str) -> Iterator[Each]:
    """-> ``each(work, shards, what)``, which yields the results in the order of the shards, and shows how far it is.

    Args:
        engine: of ``ENGINES``. With ray, ``work`` is a function of a module, and what it raises is raised here.

    Raises:
        ValueError: Ray is not installed, or no cluster answers.
        RunFailed: the worker of a shard was lost each time.
    """
    if engine == PROCESS:
        yield lambda work, shards, what: iter(bar(what)(Counted(map(work, shards), len(shards))))
        return
    with extra("--engine=ray", "ray"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        import ray
    own = not ray.is_initialized()
    if own:
        _connect(ray)
    try:
        cores, cards = (int(ray.cluster_resources().get(kind, 0)) for kind in ("CPU", "GPU"))
        hosts = sum(node["Alive"] for node in ray.nodes())
        print(f"Ray: {cards or cores} workers on {hosts} host{'s' * (hosts > 1)}", flush=True)
        settings = {"max_retries": TRIES - 1, "num_cpus": 1, "num_gpus": 1 if cards else 0}

        def each(work: Callable, shards: Collection, what: str) -> Iterator:
            results = _results(ray, ray.remote(**settings)(_importable(work)), shards, what, AHEAD * max(1, cores))
            return iter(bar(what)(Counted(results, len(shards))))

        yield each
    finally:
        if own:
            ray.shutdown()


def on_all_hosts(name: str | None) -> str | None:
    """A name of something that other processes look for too: a path from the root where it is there, else as it is."""
    path = None if name is None else Path(name).expanduser()
    return str(path.absolute()) if path is not None and path.exists() else name


class Counted:
    """Items that are made one by one, and how many there will be."""

    def __init__(self, items: Iterable, count: int):
        self.items, self.count = items, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator:
        return iter(self.items)


def _importable(work: Callable) -> Callable:
    """The function itself; of a module that runs as a command, the one that workers find under the module's name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if work.__module__ != "__main__" or spec is None:
        return work
    return getattr(importlib.import_module(spec.name), work.__name__)


def _connect(ray) -> None:
    address = os.environ.get("RAY_ADDRESS")
    settings = {name: value for name, value in os.environ.items() if name.startswith("MEGACTX_")}
    given = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": {"env_vars": settings}}
    if not address:
        given |= {"include_dashboard": False, "object_store_memory": STORE}
    try:
        if address and (found := HOST.fullmatch(address)):  # else Ray itself tries for minutes
            socket.create_connection((found[1], int(found[2])), timeout=PATIENCE).close()
        ray.init(**given)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"RAY_ADDRESS={address}: no cluster of Ray can be used there" if address else "Ray could not be started"
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{where} ({first}); start one with: ray start --head") from error


def _results(ray, remote, shards: Collection, what: str, ahead: int) -> Iterator:
    """Some shards ahead, so that what is sent takes little room."""
    rest, under_way = iter(shards), deque()
    for number in range(1, len(shards) + 1):
        while len(under_way) < ahead and (shard := next(rest, None)) is not None:
            under_way.append(remote.remote(shard))
        try:
            yield ray.get(under_way.popleft())
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # what the work itself has raised
        except ray.exceptions.RayError as error:
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            told = LOST.format(what=what, number=number, count=len(shards), tries=TRIES, why=why)
            raise RunFailed(told) from error
