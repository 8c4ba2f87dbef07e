"""The base of every metric here: sums of rows per domain. Batches, processes and whole files give the same figures.

Most figures of method 5 are ratios of sums, not means of ratios, so sums are all that has to be kept, and all that
processes have to exchange. M rows (blocks), float64.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from megactx.data.files import ALL_DOMAINS

WEAK = 0.01  # nats: where dropping costs less than that, recovery would be a ratio of noise


class DomainSums(Metric):
    """Sums of rows per domain, added up over batches and processes.

    A subclass names its sums and says in ``figures`` what follows from them.

    Args:
        sizes: name of a sum -> shape of one row of it. ``blocks``, the number of rows, is always there.
        domains: every domain that can occur: all processes must hold the same sums.

    ``compute`` returns the figures of all rows under their names, and those of each domain that has rows as
    ``domain/name``. What is undefined is NaN.
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self, sizes: Mapping[str, Sequence[int]], domains: Iterable[str] = ALL_DOMAINS, **kwargs):
        super().__init__(**kwargs)
        self.domains, self.sums = list(domains), ["blocks", *sizes]
        for name, size in {"blocks": (), **sizes}.items():
            empty = torch.zeros(len(self.domains), *size, dtype=torch.float64)
            self.add_state(name, empty, dist_reduce_fx="sum")

    def add(self, domain: Sequence[str], **rows: Tensor) -> None:
        """Add rows [M, ...] to the sums of their domains (M names).

        Raises:
            ValueError: a domain that was not announced.
        """
        if unknown := set(domain) - set(self.domains):
            raise ValueError(f"metrics: blocks of the domains {sorted(unknown)}, announced were {self.domains}")
        index = torch.tensor([self.domains.index(name) for name in domain], dtype=torch.long, device=self.device)
        for name, values in {"blocks": torch.ones(len(domain)), **rows}.items():
            values = values.to(self.device, torch.float64)
            setattr(self, name, getattr(self, name).index_add(0, index, values))

    def figures(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums of some rows -> their figures."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        sums = {name: getattr(self, name) for name in self.sums}
        out = self.figures({name: values.sum(0) for name, values in sums.items()})
        for index, domain in enumerate(self.domains):
            if self.blocks[index] > 0:
                part = self.figures({name: values[index] for name, values in sums.items()})
                out |= {f"{domain}/{name}": value for name, value in part.items()}
        return out


def loggable(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The figures that a logger can take: single numbers that are defined."""
    return {name: value for name, value in values.items() if value.numel() == 1 and not value.isnan()}
