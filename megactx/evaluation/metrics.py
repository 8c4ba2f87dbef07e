"""How good gists are, from NLL per block and offset (method 5).

Everything is computed from sums over blocks, so that batches, processes and whole files give the same figures:
recovery is a ratio of sums, not a mean of ratios. M blocks, H offsets h = 0..H-1, NLL and KL in nats.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from megactx.data.files import ALL_DOMAINS
from megactx.gist.losses.block import SEAM

from .scores import BlockScores
from .sums import WEAK, DomainSums

BODY = SEAM  # first offset behind the seam, where most of the cost of a missing block sits
SUBSTITUTABLE = 1.0  # nats of mean dNLL below which a block counts as replaceable
BANDS = {"h0": (0, 1), "h1_3": (1, 4), "h4_15": (4, 16), "h16_up": (16, None)}
LOWER_IS_BETTER = ("dnll", "kl", "ppl_ratio")


def block_rows(
    full: Tensor, drop: Tensor, carrier: Tensor, kl: Tensor | None = None, agree: Tensor | None = None
) -> dict[str, Tensor]:
    """NLL, KL and agreement [M, H] -> per block what ``figures`` needs the sums of, float64."""
    dnll = carrier.double() - full.double()
    rows = {
        "dnll": dnll,  # [M, H]
        "dnll_drop": drop.double() - full.double(),  # [M, H]
        "below": (dnll.mean(1) < SUBSTITUTABLE).double(),  # [M]
    }
    return rows | {name: x.double() for name, x in (("kl", kl), ("agree", agree)) if x is not None}  # [M, H]


def block_sums(full: Tensor, *tables: Tensor | None) -> dict[str, Tensor]:
    """Arguments of ``block_rows`` -> sums over blocks: what ``figures`` needs, and all that it needs."""
    rows = block_rows(full, *tables)
    blocks = torch.tensor(float(len(full)), dtype=torch.float64, device=full.device)
    return {"blocks": blocks} | {name: values.sum(0) for name, values in rows.items()}


def figures(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over blocks -> the figures of one group of blocks, each a float64 scalar.

    ``dnll``, ``dnll_drop``, ``kl``: nats per token. ``recovery``, ``recovery_body`` (h >= 4) and ``recovery_h0`` ..
    ``recovery_h16_up``: 1 = as good as the block itself, 0 = as bad as nothing, never clipped, NaN where undefined.
    ``substitutability``, ``top1``: shares. ``ppl_ratio``: exp(dnll). A band beyond the horizon is left out.
    """
    blocks, dnll, drop = sums["blocks"], sums["dnll"], sums["dnll_drop"]
    out = {"blocks": blocks, "dnll": dnll.mean() / blocks, "dnll_drop": drop.mean() / blocks}
    out["recovery"] = recovery_of_sums(dnll, drop, blocks)
    if len(dnll) > BODY:
        out["recovery_body"] = recovery_of_sums(dnll, drop, blocks, BODY)
    for band, (first, end) in BANDS.items():
        if len(dnll) > first:
            out[f"recovery_{band}"] = recovery_of_sums(dnll, drop, blocks, first, end)
    out["substitutability"] = sums["below"] / blocks
    out["ppl_ratio"] = out["dnll"].exp()
    for name, source in (("kl", "kl"), ("top1", "agree")):
        if source in sums:
            out[name] = sums[source].mean() / blocks
    return out


def recovery_of_sums(dnll: Tensor, drop: Tensor, blocks: Tensor, first: int = 0, end: int | None = None) -> Tensor:
    """1 - sum(dNLL) / sum(dNLL_drop) over offsets first..end-1; NaN where dropping costs too little to tell.

    Args:
        dnll, drop: sums over blocks by offset, [..., H].
        blocks: number of blocks, [...].
    """
    gist, gone = dnll[..., first:end].sum(-1), drop[..., first:end].sum(-1)
    return torch.where(cost_is_known(drop, blocks, first, end), 1 - gist / gone, torch.nan)


def cost_is_known(drop: Tensor, blocks: Tensor, first: int = 0, end: int | None = None) -> Tensor:
    """Whether dropping costs at least 0.01 nat per token over the offsets; for h >= 4 also over h = 4..15 alone.

    Below that the base is too weak: it hardly uses the block, so nothing can be said of what stands in for it.
    """

    def mean_cost(start, stop):
        part = drop[..., start:stop]
        return part.sum(-1) / (blocks * part.shape[-1])

    known = mean_cost(first, end) >= WEAK
    return known & (mean_cost(BODY, 16) >= WEAK) if first == BODY else known


def recovery(full: Tensor, drop: Tensor, carrier: Tensor, first: int = 0, end: int | None = None) -> float:
    """Recovery of a carrier over offsets first..end-1, from NLL [M, H]; NaN where undefined."""
    sums = block_sums(full, drop, carrier)
    return recovery_of_sums(sums["dnll"], sums["dnll_drop"], sums["blocks"], first, end).item()


def dnll_by_offset(full: Tensor, carrier: Tensor) -> Tensor:
    """Mean dNLL at h = 0..H-1, from NLL [M, H] -> [H] nats."""
    return (carrier.double() - full.double()).mean(0)


class GistMetrics(DomainSums):
    """The figures of one carrier, overall and per domain, over all batches and processes.

    Args:
        horizon: H.
        domains: every domain that can occur.

    ``compute`` returns what ``figures`` does, and ``dnll_by_offset`` and ``dnll_drop_by_offset`` [H] in nats, for all
    blocks, and as ``narrative/dnll``, ... for each domain with any.
    """

    def __init__(self, horizon: int, domains: Iterable[str] = ALL_DOMAINS, **kwargs):
        by_offset = dict.fromkeys(("dnll", "dnll_drop", "kl", "agree"), (horizon,))
        super().__init__(by_offset | {"below": ()}, domains, **kwargs)
        self.horizon = horizon

    def update(self, scores: BlockScores, carrier: str = "gistnet") -> None:
        """One batch, with KL and agreement of the carrier.

        Raises:
            ValueError: another horizon, or a domain that was not announced.
        """
        if scores.horizon != self.horizon:
            raise ValueError(f"validation: a batch has horizon {scores.horizon}, expected is {self.horizon}")
        tables = (scores.full, scores.drop, scores.carriers[carrier], scores.kl[carrier], scores.agree[carrier])
        self.add(scores.domain, **block_rows(*tables))

    def figures(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        blocks = sums["blocks"]
        by_offset = {f"{name}_by_offset": sums[name] / blocks for name in ("dnll", "dnll_drop")}
        return figures(sums) | by_offset
