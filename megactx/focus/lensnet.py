"""LensNet: what the detail of each entry of a working context is worth for what comes next (method 10).

It reads the whole window in both directions: an old entry's value depends on the newest tokens, which ask the question.
For every entry it estimates two values, in nats per token:

    v_down   what is won if its children take its place                        gists only
    v_keep   what is lost if its parent takes the place of all its siblings    complete sets of siblings only

B rows, W entries, D width.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn

from megactx.focus import heads
from megactx.framework.config.types import Count, declared
from megactx.gist.backbone import Block
from megactx.gist.parts import find
from megactx.lm.gaussian_rope import LODS, PositionSpread
from megactx.memory import Composite, WorkingContext

from .by_part import priced
from .edits import Moves, moves
from .mean_embeddings import window_mean_embeddings
from .price import price, signed_scores

# An old entry and the question lie thousands of tokens apart. At such distances, pairs of channels that turn with
# position cannot tell whether the two are alike. So half of the pairs do not turn.
ROTARY_SHARE = 0.5
SHARPNESS = 2.0  # of queries and keys at the start: entries of like content find each other among hundreds
QUESTIONS = (8, 32, 128)  # newest entries, each so many a question that an entry is compared with
DIRECT = 32  # hidden units between the features and the values
WIDE = 512  # entries from which on a window without padding is read without a mask
START_TAU = 0.05  # nats, until values were seen


@dataclass(frozen=True)
class Scores:
    """What LensNet says of a batch of working contexts."""

    v_down: Tensor  # [B, W] nats, 0 where illegal
    v_keep: Tensor  # [B, W] nats, one number per set of siblings; 0 where illegal
    price: Tensor  # [B] nats: what detail costs there at the moment; with parts that of the session, then of each
    score: Tensor  # [B, W], from -1 (collapse) to 1 (expand), 0 where nothing is legal


@declared("lensnet", block_size="block_size")
class LensNet(nn.Module):
    """Transformer blocks over a window estimate what each entry's detail is worth for the tokens that come next.

    Setting: ``--megacontext focus``.

    Args:
        width: D of the base LM.
        block_size: K.
        layers: blocks.
        num_heads: must divide D into even heads.
        head: a file of ``megactx/focus/heads``.
        dropout: inside the blocks.
        gaussian_rope: ``plain``, ``damped`` or ``learned``: how wide the positions of gists are.
        content: also read the mean embedding of the tokens that an entry stands for, see ``window_mean_embeddings``.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    def __init__(
        self,
        width: int,
        block_size: Count = 32,
        layers: Annotated[int, Ge(1), Le(16)] = 2,
        num_heads: Count = 8,
        head: str = "mlp",
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        gaussian_rope: str = "damped",
        content: bool = True,
    ):
        super().__init__()
        if width % num_heads or width // num_heads % 2:
            raise ValueError(
                f"lensnet.num_heads={num_heads} does not divide the base LM's width {width} into even heads"
            )
        self.width, self.block_size = width, block_size
        self.spread = PositionSpread(gaussian_rope, block_size)
        self.lod = nn.Embedding(LODS + 1, width)
        # Of how wide an entry is, how far from the cursor, how alike to the questions it and its left neighbour are.
        features = 2 + (2 * len(QUESTIONS) if content else 0)
        self.place = nn.Linear(features, width)
        self.content = nn.Linear(width, width, bias=False) if content else None
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout, ROTARY_SHARE) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = find(heads, head, "lensnet.head")(width)
        self.last = nn.Linear(self.head.outputs, 2)
        # These few numbers teach from dozens of windows; the blocks need thousands. As inputs of the blocks alone the
        # likenesses found 0.18 to 0.41 of the needed blocks, through these 32 units alone 0.66 (RESULTS.md).
        self.direct = nn.Sequential(nn.Linear(features, DIRECT), nn.GELU(), nn.Linear(DIRECT, 2))
        for last in (self.last, self.direct[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        for block in self.blocks:
            for linear in (block.out, block.down):
                linear.weight.data /= (2 * layers) ** 0.5
            # Keys start equal to queries, so an entry first attends to what is like it. That is what there is to find.
            query, key, _ = block.qkv.weight.data.chunk(3)
            key.copy_(query.mul_(SHARPNESS))
        # Spread of the values that were measured so far: the unit in which a value counts as large.
        self.register_buffer("tau", torch.tensor(START_TAU))
        self.register_buffer("updates", torch.tensor(0))

    def forward(
        self,
        embeddings: Tensor,
        lods: Tensor,
        distance: Tensor,
        mask: Tensor,
        mean_embeddings: Tensor | None = None,
        wanted: Tensor | None = None,
        borders: Tensor | None = None,
    ) -> Tensor:
        """Values of every entry, legal or not.

        Args:
            embeddings: what the base LM reads, [B, W, D].
            lods: [B, W].
            distance: tokens from where each entry sits to the end of its row, [B, W].
            mask: which entries are none of the padding, bool [B, W].
            mean_embeddings: of ``window_mean_embeddings``, [B, W, D]; read where the net was built for it.
            wanted: columns whose values are read, bool [W]; ``None``: all. The last block works for no others.
            borders: which entries begin another part, of ``WorkingContext.borders``.

        Returns:
            [B, W, 2], v_down and v_keep in nats; 0 in the padding and where nobody wants any.
        """
        far = torch.log2(1 + distance.float()) / 10
        wide = lods.float() * math.log2(self.block_size) / 10
        x = F.rms_norm(torch.where(mask[..., None], embeddings, 0.0).float(), (self.width,))
        features = torch.stack([wide, far], dim=-1)
        if self.content is not None:
            special, like = _alike(mean_embeddings, lods, mask, self.block_size, borders)
            features = torch.cat([features, like], dim=-1)
            x = x + self.content(special * self.width**0.5)
        x = x + self.lod(lods.clamp(max=LODS)) + self.place(features)
        sigma = self.spread(lods)
        # Without a mask attention is a seventh faster in wide windows.
        whole = mask.shape[1] >= WIDE and not torch.is_grad_enabled() and bool(mask.all())
        seen, positions = None if whole else mask[:, None, None], -distance.float()[:, None]
        sigma = None if sigma is None else sigma[:, None]
        for block in self.blocks[:-1]:
            x = block(x, positions, seen, sigma)
        columns = None if wanted is None or bool(wanted.all()) else wanted.nonzero()[:, 0]
        x = self.blocks[-1](x, positions, seen, sigma, columns)
        values = self.last(self.head(self.norm(x)))
        if columns is not None:
            values = values.new_zeros(*mask.shape, 2).index_copy_(1, columns, values)
            mask = mask & wanted
        return torch.where(mask[..., None], (values + self.direct(features)).float(), 0.0)

    def read(
        self, context: WorkingContext, mean_embeddings: Tensor | None = None, wanted: Tensor | None = None
    ) -> Tensor:
        """The same for a working context: [B, W, 2]; ``mean_embeddings`` where it is known already."""
        distance = context.ends()[:, None] - context.positions()
        if mean_embeddings is None and self.content is not None:
            mean_embeddings = window_mean_embeddings(context)
        entries, borders = context.to_tensor(), context.borders()
        return self(entries, context.lods(), distance, context.mask, mean_embeddings, wanted, borders)

    def score(
        self,
        context: WorkingContext,
        legal: Moves | None = None,
        margin: float | Tensor = 0.0,
        mean_embeddings: Tensor | None = None,
    ) -> Scores:
        """Values, the price at which they fit the budget, and signed scores.

        Args:
            legal: what may be done; ``None``: what ``moves`` says.
            margin: of ``price``.
            mean_embeddings: of ``window_mean_embeddings``, where it is known already.
        """
        legal = moves(context) if legal is None else legal
        wanted = (legal.expand | (legal.first >= 0)).any(0)  # no more of them are in Scores
        return self.scored(context, legal, *masked(self.read(context, mean_embeddings, wanted), legal), margin)

    def scored(
        self, context: WorkingContext, legal: Moves, v_down: Tensor, v_keep: Tensor, margin: float | Tensor = 0.0
    ) -> Scores:
        """The same of values that are known, [B, W] each."""
        if isinstance(context.tree, Composite):
            return Scores(v_down, v_keep, *priced(context, legal, v_down, v_keep, self.tau, margin))
        now = price(v_down, v_keep, legal, context.budget - context.lengths, self.block_size, margin)
        return Scores(v_down, v_keep, now, signed_scores(v_down, v_keep, legal, now, self.tau))

    @torch.no_grad()
    def see(self, values: Tensor) -> None:
        """Take measured values into the running ``tau``: a plain mean of 100 calls, then an exponential one.

        The spread is the mean absolute deviation, scaled so that it is the standard deviation of a normal distribution.
        The standard deviation itself would follow the few blocks that are worth a hundred times the others: it was 0.29
        nats where this is 0.08, and as the unit of scores it forbade every ordinary edit (RESULTS.md).
        """
        if len(values) < 2:
            return
        self.updates += 1
        values = values.float()
        spread = (values - values.mean()).abs().mean() * (math.pi / 2) ** 0.5
        self.tau += (spread - self.tau) / self.updates.clamp(max=100)
        self.tau.clamp_(min=1e-4)


def likeness(context: WorkingContext) -> Tensor:
    """The most that each entry's block, or its left neighbour, is like any question: [B, W], see ``_alike``."""
    contents, k = window_mean_embeddings(context), context.tree.block_size
    return _alike(contents, context.lods(), context.mask, k, context.borders())[1].amax(-1)


def _blockwise(
    mean_embeddings: Tensor, lods: Tensor, mask: Tensor, block_size: int, borders: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> content [B, W, D] in which raw tokens have the mean of their block, and the column at which each entry's block
    begins, [B, W].

    A run of raw tokens begins on the grid of blocks, so every K-th token of it begins a block. Only the last block of a
    run may be partial. A run ends where a part does.
    """
    b, w = lods.shape
    column = torch.arange(w, device=lods.device).expand(b, w)
    raw = lods == 0
    begin = torch.where(raw, -1, column).cummax(1).values + 1  # of the run
    if borders is not None:
        begin = torch.maximum(begin, torch.where(borders, column, 0).cummax(1).values)
    begin = torch.where(raw, column - (column - begin) % block_size, column)
    mean_embeddings = torch.where(mask[..., None], mean_embeddings, 0.0).float()
    total = torch.zeros_like(mean_embeddings).scatter_add_(
        1, begin[..., None].expand_as(mean_embeddings), mean_embeddings
    )
    count = torch.zeros(b, w, device=mean_embeddings.device).scatter_add_(1, begin, mask.float())
    mean = total / count.clamp(min=1)[..., None]
    return mean.gather(1, begin[..., None].expand_as(mean)), begin


def _alike(
    mean_embeddings: Tensor, lods: Tensor, mask: Tensor, block_size: int, borders: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> how each entry's block differs from the window's mean, [B, W, D] of length 1; and how like the questions it
    and the block to its left are, [B, W, 2 x questions].

    Likeness is the cosine with the mean of the newest entries, in standard deviations from what is usual in this
    window. Every block counts once, raw or not.
    """
    blocks, begin = _blockwise(mean_embeddings, lods, mask, block_size, borders)
    weight = mask / torch.where(lods == 0, block_size, 1)
    weight = (weight / weight.sum(1, keepdim=True).clamp(min=1e-6))[..., None]
    mean = (blocks * weight).sum(1, keepdim=True)
    special = torch.where(mask[..., None], F.normalize(blocks - mean, dim=-1), 0.0)
    own = torch.where(mask[..., None], mean_embeddings.float() - mean, 0.0)
    behind = mask.flip(1).cumsum(1).flip(1)  # entries from this one to the last
    asked = [F.normalize((own * (mask & (behind <= n))[..., None]).sum(1), dim=-1) for n in QUESTIONS]
    like = torch.einsum("bwd,bqd->bwq", special, torch.stack(asked, dim=1))
    like = (like - (like * weight).sum(1, keepdim=True)) * mask[..., None]
    like = like / (like.square() * weight).sum(1, keepdim=True).sqrt().clamp(min=1e-6)
    left = like.gather(1, (begin - 1).clamp(min=0)[..., None].expand_as(like)) * (mask & (begin > 0))[..., None]
    return special, torch.cat([like, left], dim=-1)


def masked(values: Tensor, legal: Moves) -> tuple[Tensor, Tensor]:
    """values [B, W, 2] -> v_down and v_keep [B, W], 0 where illegal; v_keep is the mean over each set of siblings."""
    v_down = torch.where(legal.expand, values[..., 0], 0.0)
    inside = legal.first >= 0
    first = legal.first.clamp(min=0)
    keep = torch.where(inside, values[..., 1], 0.0)
    total = torch.zeros_like(keep).scatter_add(1, first, keep)
    count = torch.zeros_like(keep).scatter_add(1, first, inside.to(keep.dtype))
    mean = (total / count.clamp(min=1)).gather(1, first)
    return v_down, torch.where(inside, mean, 0.0)
