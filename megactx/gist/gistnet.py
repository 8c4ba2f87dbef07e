"""GistNet: a block of K embeddings (or gists of the level below) -> one vector that the base LM reads instead."""

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn

from megactx.framework.config.types import Count, Positive, Whole, declared
from megactx.lm.gaussian_rope import PositionSpread
from megactx.lm.prefill import Prefill, blocks

from . import heads, poolings
from .backbone import Backbone
from .base_backbone import BaseBackbone
from .carrier import POSITIONS, Compressor, SoftTokens
from .parts import find

TYPES, SKIPS, INPUTS = ("transformer", "base", "mean"), ("none", "last", "mean"), ("embedding", "hidden")


class Seen(NamedTuple):
    """What the backbone reads in place of the block's embeddings."""

    states: Tensor  # [B, W + K, D]
    mask: Tensor | None  # bool [B, W + K], False where the document has not begun; None: all are there
    hidden: bool = False  # states of the base LM, not embeddings or gists


@declared("gistnet", block_size="block_size")
class GistNet(Compressor):
    """One vector for the K embeddings of a block, or for K gists: the last token plus a learned correction (method 2).

    The gist is ``skip + head(pool(backbone(block)))``, at the scale of the base LM's token embeddings. With several
    ``slots`` the backbone reads the block as one, and each slot is such a gist of its share of the block's states.

    Args:
        width: D of the base LM.
        embedding_rms: root mean square of the base LM's token embeddings; a fresh gist has the same.
        block_size: K.
        type: ``transformer``; ``base``: the base LM's own first layers with LoRA, see ``BaseBackbone``; or ``mean``: no
            backbone, the control ``blockmean_linear`` / ``blockmean_mlp``.
        layers: blocks of the backbone, 1..16, or those that the base LM has.
        num_heads: attention heads; divides ``width``.
        pooling: a file of ``megactx/gist/poolings``.
        head: a file of ``megactx/gist/heads``.
        skip: ``none`` | ``last`` (last token's embedding plus a correction that starts at zero) | ``mean`` (the same
            with the block's mean, at token scale). The correction is the head plus a linear shortcut. Both read the
            pooled vector, the last token's embedding and the block's mean.
        position: ``centre`` | ``end``, see ``Compressor``.
        dropout: in the backbone.
        context: W, tokens to the left of the block that are read too; gists of gists read W // K gists there.
        input: ``embedding``, or ``hidden``: the backbone reads the base LM's own states of the block, which know the
            text before it. Gists of gists read gists in both cases.
        input_layer: which states: 0 is what goes into the first layer of the base LM, L what leaves the last one.
        gaussian_rope: ``plain`` | ``damped`` | ``learned``: how wide the gist's position is, see ``PositionSpread``.
        levels: sets of weights. With 1, tokens and gists of every level share one set. With 2, gists of gists have a
            set of their own, and so on; levels beyond the last share the last set.
        rank: r of LoRA with ``type=base``.
        slots: M, vectors of a block; divides K. More than one make no gists of gists, so no tree and no session.
        gain: how far a fresh correction moves a gist for what the head says, and with ``skip=none`` the scale of a
            fresh gist; each channel's gain is learned from there.
        base: the base LM, which ``type=base`` alone needs.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    setting = "gistnet"

    def __init__(
        self,
        width: int,
        embedding_rms: float,
        block_size: Count = 32,
        type: Literal[TYPES] = "transformer",
        layers: Whole = 2,
        num_heads: Count = 8,
        pooling: str = "mean",
        head: str = "mlp",
        skip: Literal[SKIPS] = "last",
        position: Literal[POSITIONS] = "end",
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        context: Whole = 0,
        input: Literal[INPUTS] = "embedding",
        input_layer: Whole = 2,
        gaussian_rope: str = "plain",
        levels: Count = 1,
        rank: Count = 16,
        gain: Positive = 1.0,
        slots: Count = 1,
        base=None,
    ):
        super().__init__(block_size, position)
        if type == "mean" and (context or input != "embedding"):
            raise ValueError(f"gistnet.type=mean has no backbone: gistnet.context={context}, gistnet.input={input}")
        if slots > 1:
            if block_size % slots:
                raise ValueError(f"gistnet.slots={slots} does not divide block_size={block_size}")
            for name, value, allowed in (("levels", levels, 1), ("gaussian_rope", gaussian_rope, "plain")):
                if value != allowed:
                    raise ValueError(f"{name}={value} is not allowed with gistnet.slots={slots}: {allowed}")
            if find(poolings, pooling, "gistnet.pooling").needs_cls:  # one vector for all of the block
                raise ValueError(f"pooling={pooling} is not allowed with gistnet.slots={slots}: it has one CLS vector")
        self.width, self.skip, self.embedding_rms = width, skip, embedding_rms
        if slots > 1:  # not a setting of its own otherwise: trees know their encoder by its settings
            self.slots = slots
        self.left_context, self.needs_hidden, self.input_layer = context, input == "hidden", input_layer
        self.spread = PositionSpread(gaussian_rope, block_size)
        if type == "transformer":
            if not 1 <= layers <= 16:
                raise ValueError(f"gistnet.layers={layers} is not allowed: 1 to 16")
            if num_heads < 1 or width % num_heads or width // num_heads % 2:
                fits = [n for n in range(1, width // 2 + 1) if width % n == 0 and width // n % 2 == 0]
                raise ValueError(
                    f"gistnet.num_heads={num_heads} does not divide the base LM's width {width} into even heads; "
                    f"allowed are {', '.join(map(str, fits))}"
                )
            self.pooling = find(poolings, pooling, "gistnet.pooling")(width)
            self.backbone = Backbone(width, layers, num_heads, dropout, self.pooling.needs_cls)
        elif type == "base":
            if base is None:
                raise ValueError("gistnet.type=base: its layers are those of a base LM, and none is given")
            if dropout:
                raise ValueError(f"gistnet.dropout={dropout} is not allowed with gistnet.type=base: 0")
            self.pooling = find(poolings, pooling, "gistnet.pooling")(width)
            first = input_layer if self.needs_hidden else 0
            self.backbone = BaseBackbone(base, layers, rank, self.pooling.needs_cls, first)
        else:
            self.pooling, self.backbone = find(poolings, "mean", "gistnet.pooling")(width), None
        inputs = width if skip == "none" else 3 * width
        self.enter = nn.Linear(width, width, bias=False) if self.needs_hidden and type != "base" else None
        self.head = find(heads, head, "gistnet.head")(inputs, width)
        self.shortcut = nn.Linear(inputs, width, bias=False) if skip != "none" else None
        self.gain = nn.Parameter(torch.full((width,), float(gain)))
        self._initialise()
        same = (width, embedding_rms, block_size, type, layers, num_heads, pooling, head, skip, position, dropout)
        self.above = nn.ModuleList(GistNet(*same, rank=rank, gain=gain, base=base) for _ in range(levels - 1))

    @property
    def levels(self) -> int:
        return 1 + len(self.above)

    @property
    def makes_levels(self) -> bool:
        return self.slots == 1

    @property
    def reads_layers(self) -> bool:
        """Whether its gists depend on the layers of the base LM, and not on the embeddings alone."""
        return self.needs_hidden or isinstance(self.backbone, BaseBackbone)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(self.backbone, Backbone):
            for block in self.backbone.blocks:
                for last in (block.out, block.down):
                    # Keeps the residual stream's scale independent of depth (Radford et al. 2019).
                    last.weight.data /= (2 * len(self.backbone.blocks)) ** 0.5
        if self.skip != "none":
            nn.init.zeros_(self.head.last.weight)
            nn.init.zeros_(self.shortcut.weight)

    def sigma(self, lod: int) -> Tensor | None:
        """Standard deviation of a gist's position in tokens, a scalar; ``None`` where positions are points."""
        return self.spread(torch.full((), lod, device=self.gain.device))

    def compress(self, base, prefill: Prefill, starts: Tensor, lod: int = 1) -> SoftTokens:
        """Gists of the blocks, or of the spans of K^level tokens, at starts [B, N] of the documents of ``prefill``.

        Raises:
            ValueError: ``input_layer`` is not one of the base LM's.
        """
        if self.slots > 1:
            embedded = base.embed(blocks(prefill.ids, starts, self.block_size)).flatten(0, 1)
            gists = self.encode_block(embedded, self.seen(base, prefill, starts))
            share = self.block_size // self.slots
            offsets = range(self.offset_in(share), self.block_size, share)
            return SoftTokens(gists.view(*starts.shape, self.slots, -1), offsets)
        k, left = self.block_size, self.left_context // self.block_size if lod > 1 else 0
        if lod > 2 and left:
            raise ValueError(f"gistnet.context={self.left_context} is not supported above LOD 2, wanted {lod}")
        # First the gists of all blocks of a span and of those left of it, then the levels above, which read only gists.
        inner = torch.arange(-left * k, k**lod, k, device=starts.device)
        first = (starts[..., None] + inner).flatten(1)
        mask = (first >= 0).view(-1, len(inner))
        first = first.clamp(min=0)
        embedded = base.embed(blocks(prefill.ids, first, k)).flatten(0, 1)
        gists = self.encode_block(embedded, self.seen(base, prefill, first)).view(-1, len(inner), self.width)
        if lod > 1:
            gists = self.encode_gists(gists[:, left:], lod, Seen(gists, mask) if left else None)[-1]
        return SoftTokens(gists[:, 0].view(*starts.shape, -1), self.offset_in(k**lod), self.sigma(lod))

    def seen(self, base, prefill: Prefill, starts: Tensor) -> Seen | None:
        """What the backbone reads of the blocks at starts [B, N]; ``None``: only their embeddings."""
        if not (self.left_context or self.needs_hidden):
            return None
        index = (starts - self.left_context)[..., None] + torch.arange(
            self.left_context + self.block_size, device=starts.device
        )  # [B, N, W + K]
        mask = index >= 0
        if self.needs_hidden:
            if not 0 <= self.input_layer < len(prefill.states):
                raise ValueError(
                    f"gistnet.input_layer={self.input_layer} is not allowed: 0 to {len(prefill.states) - 1}"
                )
            states = prefill.states[self.input_layer]
        else:
            states = base.embed(prefill.ids)
        taken = index.clamp(min=0).flatten(1)[..., None].expand(-1, -1, states.shape[-1])
        states = states.gather(1, taken).view(-1, index.shape[-1], states.shape[-1])
        return Seen(states, None if bool(mask.all()) else mask.flatten(0, 1), self.needs_hidden)

    def encode_block(self, embeddings: Tensor, seen: Seen | None = None) -> Tensor:
        """embeddings [B, K, D] -> gists [B, D], [B, M, D] with ``slots``, in fp32.

        The backbone reads ``seen`` instead, where it is given.

        Raises:
            ValueError: K or D are not those that the net was built for.
        """
        x = self._scaled(embeddings)
        states = x if self.backbone is None else self.backbone(*self._entering(x, seen))
        if self.slots > 1:
            states, x = (part.unflatten(1, (self.slots, -1)).flatten(0, 1) for part in (states, x))
        pooled = self.pooling(states)
        if self.skip == "none":
            # Normalised, so that a fresh gist has exactly the scale of a token; the gain is learned.
            gist = F.rms_norm(self.head(pooled).float(), (self.width,)) * self.gain
        else:
            # Nearly all of the loss is at h = 0. The far offsets are served well by a linear map of the mean. Without
            # the plain mean and the shortcut they are learned so slowly that blockmean_linear is as good there.
            mean = F.rms_norm(x.mean(dim=1), (self.width,))
            kept = x[:, -1] if self.skip == "last" else mean
            seen = torch.cat([pooled.to(kept.dtype), x[:, -1], mean], dim=-1)
            gist = kept + (self.head(seen) + self.shortcut(seen)).float() * self.gain
        gist = gist * self.embedding_rms
        return gist if self.slots == 1 else gist.unflatten(0, (-1, self.slots))

    encode_span = encode_block  # the design's name

    def encode_lod(self, embeddings: Tensor, lod: int) -> Tensor:
        """embeddings [B, K^lod, D] -> their gist of that LOD [B, D]: a gist of gists of gists.

        Raises:
            ValueError: there are not K^lod embeddings.
        """
        return self.encode_lods(embeddings, lod)[-1][:, 0]

    def encode_lods(self, embeddings: Tensor, lod: int) -> list[Tensor]:
        """embeddings [B, K^lod, D] -> the gists of every LOD: [B, K^(lod - 1), D], ..., [B, 1, D].

        Raises:
            ValueError: there are not K^lod embeddings.
        """
        if lod < 1 or embeddings.shape[1] != self.block_size**lod:
            raise ValueError(
                f"a gist of LOD {lod} stands for {self.block_size}^{lod} embeddings, not {embeddings.shape[1]}"
            )
        first = self.encode_block(embeddings.reshape(-1, self.block_size, self.width))
        return self.encode_gists(first.view(len(embeddings), -1, self.width), lod)

    def encode_gists(self, gists: Tensor, lod: int, seen: Seen | None = None) -> list[Tensor]:
        """Gists of level 1 [B, K^(level - 1), D] -> the gists of every level up to ``lod``, from level 1 on.

        ``seen``: for level 2, the given gists together with the gists to their left.
        """
        found = [gists]
        for own in range(2, lod + 1):
            below = found[-1].reshape(-1, self.block_size, self.width)
            found.append(self.of_lod(own).encode_block(below, seen).view(len(gists), -1, self.width))
        return found

    def of_lod(self, lod: int) -> "GistNet":
        """The weights that make gists of this LOD."""
        return [self, *self.above][min(lod - 1, len(self.above))]

    def _entering(self, x: Tensor, seen: Seen | None) -> tuple[Tensor, Tensor | None, int]:
        """Arguments of the backbone: states, a mask of those that are there, and how many lie left of the block."""
        own = isinstance(self.backbone, BaseBackbone)  # which reads what the base LM reads, at its scale
        if seen is None:
            return x * self.embedding_rms if own else x, None, 0
        if own:
            states = seen.states.float()
        elif seen.hidden:
            states = self.enter(F.rms_norm(seen.states.float(), (self.width,)))
        else:
            states = seen.states.float() / self.embedding_rms
        return states, seen.mask, seen.states.shape[1] - self.block_size

    def attention(self, embeddings: Tensor, seen: Seen | None = None) -> Tensor | None:
        """How the gist reads its block: weights in fp32 that sum to 1 over the last axis. They are for measuring only.

        Args:
            embeddings: [B, K, D].

        Returns:
            ``query``: the learned query's weights [B, 1, 1, K]. ``cls``: the CLS row of the last layer
            [B, A, 1, 1 + K], CLS first. ``mean``: all rows of the last layer [B, A, K, K]. ``None`` without a backbone
            (``type: mean``): there is no attention; and with the base LM's own layers, which show no weights.
        """
        if not isinstance(self.backbone, Backbone):
            return None
        states, last = self.backbone.with_attention(*self._entering(self._scaled(embeddings), seen))
        return self.pooling.attention(states, last) if hasattr(self.pooling, "attention") else last

    def _scaled(self, embeddings: Tensor) -> Tensor:
        if embeddings.ndim != 3 or embeddings.shape[1:] != (self.block_size, self.width):
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}, expected [B, {self.block_size}, {self.width}] "
                "(block_size, width of the base LM)"
            )
        if not embeddings.is_floating_point():
            raise ValueError(f"embeddings have dtype {embeddings.dtype}, expected a floating type")
        return embeddings.float() / self.embedding_rms

    def forward(self, embeddings: Tensor, neighbours: Tensor | None = None, margin: float = 0.2):
        """Gists, and the loss terms that need no base LM.

        Args:
            embeddings: [B, K, D].
            neighbours: right neighbours' embeddings [P, K, D] of the first P blocks, for the contrastive term.

        Returns:
            ``(gists [B, D], terms)`` with ``terms["contrastive"]`` where neighbours are given.
        """
        from .losses.contrastive import pushed_apart

        gists = self.encode_block(embeddings)
        terms = {}
        if neighbours is not None:
            terms["contrastive"] = pushed_apart(gists[: len(neighbours)], self.encode_block(neighbours), margin)
        return gists, terms
