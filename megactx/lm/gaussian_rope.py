"""Gaussian RoPE: the position of an entry is N(mu, sigma^2), not a point (method 9).

    E[R(w p)] = exp(-(w sigma)^2 / 2) R(w mu)        p ~ N(mu, sigma^2), R the rotation of one pair of channels

So each rotary frequency's cos and sin are damped by its own factor: where a gist stands for 32 tokens, frequencies that
turn within 32 tokens no longer say where it is, and slow ones do. A token has sigma 0, and is rotated as ever. mu is
where the gist sits: at the span's centre both moments are those of the span, at its end only the spread is. Queries and
keys are damped alike, so an entry reads itself through the square of the factor: of the score of two entries that is
the expectation over two independent positions, which for an entry with itself it is not.

A model that normalises q and k *behind* the rotation (NanoChat) undoes the loss of length: with f the share of a
vector's energy that damping leaves, its pairs come out as exp(-(w sigma)^2 / 2) / sqrt(f). Fast pairs still lose their
weight, slow ones gain it, and the score of a damped entry does not shrink with sigma: its direction is that of the
expectation, its length that of a token.

Layers without RoPE (every fourth of SmolLM3) never look at cos and sin.

Background: Su et al. 2021, arXiv 2104.09864 (RoPE). Shapes: B batch, Q rows, F frequencies.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MODES = ("plain", "damped", "learned")
LODS = 4  # with a learned scale of their own; coarser ones share the last, which stands for 32^4, a million tokens


class PositionSpread(nn.Module):
    """How wide the position of an entry is, by its LOD.

    ``damped``: the standard deviation of a uniform position in the K^lod tokens that the entry stands for, so
    K^lod / sqrt(12). ``learned``: that times one learned factor per LOD, which starts at 1 and stays positive.
    ``plain``: no spread at all, the rotation is the model's own.

    Args:
        mode: of ``MODES``.
        block_size: K.

    Raises:
        ValueError: an unknown mode.
    """

    def __init__(self, mode: str, block_size: int):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"gistnet.gaussian_rope={mode} is not known, allowed are {', '.join(MODES)}")
        self.mode, self.block_size = mode, block_size
        # As logarithms: weight decay then pulls the factors of LODs that are not trained to 1, where they start.
        self.log_scale = nn.Parameter(torch.zeros(LODS)) if mode == "learned" else None

    def forward(self, lods: Tensor) -> Tensor | None:
        """lods [...], whole numbers, 0 for tokens -> sigma [...] in tokens; ``None`` where the mode is ``plain``."""
        if self.mode == "plain":
            return None
        sigma = self.block_size ** lods.float() / 12**0.5
        if self.log_scale is not None:
            sigma = sigma * self.log_scale.exp().take((lods.long() - 1).clamp(0, LODS - 1))
        return torch.where(lods > 0, sigma, 0.0)


class GaussianRotary(nn.Module):
    """What stands in for a model's ``rotary_emb`` during one pass.

    Args:
        plain: the model's own; its frequencies and its ``attention_scaling`` are kept.
        sigma: standard deviation of each row's position, [B, Q] tokens.
    """

    def __init__(self, plain: nn.Module, sigma: Tensor):
        super().__init__()
        self.plain, self.sigma = plain, sigma

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """x gives dtype and device -> cos and sin, each [B, Q, 2 F]."""
        cos, sin = self.plain(x[:0].float(), position_ids)  # in fp32: rounded once, behind the damping
        turned = self.sigma[..., None].float() * self.plain.inv_freq.float()  # [B, Q, F], radians
        damping = torch.exp(-turned.square() / 2).repeat(1, 1, 2)  # the halves of cos and sin have like frequencies
        return (cos * damping).to(x.dtype), (sin * damping).to(x.dtype)


@contextmanager
def spread(decoder: nn.Module, sigma: Tensor | None) -> Iterator[None]:
    """Passes of ``decoder`` inside rotate positions with standard deviation sigma [B, Q]; ``None`` changes nothing.

    A model rotates once per pass and hands cos and sin to its layers. So a layer that is recomputed during backward
    gets the very same ones, and a pass that is recomputed as a whole enters here again, if this is inside of it.

    Raises:
        ValueError: the model has no rotary embedding, or another layout of it.
    """
    if sigma is None:
        yield
        return
    plain = getattr(decoder, "rotary_emb", None)
    _check(plain, decoder)
    decoder.rotary_emb = GaussianRotary(plain, sigma)
    try:
        yield
    finally:
        decoder.rotary_emb = plain


_checked: set[type] = set()


@torch.no_grad()
def _check(plain: nn.Module | None, decoder: nn.Module) -> None:
    """Once per kind of rotary embedding: cos is that of [frequencies, frequencies], times the attention scaling."""
    if type(plain) in _checked:
        return
    name = decoder.config.model_type
    frequencies = getattr(plain, "inv_freq", None)
    if not isinstance(frequencies, Tensor):
        raise ValueError(f"gistnet.gaussian_rope: base {name} has no rotary embedding; plain is what it takes")
    frequencies = frequencies.float()
    cos, _ = plain(frequencies, torch.ones(1, 1, dtype=torch.long, device=frequencies.device))
    expected = frequencies.repeat(2).cos() * plain.attention_scaling
    if cos.shape[-1] != len(expected) or not torch.allclose(cos[0, 0], expected, rtol=1e-3, atol=1e-4):
        raise ValueError(f"gistnet.gaussian_rope: base {name} orders its rotary frequencies in another way; use plain")
    _checked.add(type(plain))
