"""Gaussian RoPE: the position of an entry is N(mu, sigma^2), not a point (method 9).

    E[R(w p)] = exp(-(w sigma)^2 / 2) R(w mu)        p ~ N(mu, sigma^2), R the rotation of one pair of channels

So the cos and sin of each rotary frequency are damped by a factor of its own. A gist of 32 tokens keeps the slow
frequencies, and loses those that turn within 32 tokens, which could not say where it is. A token has sigma 0 and is
rotated as ever. mu is where the gist sits. At the centre of its span both moments are those of the span; at the end
only the spread is.

Queries and keys are damped alike. The score of two entries is then the expectation over two independent positions. An
entry's score with itself is damped twice too, though its two positions are one: there it is no expectation.

NanoChat normalises q and k *behind* the rotation, which undoes the loss of length. Let f be the share of a vector's
energy that damping leaves. Its pairs come out as exp(-(w sigma)^2 / 2) / sqrt(f): fast pairs still lose weight, and
slow ones gain it. The score of a damped entry does not shrink with sigma. Its direction is that of the expectation, its
length that of a token.

Layers without RoPE (every fourth of SmolLM3) never look at cos and sin.

Background: Su et al. 2021, arXiv 2104.09864 (RoPE). Shapes: B batch, Q rows, F frequencies.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MODES = ("plain", "damped", "learned")
LODS = 4  # levels with a learned scale of their own; coarser levels share the last, which is of a million tokens


class PositionSpread(nn.Module):
    """How wide the position of an entry is, by its LOD.

    ``damped``: K^lod / sqrt(12), the standard deviation of a position drawn evenly from the K^lod tokens of the entry.
    ``learned``: that times one factor per LOD, which is learned, starts at 1 and stays positive.
    ``plain``: no spread, the rotation is the model's own.

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
        # As logarithms: weight decay pulls them to 0, so the factor of a LOD that is not trained stays at 1.
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

    A model rotates once per pass and hands cos and sin to its layers. So a layer that backward computes again gets the
    same cos and sin. A pass that backward computes again as a whole must enter this context again.

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
