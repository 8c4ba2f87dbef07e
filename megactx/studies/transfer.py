"""Compressors trained on some domains, read on others: recovery of every run on every domain of the same text."""

from collections.abc import Callable, Iterable

from megactx.evaluation.bootstrap import recovery_intervals
from megactx.evaluation.measure import measure
from megactx.evaluation.table import Table

from .trained import Trained


def measure_transfer(
    runs: list[Trained],
    batches: Iterable[dict],
    horizon: int,
    table: Table,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict:
    """Measure the compressors of several runs, and the untrained controls, on the same blocks.

    Args:
        runs: of one base LM and one block size.
        batches, horizon: as for ``measure``.
        table: gets the recovery of each run and control on every domain of the text, and overall.

    Returns:
        ``transfer``: ``first``, the first scored offset, 1 where a run keeps keys and values; ``blocks``,
        ``documents``, ``hash`` of what was measured; ``trained``: run -> domain -> share.
    """
    nets = {run.name: run.main for run in runs}
    scores = measure(runs[0].base, nets, batches, horizon, progress=progress)
    first = int(any(not net.makes_vectors for net in nets.values()))
    for domain, own in scores.by_domain().items():
        found = recovery_intervals(own, list(own.carriers), first)
        table.add_all(found, "carrier", metric="recovery", span=f"h >= {first}", domain=domain)
    about = {"first": first, "blocks": len(scores), "documents": scores.document.unique().numel()}
    about |= {"hash": scores.block_hash(), "trained": {run.name: run.weights for run in runs}}
    return {"transfer": about}
