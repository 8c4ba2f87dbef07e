"""How much of its block a gist still holds word for word: a small decoder, for diagnosis only (method 5).

It reads the gist and nothing else, and is trained on gists that are cut from their graph: neither the GistNet nor the
base LM learns from it. M blocks, K tokens, D width, V vocabulary.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megactx.data.files import ALL_DOMAINS
from megactx.gist import GistNet
from megactx.gist.backbone import Backbone
from megactx.lm import BaseLM
from megactx.lm.eval_mode import in_eval_mode
from megactx.lm.prefill import blocks, prefill, unread

from .sums import DomainSums

AT_ONCE = 64  # blocks whose logits [M, K, V] exist at once: 1 GiB at 128k entries and K = 32


class Decoder(nn.Module):
    """Gist [M, D] -> logits [M, K, V]: one learned query per position, one attention layer, the base's own embeddings.

    Args:
        width: D.
        block_size: K.
        embedding_rms: root mean square of the base LM's tokens: the decoder reads and writes at unit scale.
    """

    def __init__(self, width: int, block_size: int, embedding_rms: float):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(block_size, width))
        self.read = nn.Linear(width, width)
        self.layer = Backbone(width, layers=1, num_heads=1, dropout=0.0, needs_cls=False)
        self.embedding_rms = embedding_rms

    def forward(self, gists: Tensor, embeddings: Tensor) -> Tensor:
        """gists [M, D], embeddings [V, D], the base LM's table -> [M, K, V]."""
        states = self.layer(self.queries + self.read(gists / self.embedding_rms)[:, None])
        return states @ (embeddings / self.embedding_rms).T * states.shape[-1] ** -0.5


class ReconstructionMetrics(DomainSums):
    """``reconstruction_nll``, nats per token, and ``reconstruction_top1``, share of tokens, overall and per domain."""

    def __init__(self, domains: Iterable[str] = ALL_DOMAINS, **kwargs):
        super().__init__({"nll": (), "right": ()}, domains, **kwargs)

    def update(self, logits: Tensor, tokens: Tensor, domain: Sequence[str]) -> None:
        """logits [M, K, V], tokens [M, K], the domains of the M blocks."""
        nll = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)
        self.add(domain, nll=nll.mean(1), right=(logits.argmax(-1) == tokens).double().mean(1))

    def figures(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        means = {"reconstruction_nll": sums["nll"], "reconstruction_top1": sums["right"]}
        return {name: total / sums["blocks"] for name, total in means.items()}


def train_decoder(base: BaseLM, net: GistNet, batches: Iterable[dict], lr: float = 1e-3, seed: int = 0) -> Decoder:
    """Train a decoder, one AdamW step per batch (as ``measure`` takes them) of training documents.

    Raises:
        ValueError: a loss that is not finite.
    """
    # The end of a run is in inference mode, in which nothing can be trained.
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        decoder = Decoder(base.width, net.block_size, net.embedding_rms).to(base.model.device)
        table = _table(base)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=lr)
        for batch in batches:
            gists, tokens, _ = _gists(base, net, batch)
            logits = decoder(gists[:AT_ONCE], table).float()
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:AT_ONCE].flatten())
            if not loss.isfinite():
                raise ValueError(f"the reconstruction decoder's loss is {loss.item()}: its lr={lr} is too high")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return decoder.eval()


@torch.inference_mode()
def reconstruction(base: BaseLM, net: GistNet, decoder: Decoder, batches: Iterable[dict]) -> dict[str, float]:
    """What the decoder makes of the gists of held-out blocks: ``ReconstructionMetrics`` as numbers."""
    metric, table = ReconstructionMetrics().to(base.model.device), _table(base)
    for batch in batches:
        gists, tokens, domain = _gists(base, net, batch)
        for at in range(0, len(gists), AT_ONCE):
            part = slice(at, at + AT_ONCE)
            metric.update(decoder(gists[part], table), tokens[part], domain[part])
    return {name: value.item() for name, value in metric.compute().items()}


@torch.no_grad()
def _gists(base: BaseLM, net: GistNet, batch: dict) -> tuple[Tensor, Tensor, list[str]]:
    """The gists [M, D] of a batch, without a graph; their blocks' tokens [M, K]; their domains."""
    ids, starts = (batch[name].to(base.model.device) for name in ("ids", "block_starts"))
    tokens = blocks(ids, starts, net.block_size).flatten(0, 1)
    read = prefill(base, ids, with_states=True) if net.needs_hidden else unread(ids)
    with in_eval_mode(net):
        gists = net.compress(base, read, starts).vectors.flatten(0, 1)
    return gists, tokens, [name for name in batch["domain"] for _ in range(starts.shape[1])]


def _table(base: BaseLM) -> Tensor:
    return base.embeddings()
