"""A rule that says which blocks of a history a window shows in tokens."""

from dataclasses import dataclass

from torch import Tensor

from megactx.gist.parts import find, names
from megactx.lm import BaseLM
from megactx.memory import MegaContextTree


@dataclass(frozen=True)
class Seen:
    """What a policy may look at: one text up to the cursor, and nothing behind it."""

    base: BaseLM
    tree: MegaContextTree
    ids: Tensor  # [1, T]
    nll: Tensor  # [T - 1] nats: of each token but the first, behind all tokens before it
    number: int  # of the text; it seeds what is drawn

    @property
    def blocks(self) -> int:
        """N, the complete blocks."""
        return int(self.tree.counts(1)[0])


class Policy:
    """A rule of ``megactx/evaluation/policies``, called as its file in CamelCase. ``title`` is its row in tables."""

    title: str

    def values(self, seen: Seen) -> Tensor:
        """What it thinks of each block, [N]: the highest are opened, as many as fit, newer ones first among equals.

        A block with -inf is never opened.
        """
        raise NotImplementedError


def values_of(seen: Seen) -> dict[str, Tensor]:
    """title -> values [1, N], of every policy."""
    from . import policies

    found = [find(policies, name, "policy")() for name in names(policies)]
    return {policy.title: policy.values(seen)[None] for policy in found}
