"""Synthetic scores with a known recovery."""

import torch

from megactx.evaluation.scores import BlockScores

RECOVERY = {"last token": 0.3, "untrained mean (raw)": 0.1, "untrained mean (rescaled)": 0.2, "gistnet": 0.6}


def synthetic(
    blocks=40,
    horizon=32,
    per_document=5,
    noise=0.05,
    cost=1.0,
    seed=0,
    first=32,
    recovery=None,
    domains=("narrative", "code"),
) -> BlockScores:
    """Dropping costs about ``cost`` nats, more at h = 0; each carrier recovers its share, with noise per document."""
    generator = torch.Generator().manual_seed(seed)
    document = torch.arange(blocks) // per_document
    full = torch.rand(blocks, horizon, generator=generator) * 3
    dropped = cost * (0.5 + torch.rand(blocks, horizon, generator=generator))
    dropped[:, 0] *= 4
    carriers = {}
    for name, share in (recovery or RECOVERY).items():
        own = noise * torch.randn(int(document.max()) + 1, 1, generator=generator)[document]
        carriers[name] = full + dropped * (1 - share + own)
    kl = {name: (nll - full).abs() for name, nll in carriers.items()} | {"drop": dropped}
    agree = {name: torch.rand(blocks, horizon, generator=generator) < 0.7 for name in kl}
    return BlockScores(
        full=full,
        drop=full + dropped,
        carriers=carriers,
        kl=kl,
        agree=agree,
        domain=[domains[int(d) % len(domains)] for d in document],
        document=document,
        start=first + 32 * torch.arange(blocks),
    )
