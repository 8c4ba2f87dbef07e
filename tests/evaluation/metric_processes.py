"""Every metric class, fed with a share of the same data: alone, or as one of two processes that exchange their sums."""

import os

import torch
from block_scores import synthetic

from megactx.evaluation.geometry import AttentionEntropy, GistGeometry
from megactx.evaluation.metrics import GistMetrics
from megactx.evaluation.reconstruction import ReconstructionMetrics
from megactx.evaluation.scores import BlockScores

BLOCKS, SPLIT = 30, 11  # uneven shares


def feed(rows: range) -> dict[str, torch.Tensor]:
    """What each metric says after these rows, one update per three rows."""
    generator = torch.Generator().manual_seed(0)
    scores = synthetic(blocks=BLOCKS, horizon=18, noise=0.4, cost=2.0)
    gists, right = torch.randn(2, BLOCKS, 8, generator=generator) + 0.5
    paired = torch.arange(BLOCKS) % 4 > 0
    weights = torch.randn(BLOCKS, 4, 2, 8, generator=generator).mul(3).softmax(-1)
    logits = torch.randn(BLOCKS, 5, 9, generator=generator)
    tokens = torch.randint(0, 9, (BLOCKS, 5), generator=generator)
    domain = ["structured" if i < 4 else name for i, name in enumerate(scores.domain)]  # only the first process's
    metrics = [
        GistMetrics(18),
        GistGeometry(8),
        AttentionEntropy(),
        ReconstructionMetrics(),
    ]
    substitution, geometry, entropy, decoder = metrics
    for at in range(rows.start, rows.stop, 3):
        part = list(range(at, min(at + 3, rows.stop)))
        names = [domain[i] for i in part]
        substitution.update(
            BlockScores(
                scores.full[part],
                scores.drop[part],
                *({"gistnet": named["gistnet"][part]} for named in (scores.carriers, scores.kl, scores.agree)),
                domain=names,
                document=scores.document[part],
                start=scores.start[part],
            )
        )
        geometry.update(gists[part], names, paired[part], right[part][paired[part]])
        entropy.update(weights[part], names)
        decoder.update(logits[part], tokens[part], names)
    return {f"{type(metric).__name__}: {name}": v for metric in metrics for name, v in metric.compute().items()}


def process(rank: int, folder: str) -> None:
    """One of two: writes what it computed, which must be what the other computed too."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(feed(range(0, SPLIT) if rank == 0 else range(SPLIT, BLOCKS)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
