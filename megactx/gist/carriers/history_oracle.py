"""The ceiling of vectors in history mode: all those of a document's old blocks are fitted together."""

import torch
from torch import Tensor

from megactx.gist.carrier import SoftTokens
from megactx.gist.history import with_carriers, with_everything
from megactx.lm import BaseLM
from megactx.lm.chunked_head import score
from megactx.lm.prefill import Prefill, blocks
from megactx.lm.prefill import prefill as run_prefill

from .oracle import Oracle


class HistoryOracle(Oracle):
    """Vectors of the blocks behind one segment, optimised so that the base LM reads it as over the full context.

    ``samples`` as in ``Oracle``. With 0 the vectors have seen the segment that is then scored, and M x D numbers fit S
    tokens: a loose upper bound. With 8 they are fitted on segments that the base LM samples itself.
    Setting: ``stage.ladder.history_oracle``.

    Args:
        segment, recency: S and R, tokens. The last block that ``compress`` gets ends R tokens before the segment.
        samples, steps, lr, seed: see ``Oracle``.
    """

    def __init__(
        self,
        segment: int,
        recency: int,
        block_size: int = 32,
        position: str = "end",
        samples: int = 8,
        steps: int = 100,
        lr: float = 0.1,
        seed: int = 0,
    ):
        super().__init__(segment, block_size, position, samples, steps, lr, seed)
        self.recency = recency

    def compress(self, base: BaseLM, prefill: Prefill, starts: Tensor) -> SoftTokens:
        """Vectors of all blocks behind the sink up to the last one, starts [B, M]; a document's are fitted together.

        Raises:
            ValueError: a block is left out, or they are in another order.
        """
        every = self.block_size * torch.arange(1, starts.shape[1] + 1, device=starts.device)
        if (starts != every).any():
            raise ValueError(
                f"HistoryOracle: block starts are {starts.tolist()}, wanted {every.tolist()} of each document"
            )
        each = [self._fitted(base, prefill.document(b), starts[b : b + 1]) for b in range(len(starts))]
        return SoftTokens(torch.cat(each), self.offset)

    @torch.inference_mode(False)
    def _fitted(self, base: BaseLM, prefill: Prefill, starts: Tensor) -> Tensor:
        """Those of one document: starts [1, M] -> [1, M, D]."""
        ends = starts[:, -1:] + self.block_size + self.recency
        upto = prefill.ids[:, : int(ends)].clone()  # no inference tensors in a graph
        with torch.no_grad():
            segments = (
                self._sampled(base, prefill, ends)[0, 0] if self.samples else blocks(prefill.ids, ends, self.horizon)[0]
            )
            whole = run_prefill(base, torch.cat([upto.expand(len(segments), -1), segments], dim=1))
            ends = ends.expand(len(segments), -1).clone()
            wanted = with_everything(whole, ends, self.horizon).flatten(0, 2)
            rms = base.embedding_rms()
            last = base.embed(upto.gather(1, starts + self.block_size - 1)).float() / rms
        vectors = last.clone().requires_grad_(True)
        optimizer = torch.optim.Adam([vectors], lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        with torch.enable_grad():
            for _ in range(self.steps):
                optimizer.zero_grad()
                carriers = SoftTokens((vectors * rms).expand(len(segments), -1, -1), self.offset)
                sizes = (self.block_size, self.horizon, self.recency)
                hidden = with_carriers(base, whole, ends, carriers, *sizes).flatten(0, 2)
                loss, _ = score(base, hidden[None], wanted, segments.flatten())
                loss.mean().backward()
                optimizer.step()
                schedule.step()
        return vectors.detach() * rms
