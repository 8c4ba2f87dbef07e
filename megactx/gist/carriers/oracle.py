"""The ceiling of one-vector carriers: no encoder, each block's vector is fitted by gradient descent."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.gist.carrier import Compressor, SoftTokens
from megactx.lm import BaseLM
from megactx.lm.chunked_head import score
from megactx.lm.prefill import Prefill, blocks, rows_at


class Oracle(Compressor):
    """A vector per block, optimised so that the base LM continues as with the block in place.

    ``samples=0``, oracle-fit: fitted by KL on the true continuation, which is then scored. It has seen the answer, so
    it is an upper bound, and its recovery may exceed 1. ``samples=8``, oracle-transfer: fitted on continuations that
    the base LM samples itself behind the full context, and scored on the true one. That is the ceiling that is quoted
    (method 6). Kuratov et al. 2025 (arXiv 2502.13063) fit such vectors to find what one can hold.
    Setting: ``stage.ladder.oracle``.

    Args:
        horizon: H, tokens of each continuation.
        samples: continuations per block; 0: the true one.
        steps: of Adam, with a cosine.
        lr: in units of the token embeddings' root mean square.
        seed: of the samples.
    """

    def __init__(
        self,
        horizon: int,
        block_size: int = 32,
        position: str = "end",
        samples: int = 8,
        steps: int = 100,
        lr: float = 0.1,
        seed: int = 0,
    ):
        super().__init__(block_size, position)
        for name, value, least in (("samples", samples, 0), ("steps", steps, 1)):
            if value < least:
                raise ValueError(f"oracle.{name}={value} is not allowed: at least {least}")
        self.horizon, self.samples, self.steps, self.lr, self.seed = horizon, samples, steps, lr, seed

    @torch.inference_mode(False)
    def compress(self, base: BaseLM, prefill: Prefill, starts: Tensor) -> SoftTokens:
        ends = starts + self.block_size
        ids = (
            self._sampled(base, prefill, ends) if self.samples else blocks(prefill.ids, ends, self.horizon)[:, :, None]
        )
        with torch.no_grad():
            wanted = _continued(base, prefill, ends, ids)
            rms = base.embedding_rms()
            last = base.embed(prefill.ids.gather(1, ends - 1)).float() / rms
        vectors = last.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([vectors], lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        cache = tuple(
            (keys.clone(), values.clone()) for keys, values in prefill.cache
        )  # no inference tensors in a graph
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                hidden = self._read(base, cache, starts, vectors * rms, ids)
                loss, _ = score(base, hidden.flatten(0, 3)[None], wanted.flatten(0, 3), ids.flatten())
                # Blocks are independent: the sum over blocks gives each the gradient that it would have alone.
                (loss.sum() / (ids.shape[2] * self.horizon)).backward()
                optimizer.step()
                schedule.step()
        return SoftTokens(vectors.detach() * rms, self.offset)

    @torch.no_grad()
    def _sampled(self, base: BaseLM, prefill, ends: Tensor) -> Tensor:
        """Continuations of the full context up to ends [B, N], at temperature 1: [B, N, samples, H]."""
        # One generator per document: what is drawn behind one does not depend on who shares its batch. Padding is id 0.
        seeds = (self.seed + prefill.ids.sum(dim=1)).tolist()
        generators = [torch.Generator(ends.device).manual_seed(seed) for seed in seeds]
        ids = ends.new_zeros(*ends.shape, self.samples, 0)
        for _ in range(self.horizon):
            # Every token computes all rows of its branch again: H^2 / 2 rows instead of H, but no cache of branches.
            logits = base.logits(_continued(base, prefill, ends, F.pad(ids, (0, 1)))[..., -1, :])
            each = zip(logits.float().softmax(-1).flatten(1, 2), generators, strict=True)  # B times [N * samples, V]
            drawn = torch.stack([torch.multinomial(rows, 1, generator=generator) for rows, generator in each])
            ids = torch.cat([ids, drawn.view(*ids.shape[:3], 1)], dim=-1)
        return ids

    def _read(self, base: BaseLM, cache, starts: Tensor, vectors: Tensor, ids: Tensor) -> Tensor:
        """Vectors [B, N, D] in place of the blocks, then each continuation: hidden [B, N, S, H, D]."""
        b, n, s, h = ids.shape
        after = torch.arange(h - 1, device=starts.device) + self.block_size
        relative = torch.cat([after.new_tensor([self.offset]), after])
        embedded = base.embed(ids[..., :-1])
        rows = torch.cat([vectors[:, :, None, None].to(embedded.dtype).expand(b, n, s, 1, -1), embedded], dim=3)
        positions = (starts[..., None, None] + relative).expand(b, n, s, h)
        cache_len = starts[..., None].expand(b, n, s).flatten(1)
        return base.forward_branches(rows.flatten(1, 2), positions.flatten(1, 2), cache, cache_len).view(b, n, s, h, -1)


def _continued(base: BaseLM, prefill, ends: Tensor, ids: Tensor) -> Tensor:
    """The full context up to ends [B, N], then continuations ids [B, N, S, H]: hidden [B, N, S, H, D].

    Row h predicts token h of the continuation; row 0 is the teacher's own.
    """
    b, n, s, h = ids.shape
    first = rows_at(prefill.hidden, ends - 1, 1)[:, :, None].expand(b, n, s, 1, -1)
    if h == 1:
        return first
    positions = (ends[..., None, None] + torch.arange(h - 1, device=ends.device)).expand(b, n, s, h - 1)
    cache_len = ends[..., None].expand(b, n, s).flatten(1)
    rows = base.embed(ids[..., :-1]).flatten(1, 2).to(prefill.hidden.dtype)
    hidden = base.forward_branches(rows, positions.flatten(1, 2), prefill.cache, cache_len)
    return torch.cat([first, hidden.view(b, n, s, h - 1, -1)], dim=3)
