"""How many tokens one vector can hold: progressive cramming (Kuratov et al. 2025, arXiv 2502.13063).

    [begin] [vector] x0 x1 ... x(n-2)      the frozen base LM reads this
               x0    x1 x2 ... x(n-1)      and must say this, every token as its argmax

A gist never stands first, and neither does the vector: what a base makes of its first column is a sink of attention,
whatever stands there (SmolLM2 gave no token back exactly from there, and four or five behind ``begin``).

A vector is fitted to the first tokens of a passage, then to one more, from where it is, until it no longer gets there.
An exact vector reproduces its tokens by greedy decoding too: each is right given those before it.

P passages, T tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.lm import BaseLM
from megactx.lm.masks import CAUSAL


@dataclass(frozen=True)
class Capacity:
    """Of each passage [P]: the longest beginning that was exact, and of one block's tokens the share that was right.

    ``vectors`` [P, D] are those that were exact.
    """

    exact: Tensor
    block: Tensor
    vectors: Tensor


@torch.inference_mode(False)
def capacity(
    base: BaseLM,
    passages: Tensor,
    begin: int,
    block: int = 32,
    patience: int = 300,
    lr: float = 0.5,
    seed: int = 0,
    told: Callable[[int, Tensor], None] = lambda steps, exact: None,
) -> Capacity:
    """Fit a vector to as much of each passage as it can hold.

    Args:
        base: the frozen base LM.
        passages: ids [P, T]; T is as far as it goes.
        begin: id of the token before the vector, that which opens a document.
        block: tokens of which ``Capacity.block`` says the share that is right when all of them are fitted at once for
            ``patience`` steps.
        patience: steps of Adam that a vector has for one token more.
        lr: of Adam, in units of the token embeddings' root mean square.
        told: called now and then with the steps so far and the exact lengths.

    Raises:
        ValueError: a passage shorter than a block.
    """
    count, longest = passages.shape
    if longest < block:
        raise ValueError(f"capacity: passages have {longest} tokens, allowed is block={block} or more")
    rms, device = base.embedding_rms(), passages.device
    generator = torch.Generator().manual_seed(seed)
    first = torch.full_like(passages[:, :1], begin)
    with torch.no_grad():
        embedded = base.embed(torch.cat([first, passages], dim=1))
    start = 0.1 * torch.randn(count, base.width, generator=generator).to(device)
    exact, aim = torch.zeros(count, dtype=torch.long), torch.ones(count, dtype=torch.long)
    fit, kept = _Fit(start, lr), start * rms
    since, steps = torch.zeros(count, dtype=torch.long), 0
    going = torch.arange(count)
    while len(going):
        before = fit.vectors[going] * rms
        right = _step(base, fit, embedded, passages, aim, going, rms)  # bool [going, longest aim]
        steps += 1
        since[going] += 1
        done = (right.cpu() | (torch.arange(right.shape[1]) >= aim[going, None])).all(dim=1)
        # What is exact for its aim is often exact for more.
        ahead = right.cpu().long().cumprod(dim=1).sum(dim=1)
        reached = going[done]
        exact[reached] = torch.maximum(aim[reached], ahead[done].clamp(max=longest))
        kept[reached] = before[done]
        aim[reached], since[reached] = (exact[reached] + 1).clamp(max=longest), 0
        going = going[(since[going] < patience) & (exact[going] < longest)]
        if steps % 100 == 0:
            told(steps, exact)
    every, whole = torch.arange(count), _Fit(start, lr)
    length = torch.full((count,), block)
    for _ in range(patience):
        right = _step(base, whole, embedded, passages, length, every, rms)
    return Capacity(exact, right[:, :block].float().mean(dim=1).cpu(), kept)


class _Fit:
    """Vectors [P, D] in units of the embeddings, each with an Adam of its own: they come and go."""

    def __init__(self, start: Tensor, lr: float):
        self.lr = lr
        self.vectors, self.first, self.second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
        self.steps = torch.zeros(len(start), 1, device=start.device)

    def update(self, rows: Tensor, gradient: Tensor) -> None:
        self.steps[rows] += 1
        self.first[rows] = 0.9 * self.first[rows] + 0.1 * gradient
        self.second[rows] = 0.99 * self.second[rows] + 0.01 * gradient.square()
        mean = self.first[rows] / (1 - 0.9 ** self.steps[rows])
        self.vectors[rows] -= self.lr * mean / ((self.second[rows] / (1 - 0.99 ** self.steps[rows])).sqrt() + 1e-8)


def _step(base: BaseLM, fit: _Fit, embedded: Tensor, ids: Tensor, aim: Tensor, rows: Tensor, rms: float) -> Tensor:
    """One step of the vectors of some passages towards the first ``aim`` tokens; -> which tokens were right before."""
    length = int(aim[rows].max())
    with torch.enable_grad():
        vectors = fit.vectors[rows].requires_grad_(True)
        own = embedded[rows]
        read = torch.cat([own[:, :1], (vectors * rms)[:, None].to(own.dtype), own[:, 1:length]], dim=1)
        positions = torch.arange(1 + length, device=ids.device).expand(len(rows), -1)
        logits = base.logits(base(read, positions, CAUSAL)[:, 1:]).float()
        loss = F.cross_entropy(logits.transpose(1, 2), ids[rows, :length], reduction="none")
        inside = torch.arange(length, device=ids.device) < aim[rows, None].to(ids.device)
        (loss * inside).sum().backward()  # passages are independent
    fit.update(rows, vectors.grad)
    return logits.argmax(dim=-1) == ids[rows, :length]
