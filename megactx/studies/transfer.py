"""Compressors trained on some domains, read on others: recovery of every run on every domain of the same text."""

from collections.abc import Callable, Iterable

from megactx.evaluation.bootstrap import recovery_intervals
from megactx.evaluation.measure import measure

from .trained import Trained

OVERALL = "overall"


def measure_transfer(
    runs: list[Trained], batches: Iterable[dict], horizon: int, progress: Callable[[Iterable], Iterable] = iter
) -> dict:
    """Measure the compressors of several runs, and the untrained controls, on the same blocks.

    Args:
        runs: of one base LM and one block size.
        batches, horizon: as for ``measure``.

    Returns:
        ``first``, the first scored offset, 1 where a run keeps keys and values; ``blocks``, ``documents``, ``hash`` of
        what was measured; ``rows``: name -> ``trained`` (domain -> share; empty for a control) and, for every domain of
        the text and ``overall``, the interval of its recovery.
    """
    nets = {run.name: run.main for run in runs}
    scores = measure(runs[0].base, nets, batches, horizon, progress=progress)
    first = int(any(not net.makes_vectors for net in nets.values()))
    names = list(scores.carriers)
    trained = {run.name: run.weights for run in runs}
    rows = {name: {"trained": trained.get(name, {})} for name in names}
    for domain in (None, *scores.domains):
        for name, interval in recovery_intervals(scores, names, first, domain).items():
            rows[name][domain or OVERALL] = interval._asdict()
    out = {"first": first, "blocks": len(scores), "documents": scores.document.unique().numel()}
    return out | {"hash": scores.block_hash(), "rows": rows}
