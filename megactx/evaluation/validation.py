"""What one validation says of a GistNet: every metric of method 5 that needs no documents of its own."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megactx.data.files import ALL_DOMAINS
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.eval_mode import in_eval_mode
from megactx.lm.prefill import blocks, prefill, unread
from megactx.memory.pyramid import PLAIN, Attention

from .geometry import AttentionEntropy, GistGeometry
from .measure import measure
from .metrics import GistMetrics
from .passages import measure_level


class SpaceMetrics(nn.Module):
    """How the gists of some batches lie in their space, and how sharply their net attends.

    Args:
        width: D.
        domains: every domain that can occur.
    """

    def __init__(self, width: int, domains: Iterable[str] = ALL_DOMAINS):
        super().__init__()
        self.geometry, self.attention = GistGeometry(width, domains), AttentionEntropy(domains)

    @torch.inference_mode()
    def update(self, base: BaseLM, net: GistNet, batch: dict) -> None:
        """Encode the blocks of one batch, as ``measure`` takes it, and their right neighbours where they have any."""
        device, block = base.model.device, net.block_size
        ids, starts = batch["ids"].to(device), batch["block_starts"].to(device)
        paired = starts + 2 * block <= batch["lengths"].to(device)[:, None]
        domain = [name for name in batch["domain"] for _ in range(starts.shape[1])]
        read = prefill(base, ids, with_states=True) if net.needs_hidden else unread(ids)
        # A block without a right neighbour gathers itself, and is then left out.
        there = torch.where(paired, starts + block, starts)
        with in_eval_mode(net):
            own, right = (net.compress(base, read, at).vectors for at in (starts, there))
            self.geometry.update(own.flatten(0, 1), domain, paired.flatten(), right[paired])
            weights = None  # other carriers than GistNets have none to show
            if isinstance(net, GistNet):
                embedded = base.embed(blocks(ids, starts, block)).flatten(0, 1)
                weights = net.attention(embedded, net.seen(base, read, starts))
            self.attention.update(weights, domain)

    def compute(self) -> dict[str, Tensor]:
        """``diversity``, ``cosine_std``, ``adjacent_distance``, ``contrastive_gap`` (cosine distances),
        ``attention_entropy`` (bits), and ``domain/name`` of each domain with blocks; all but ``cosine_std``."""
        return self.geometry.compute() | self.attention.compute()


class ValidationMetrics(nn.Module):
    """All metrics of a validation, overall and per domain, over all batches and processes.

    Args:
        horizon: H.
        width: D.
        domains: every domain that can occur.
        level2: measure gists of gists too, behind every span of K^2 tokens that the documents have.
        attention: how documents and branches are read, as of ``measure``.

    After ``update`` with each batch, ``compute`` gives ``name -> value`` and ``domain/name -> value``, float64 scalars
    but for the two by offset. Undefined values are NaN; ``sums.loggable`` leaves them and the vectors out.

    - ``blocks``: how many. ``dnll``, ``dnll_drop``, ``kl``: nats per token. ``ppl_ratio``: exp(dnll).
    - ``recovery``, ``recovery_body`` (h >= 4), ``recovery_h0``, ``recovery_h1_3``, ``recovery_h4_15``,
      ``recovery_h16_up``: 1 is as good as the block, 0 as bad as nothing.
    - ``substitutability``, ``top1``: shares of blocks, of tokens.
    - ``dnll_by_offset``, ``dnll_drop_by_offset``: [H] nats.
    - what ``SpaceMetrics`` gives.
    - ``level2/...``: all but the last, of gists of gists.
    """

    def __init__(
        self,
        horizon: int,
        width: int,
        domains: Iterable[str] = ALL_DOMAINS,
        level2: bool = False,
        attention: Attention = PLAIN,
    ):
        super().__init__()
        self.attention = attention
        self.substitution, self.space = GistMetrics(horizon, domains), SpaceMetrics(width, domains)
        self.level2 = GistMetrics(horizon, domains) if level2 else None

    def update(self, base: BaseLM, net: GistNet, batch: dict) -> None:
        """One batch, as ``measure`` takes them.

        Raises:
            ValueError: a block that is not eligible, or a domain that was not announced.
        """
        settings = {"horizon": self.substitution.horizon, "with_controls": False, "attention": self.attention}
        scores = measure(base, {"gistnet": net}, [batch], **settings)
        self.substitution.update(scores)
        if net.makes_one_vector:
            self.space.update(base, net, batch)
        if self.level2 is not None:
            scores = measure_level(base, {"gistnet": net}, [batch], **settings)
            if scores is not None:
                self.level2.update(scores)

    def compute(self) -> dict[str, Tensor]:
        found = self.substitution.compute()
        if self.space.geometry.update_called:  # keys and values lie in no space
            found |= self.space.compute()
        if self.level2 is not None:
            found |= {f"level2/{name}": value for name, value in self.level2.compute().items()}
        return found
