"""The base LM is asked to say a block again, and has its gist for it and nothing else (Ge et al. 2024, 2307.06945).

    branch     [sink] gist   Repeat: x0 x1 ... x(K-2)
    scored                        x0 x1 x2 ... x(K-1)

Published work mixes a fifth of it into the loss of what follows; alone it harms what the base LM does next.
"""

import torch
from torch import Tensor

from megactx.framework.config.types import Count, NonNegative, declared
from megactx.gist.loss import Context, Loss
from megactx.lm import BaseLM
from megactx.lm.chunked_head import score
from megactx.lm.prefill import blocks, rows_at

REQUEST = 3  # tokens of a request, about: how many they are is the tokenizer's matter


@declared("loss.reconstruction")
class Reconstruction(Loss):
    """The NLL of the block's own tokens behind its gist and a request, less that which the full context gives them.

    Ge et al. 2024 (arXiv 2307.06945) and others train compressors on it; here it is one term of several.

    Args:
        weight: its share of the sum.
        spans: blocks of each document that are asked for, at most: the first ones that the batch names.
        request: text between the gist and the block; it says that the block shall come, and not what follows it.

    Raises:
        ValueError: when called: the base LM has no tokenizer, or the request no tokens.
    """

    needs = ("block_starts",)
    all_vectors = True

    def __init__(self, weight: NonNegative = 0.0, spans: Count = 4, request: str = " Repeat: "):
        super().__init__(weight)
        self.spans, self.request = spans, request

    def check(self, nets) -> None:
        super().check(nets)
        if self.weight and not self.request:
            raise ValueError("loss.reconstruction.request='' is not allowed: a text of at least one token")

    def __call__(self, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        base, prefill, block = context.base, context.prefill, context.block
        every = context.batch["block_starts"]
        starts = every[:, : self.spans]
        asked = self.asked(base)
        tokens = blocks(prefill.ids, starts, block)  # [B, N, K]
        told = torch.cat([asked.to(tokens.device).expand(*starts.shape, -1), tokens[..., :-1]], dim=-1)
        words = base.embed(told).to(prefill.hidden.dtype)  # [B, N, P + K - 1, D]
        after = starts[..., None] + block + torch.arange(told.shape[-1], device=starts.device)
        hidden = []
        for carrier in context.carriers(every):  # of all blocks: the block loss has made them already
            gist = carrier.vectors[:, : self.spans, None].to(words.dtype)
            rows = torch.cat([gist, words], dim=2)
            positions = torch.cat([(starts + carrier.offset)[..., None], after], dim=-1)
            sigma = None
            if carrier.sigma is not None:
                sigma = torch.zeros_like(positions, dtype=carrier.sigma.dtype)
                sigma[..., 0] = carrier.sigma
            sink = torch.full_like(starts, block)
            read = base.forward_branches(rows, positions, prefill.cache, sink, sigma=sigma)
            hidden.append(read[:, :, len(asked) :])  # [B, N, K, D]; the request's last token predicts the first
        known = rows_at(prefill.hidden, starts - 1, block).flatten(0, 2)
        losses, _ = score(base, torch.stack(hidden).flatten(1, 3), known, tokens.flatten(), "delta_nll")
        losses = losses.mean(dim=1)
        return losses, self.numbers(context, losses, losses)

    def asked(self, base: BaseLM) -> Tensor:
        """The request's ids [P].

        Raises:
            ValueError: the base LM has no tokenizer.
        """
        if base.tokenizer is None:
            raise ValueError("loss.reconstruction.weight is not allowed: this base LM has no tokenizer")
        return base.tokenizer(self.request, add_special_tokens=False, return_tensors="pt")["input_ids"][0]

    def flops(self, batch: dict, work) -> float:
        branches, block = batch["block_starts"][:, : self.spans].numel(), work.block
        rows = block + REQUEST  # a gist, the request, all tokens but the last
        columns = branches * rows * (block + (rows + 1) / 2)  # the sink, and each other
        return work.passed(branches * rows, columns) + work.scored(branches * block)
