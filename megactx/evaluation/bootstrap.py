"""Paired bootstrap over documents (Efron & Tibshirani 1993; Koehn 2004 for the paired form).

Blocks of one document are not independent, so documents are drawn with replacement, not blocks. All carriers
see the same draws. Every statistic here is a ratio of sums, so a draw needs only the sums per document.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .metrics import cost_is_known
from .scores import BlockScores

DRAWS = 2000
LEAST_RECOVERY, LEAST_NATS = 0.005, 0.002  # what a claim is at least about
TAIL, Z = 0.025, 1.96  # on either side, and in standard errors: 95 % intervals
MATRIX = 4_000_000  # entries of the count matrix that are held at once


class Interval(NamedTuple):
    """A point estimate and its 95 % interval; NaN where it is undefined."""

    point: float
    low: float
    high: float


def recovery_intervals(
    scores: BlockScores,
    carriers: list[str],
    first: int = 0,
) -> dict[str, Interval]:
    """Recovery over offsets h >= first of each carrier."""
    gained = {name: scores.drop.double() - scores.carriers[name].double() for name in carriers}
    return _ratios(scores, gained, first)


def difference_intervals(
    scores: BlockScores,
    subject: str,
    controls: list[str],
    first: int = 0,
) -> dict[str, Interval]:
    """Recovery of ``subject`` minus recovery of each control, block by block, over offsets h >= first."""
    gained = {name: scores.carriers[name].double() - scores.carriers[subject].double() for name in controls}
    return _ratios(scores, gained, first)


def mean_interval(document: Tensor, values: Tensor) -> Interval:
    """Mean of values [M] whose documents are resampled."""
    columns = torch.stack([values.double(), torch.ones(len(values), dtype=torch.float64)], dim=1)
    total, drawn = _resampled(document, columns)
    return _interval(total[0] / total[1], drawn[:, 0] / drawn[:, 1])


def verdict(difference: Interval | Mapping, least: float = LEAST_RECOVERY) -> str:
    """What an interval of subject minus control says: above, below, within the interval, or undefined.

    Args:
        difference: an interval, or a row of the table; there is no 0 in it where there is a claim, and the point is at
            least
        least: large: with enough blocks any difference is sure, and one of 0.000 is still none.
    """
    point, low, high = _ends(difference)
    if math.isnan(low):
        return "undefined"
    if abs(point) < least or low <= 0 <= high:
        return "within the interval"
    return "above" if point > 0 else "below"


def reverse(difference: Interval | Mapping) -> Interval:
    """An interval, or a row of the table, of control minus subject, as that of subject minus control."""
    point, low, high = _ends(difference)
    return Interval(-point, -high, -low)


def wilson(right: int, of: int) -> Interval:
    """A share and its 95 % interval (Wilson 1927), which is no point where none or all are right."""
    share, z = right / of, Z**2 / of
    middle = (share + z / 2) / (1 + z)
    half = (z * share * (1 - share) + z**2 / 4) ** 0.5 / (1 + z)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def told(behind: Mapping | None) -> str:
    """The verdict on a carrier, of the row with the subject's lead over it; empty where there is none."""
    said = verdict(reverse(behind)) if behind else "undefined"
    return "" if said == "undefined" else said


def _ends(difference: Interval | Mapping) -> Interval:
    if isinstance(difference, Interval):
        return difference
    return Interval(*[math.nan if (value := difference.get(name)) is None else value for name in Interval._fields])


def _ratios(scores, gained, first) -> dict[str, Interval]:
    """sum(gained) / sum(dNLL_drop) over h >= first, per name; undefined as recovery is."""
    if first >= scores.horizon:
        return {name: Interval(*[float("nan")] * 3) for name in gained}
    cost = scores.drop.double() - scores.full.double()  # [M, H]
    columns = [cost, torch.ones(len(scores), 1)] + [
        values[:, first:].sum(1, keepdim=True) for values in gained.values()
    ]
    total, drawn = _resampled(scores.document, torch.cat(columns, dim=1))

    def ratio(sums):  # [..., H + 1 + names]
        cost, blocks, gain = sums[..., : scores.horizon], sums[..., scores.horizon], sums[..., scores.horizon + 1 :]
        known = cost_is_known(cost, blocks, first)
        return torch.where(known[..., None], gain / cost[..., first:].sum(-1, keepdim=True), torch.nan)

    points, spread = ratio(total), ratio(drawn)
    return {name: _interval(points[i], spread[:, i]) for i, name in enumerate(gained)}


def _resampled(document: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """values [M, C] -> their sums [C], and the sums of ``DRAWS`` resamplings of the documents [DRAWS, C]."""
    _, owner = torch.unique(document, return_inverse=True)
    count = int(owner.max()) + 1
    sums = torch.zeros(count, values.shape[1], dtype=torch.float64).index_add_(0, owner, values.double())
    if count < 2:  # one document says nothing of the spread between documents
        return sums.sum(0), torch.full((DRAWS, values.shape[1]), torch.nan, dtype=torch.float64)
    rng = np.random.default_rng(0)  # the same draws for all: differences are paired
    step = max(1, MATRIX // count)
    share = np.full(count, 1 / count)
    drawn = []
    for at in range(0, DRAWS, step):
        times = rng.multinomial(count, share, size=min(step, DRAWS - at))  # [step, documents]
        drawn.append(torch.from_numpy(times).double() @ sums)
    return sums.sum(0), torch.cat(drawn)


def _interval(point: Tensor, drawn: Tensor) -> Interval:
    known = drawn[~drawn.isnan()]
    # Where more draws than a tail are undefined, the interval has no end on that side that could be named.
    if point.isnan() or len(drawn) - len(known) > TAIL * len(drawn):
        return Interval(point.item(), float("nan"), float("nan"))
    low, high = torch.quantile(known, torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64)).tolist()
    return Interval(point.item(), low, high)
