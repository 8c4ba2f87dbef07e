"""Keys: a few learned numbers of every block, by which a question finds it among all blocks of a tree.

    key(block) = unit(MLP(sum over its tokens of  weight(token) x project(embedding(token))))

A question is encoded like a block. How like the two are is their cosine x ``scale``; a block stands out where that is
above ``null``, what a question finds that asks for nothing (a learned number, see ``studies.keys``). Embeddings are the
base LM's own, frozen. So keys cost one look-up per token, and need no pass of any model.

V vocabulary, D width, S numbers of a key, E blocks or questions, K tokens, N blocks of a tree.
"""

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from megactx.data.user_turns import UserTurns
from megactx.framework.config.types import declared
from megactx.memory import MegaContextTree, WorkingContext


class Questions(NamedTuple):
    """What keys are asked: ids [A, Q]; which of them are there, bool [A, Q]; of which row each is, [A]; which rows a
    user asked, bool [B]. What nobody asked, as text that goes on, finds only the one block that stands out most.
    ``repeated``: of each row blocks that are read in any case, where its end or what it quotes stood before.
    ``newest``: of what a window stands for, so many tokens at its end are read, at most, beside what a user's question
    finds; ``None``: as many as have room."""

    ids: Tensor
    mask: Tensor
    row: Tensor
    asked: Tensor
    repeated: list[list[int]]
    newest: list[int | None]

    def of(self, row: int) -> list[Tensor]:
        """Ids [Q] of each question of a row."""
        return [self.ids[at][self.mask[at]] for at in (self.row == row).nonzero()[:, 0].tolist()]


QUESTION = 64  # tokens of a question, at most
GOES_ON = (8, 16)  # newest tokens that are the questions where no chat template tells one
LINE = 8  # tokens of a question, at least, that stands in a line of its own
LOOK = 4 * QUESTION  # newest tokens among which a user's turn is looked for; behind it stands the answer so far


def questions_of(newest: list[int], turns: UserTurns) -> tuple[list[list[int]], int | None, int | None]:
    """What a session asks its keys: what the user said last, where the chat template tells that among the newest
    ``LOOK`` tokens. Of more than ``QUESTION`` tokens it is the last line: a question stands behind the text that it is
    about; or the newest of them, where that line is longer or there is none. Where a template would tell and does not
    nobody asks. Without one the newest tokens are the questions, ``GOES_ON`` of them: a question at the end of a text
    is among few, and what a text repeats begins with few.

    Args:
        newest: ids of a history, its newest; ``LOOK`` of them are looked at.

    Returns:
        Also how many tokens stand behind what the user said, and how many from the question on, or from the beginning
        of its turn where that is the whole question; ``None``: nobody asked.
    """
    newest = newest[-LOOK:]
    if (place := turns.place(newest)) is None:
        return [] if turns.opening else [newest[-count:] for count in GOES_ON], None, None
    said, behind = newest[slice(*place)] or newest, len(newest) - place[1]
    if len(said) <= QUESTION:
        return [said], behind, len(newest) - max(0, place[0] - len(turns.opening))
    question = turns.last_line(said[-QUESTION:], LINE)
    return [question], behind, behind + len(question)


def beside(blocks: list[int]) -> list[int]:
    """Each block with its neighbours, the next one first, none twice: a fact often crosses a border."""
    return [*dict.fromkeys(at for block in blocks for at in (block, block + 1, block - 1))]


def places(order: list[int], count: int) -> list[int]:
    """The first ``count`` blocks of an order of which none is beside another."""
    out: list[int] = []
    for block in order:
        if len(out) == count:
            break
        if all(abs(block - other) > 1 for other in out):
            out.append(block)
    return out


def padded(questions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """-> ids [Q, most] and which are there, bool [Q, most]."""
    ids = [torch.tensor(own) for own in questions]
    mask = [torch.ones(len(own), dtype=torch.bool) for own in ids]
    if not ids:
        return torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.bool)
    together = nn.utils.rnn.pad_sequence
    return together(ids, batch_first=True), together(mask, batch_first=True)


class Keys(nn.Module):
    """What nets of keys have in common. One has ``size`` S, ``up``, ``down``, ``scale``, ``null``; and tells what it
    ``reads``.
    """

    piece = 4096  # blocks that are encoded at a time
    looks_again = False  # whether it has more to say of a text than its key, by ``alike`` and ``words``

    def ready(self) -> "Keys":
        """Read what it reads by, where that is not read yet.

        Raises:
            ValueError: it is not installed.
        """
        return self

    def unit(self, x: Tensor) -> Tensor:
        """[E, S] -> unit keys [E, S]."""
        return F.normalize(x + self.down(F.gelu(self.up(x * self.size**0.5))), dim=-1)

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Tensor:
        """ids [E, K] -> keys [E, S] in fp16, as a tree keeps them."""
        if not len(ids):
            return torch.zeros(0, self.size, dtype=torch.half, device=ids.device)
        return torch.cat([self(part.long()) for part in ids.split(self.piece)]).half()

    def likeness(self, questions: Tensor, keys: Tensor) -> Tensor:
        """Keys of questions [E, S] and of blocks [N, S] -> [E, N]; compare it with ``null``."""
        return self.scale * questions @ keys.to(questions.dtype).T


@declared("keys")
class KeyNet(Keys):
    """Tokens of a block -> its key.

    Args:
        embeddings: the base LM's, [V, D]; kept as they are, and not saved.
        size: S.

    Raises:
        ValueError: a setting that is not allowed.
    """

    reads = "embeddings"

    def __init__(self, embeddings: Tensor, size: Annotated[int, Ge(16), Le(64)] = 64):
        super().__init__()
        vocabulary, width = embeddings.shape
        self.size = size
        self.register_buffer("embeddings", F.normalize(embeddings.detach().float(), dim=-1), persistent=False)
        self.project = nn.Linear(width, size, bias=False)
        nn.init.orthogonal_(self.project.weight)
        self.weight = nn.Parameter(torch.zeros(vocabulary))  # log
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        self.scale, self.null = nn.Parameter(torch.tensor(15.0)), nn.Parameter(torch.tensor(5.0))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids [E, K], mask bool [E, K] of the tokens that are there -> unit keys [E, S]."""
        weight = self.weight[ids].exp()
        weight = weight if mask is None else weight * mask
        mixed = torch.einsum("ek,ekd->ed", weight, self.embeddings[ids])
        x = F.normalize(self.project(mixed), dim=-1)
        return self.unit(x)


@torch.no_grad()
def search(tree: MegaContextTree, ids: Tensor, mask: Tensor | None = None, row: Tensor | None = None) -> Tensor:
    """How like every block of a tree is to a question, all of them compared: [B, N]; -inf where a row is shorter.

    Args:
        ids: of the questions, [A, Q].
        mask: which of these are there, bool [A, Q].
        row: of which row each question is, [A]; of several it is the one that a block is most like. ``None``: one each.

    Raises:
        ValueError: the tree has no keys.
    """
    if tree.keys is None:
        raise ValueError("keys: this tree has none; make it with a KeyNet")
    counts = tree.counts(1)
    if not counts.any():
        return torch.zeros(tree.rows, 0, device=tree.device)
    if not len(ids):
        return torch.full((tree.rows, int(counts.max())), -torch.inf, device=tree.device)
    asked = tree.keys(ids.to(tree.device).long(), mask)  # [A, S]
    row = torch.arange(tree.rows, device=asked.device) if row is None else row.to(asked.device)
    keys = tree.levels[1].whole("key").float()  # [B, N, S]
    found = keys.new_full(keys.shape[:2], -torch.inf)
    for at in row.unique().tolist():
        found[at] = (asked[row == at] @ keys[at].T).amax(0) * tree.keys.scale
    there = torch.arange(keys.shape[1], device=found.device) < counts.to(found.device)[:, None]
    return torch.where(there, found, -torch.inf)


def best_below(context: WorkingContext, found: Tensor) -> Tensor:
    """The best of the blocks that each entry stands for or in, [B, W]: what a coarse entry shows of its keys.

    Args:
        found: of ``search``, [B, N]; blocks that are not complete have none, and show -inf.
    """
    k, n = context.tree.block_size, found.shape[1]
    first = (context.starts() // k).clamp(max=n)
    end = ((context.starts() + context.widths() + k - 1) // k).clamp(max=n)
    # The maximum of any run from two runs of a power of two: a table of log2(N) rows, no loop over entries.
    table = [F.pad(found, (0, 1), value=-torch.inf)]
    while 2 ** len(table) <= n:
        half = 2 ** (len(table) - 1)
        table.append(torch.maximum(table[-1], F.pad(table[-1], (0, half), value=-torch.inf)[:, half:]))
    table = torch.stack(table, dim=1)  # [B, log2(N) + 1, N + 1]
    length = (end - first).clamp(min=1)
    step = torch.log2(length.double()).long()
    row = torch.arange(len(first), device=first.device)[:, None]
    left, right = table[row, step, first], table[row, step, (first + length - 2**step).clamp(max=n)]
    return torch.where((end > first) & context.mask, torch.maximum(left, right), -torch.inf)
