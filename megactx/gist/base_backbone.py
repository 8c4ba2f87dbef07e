"""The base LM's own first layers as the backbone of a GistNet, with LoRA, in which a block sees all of itself.

An encoder that starts from the decoder's weights is what published work found to matter most (Feldman & Artzi 2025).
The weights are the base LM's own tensors, so a checkpoint holds the adapters alone.

B blocks, K tokens (of the block, and of the context to its left where there is any), D width.
"""

import torch
from torch import Tensor, nn

from megactx.lm import BaseLM
from megactx.lm.adapters import lora_into
from megactx.lm.kv_hooks import layers_of


class BaseBackbone(nn.Module):
    """``layers`` layers of the base LM and a norm of its own; prepends one learned CLS vector where that is needed.

    Setting: ``gistnet.type=base``.

    Args:
        base: the base LM; it is left as it is.
        layers: how many, 1 to those that it has.
        rank: r of LoRA on all linear maps of these layers; B starts at zero, so a fresh one reads as the base LM does,
            but for what stands behind a token.
        first: the layer that it begins with, where its input is not embeddings but states of the base LM.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    def __init__(self, base: BaseLM, layers: int, rank: int, needs_cls: bool, first: int = 0):
        super().__init__()
        twin = base.twin().eval()
        decoder = twin.model.get_decoder()
        there = layers_of(decoder)
        if not 1 <= layers <= len(there) - first:
            raise ValueError(
                f"gistnet.layers={layers} is not allowed with gistnet.type=base: 1 to {len(there) - first}, from layer"
                f" {first} of the base LM on"
            )
        name = next(name for name, child in decoder.named_children() if child is there)
        setattr(decoder, name, nn.ModuleList(there[first : first + layers]))
        decoder.config.num_hidden_layers = layers
        adapters = lora_into(twin, getattr(decoder, name), rank, "gistnet.rank")
        self._twin = (twin,)  # a tuple: its frozen tensors are the base's, and no part of this module
        self.adapters = nn.ParameterDict({name.replace(".", "/"): p for name, p in adapters.items()})
        self.norm = nn.RMSNorm(base.width)
        self.cls = nn.Parameter(torch.randn(base.width) * base.embedding_rms()) if needs_cls else None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for buffer in self._twin[0].buffers():  # the parameters move with the base LM
            buffer.data = buffer.data.to(self.norm.weight.device)
        return self

    def forward(self, x: Tensor, there: Tensor | None = None, left: int = 0) -> Tensor:
        """As ``Backbone.forward``, but for the scale: x [B, left + K, D] are what the base LM's layers read."""
        if self.cls is not None:
            x = torch.cat([self.cls.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        b, rows, _ = x.shape
        seen = torch.ones(b, 1, rows, rows, dtype=torch.bool, device=x.device)
        if there is not None:
            seen[..., rows - there.shape[1] :] = there[:, None, None]
        positions = torch.arange(rows, device=x.device).expand(b, -1)
        (twin,) = self._twin
        x = self.norm(twin(x.to(twin.model.dtype), positions, seen).float())
        if not left:
            return x
        own = x[:, left + (self.cls is not None) :]
        return own if self.cls is None else torch.cat([x[:, :1], own], dim=1)
