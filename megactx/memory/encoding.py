"""What the tree asks of an encoder, and how it calls the encoder so that pieces give the same bits as the whole.

A matrix product of another shape may take another kernel and round differently. So blocks are always encoded in padded
batches of ``BATCH``. A block's place in its batch follows from its row and index alone. The same block then meets the
same kernel at the same place, however the text was cut into pieces.

E blocks of a batch, K children of a node, W left context, D width, M nodes.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megactx.gist.gistnet import Seen
from megactx.lm.identity import of_embeddings, of_weights, raw

BATCH = 16  # E: wide enough for the matrix products of a long text, narrow enough for one new block at a time
ULPS = 4  # in which sums of a table in fp32 differ between builds


class Encoder(Protocol):
    """K children -> their gist. ``GistNet`` is one.

    An encoder may have three more attributes:

        left_context   default 0: W, tokens left of a block that it also reads; at levels >= 2, W // K nodes left of the
                       children. It is then called as ``encode_block(children, Seen(nodes [E, W + K, D], there
                       [E, W + K]))``, where ``there`` is False before the start of the text.
        of_level       ``of_lod(lod)`` is the encoder that makes the gists of that level.
        needs_hidden   default False: level 1 reads the base LM's hidden states, not token embeddings.
    """

    block_size: int  # K
    width: int  # D

    def encode_block(self, embeddings: Tensor, seen: Seen | None = None) -> Tensor:
        """[E, K, D] -> [E, D]"""

    def offset_in(self, tokens: int) -> int:
        """Position of a gist relative to the start of the span of ``tokens`` that it stands for."""


def left_of(encoder: Encoder, lod: int) -> int:
    """How many nodes of the level below the encoder reads to the left of a node's children."""
    tokens = getattr(encoder, "left_context", 0)
    return tokens if lod == 1 else tokens // encoder.block_size


def slots(row: Tensor, index: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Split nodes, row [M] and index [M] on the CPU, into batches: (row, index, place in the batch), each [<= E]."""
    place = index * rows + row
    place, order = place.sort()
    _, sizes = torch.unique_consecutive(place // BATCH, return_counts=True)
    sizes = sizes.tolist()
    yield from zip(row[order].split(sizes), index[order].split(sizes), (place % BATCH).split(sizes), strict=True)


@torch.no_grad()
def encode(encoder: Encoder, lod: int, nodes: Tensor, left: int, seen: Tensor) -> Tensor:
    """nodes [E, left + K, D], seen [E, left] -> gists of ``lod`` [E, D].

    Raises:
        ValueError: embeddings or gists are not as wide as the encoder says.
    """
    d = encoder.width
    if nodes.shape[-1] != d:
        raise ValueError(f"base: its embeddings have width {nodes.shape[-1]}, the encoder's width is {d}")
    encoder = encoder.of_lod(lod) if hasattr(encoder, "of_lod") else encoder
    with _evaluating(encoder):
        if left:
            gists = encoder.encode_block(
                nodes[:, left:], Seen(nodes, F.pad(seen, (0, nodes.shape[1] - left), value=True))
            )
        else:
            gists = encoder.encode_block(nodes)
    if gists.shape != (len(nodes), d):
        raise ValueError(f"encoder: its gists have shape {list(gists.shape)}, expected {[len(nodes), d]}")
    return gists


@contextmanager
def _evaluating(encoder) -> Iterator[None]:
    """Inside, the encoder works without dropout: a tree that is built twice must be the same tree."""
    if not getattr(encoder, "training", False):
        yield
        return
    encoder.eval()
    try:
        yield
    finally:
        encoder.train()


def embedder(base) -> Callable[[Tensor], Tensor]:
    """ids -> embeddings: a BaseLM's, or the function itself."""
    return getattr(base, "embed", base)


def vocabulary(base) -> int | None:
    """Number of ids that ``base`` can embed, where it says so."""
    return getattr(base, "vocab_size", getattr(base, "num_embeddings", None))


def stamp(encoder) -> tuple | None:
    """A value that changes when an optimizer or ``load_state_dict`` changes weights. It misses changes by ``.data``."""
    if not isinstance(encoder, nn.Module):
        return None
    return tuple((id(p), 0 if p.is_inference() else p._version) for p in encoder.parameters())


def identity(thing, **instead) -> str:
    """Sixteen hex digits that change when weights or plain settings do.

    Args:
        instead: values of settings in place of those that it has.
    """
    digest = hashlib.sha256()
    for part in thing.modules() if isinstance(thing, nn.Module) else [thing]:
        settings = {k: v for k, v in vars(part).items() if isinstance(v, bool | int | float | str)}
        settings |= {k: v for k, v in instead.items() if k in settings}
        settings = {k: v for k, v in settings.items() if k != "training" and not k.startswith("_")}
        digest.update(repr((type(part).__qualname__, sorted(settings.items()))).encode())
    for name, tensor in sorted(thing.state_dict().items()) if isinstance(thing, nn.Module) else []:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()[:16]


def known_as(encoder, name: str) -> bool:
    """Whether a name is the identity of an encoder, or what a build of earlier days may have called it: these summed
    ``embedding_rms`` in fp32, whose last digits depend on the number of threads."""
    if name == identity(encoder):
        return True
    scale = getattr(encoder, "embedding_rms", None)
    if not isinstance(scale, float):
        return False
    near = np.float32(scale) + np.spacing(np.float32(scale)) * np.arange(-ULPS, ULPS + 1, dtype=np.float32)
    return any(name == identity(encoder, embedding_rms=float(other)) for other in near)


def identity_of_base(base) -> str | None:
    """``identity`` of what embeds the tokens; ``None`` for a bare function.

    Of a ``BaseLM`` only the embeddings count, and the adapters on them that are switched on.
    """
    if isinstance(base, FunctionType | MethodType):
        return None
    if not hasattr(base, "model"):
        return identity(base)
    return of_embeddings(base)


def identity_of_layers(base, encoder) -> str | None:
    """Identity of all layers of a base LM if the encoder reads with them or their states, else ``None``."""
    reads = getattr(encoder, "needs_hidden", False) or getattr(encoder, "reads_layers", False)
    return of_weights(base) if reads and hasattr(base, "model") else None
