"""A tiny base LM, and the slow reference that packed figures are held against: one plain forward per block."""

import torch
import torch.nn.functional as F

from megactx.lm import BaseLM, masks

WIDTH, VOCABULARY = 32, 97


def tiny_base() -> BaseLM:
    torch.manual_seed(0)
    config = dict(model_type="llama", vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64)
    config |= dict(num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256)
    base = BaseLM.from_config(config)
    for p in base.parameters():  # a random base is indifferent to what it reads
        p.data *= 3
    return base.freeze()


def document(ids: torch.Tensor, starts: list[int], domain: str = "code", text: int = 0) -> dict:
    """A batch of one document [T]."""
    return {
        "ids": ids[None],
        "lengths": torch.tensor([len(ids)]),
        "block_starts": torch.tensor([starts]),
        "domain": [domain],
        "document": torch.tensor([text]),
    }


@torch.no_grad()
def plain_nll(base, ids, start, tokens, horizon, vector=None, at=0) -> torch.Tensor:
    """NLL [H] behind the span ids[start:start + tokens]: kept (``at=None``), replaced by ``vector``, or dropped."""
    embedded, after = base.embed(ids[None])[0], torch.arange(start + tokens, start + tokens + horizon)
    if at is None:
        before, positions = embedded[: start + tokens], torch.arange(start + tokens)
    else:
        middle = [] if vector is None else [vector[None]]
        before = torch.cat([embedded[:start], *middle])
        positions = torch.cat([torch.arange(start), torch.tensor([start + at] if middle else [], dtype=torch.long)])
    x = torch.cat([before, embedded[after[:-1]]])[None]
    positions = torch.cat([positions, after[:-1]])[None]
    output = base.model(inputs_embeds=x, position_ids=positions, attention_mask=masks.causal(x.shape[1]))
    return F.cross_entropy(output.logits[0, -horizon:], ids[after], reduction="none")
