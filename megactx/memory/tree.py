"""MegaContextTree: the whole history, as tokens, gists of tokens, gists of gists (method 7).

    level 2    [            gist of 1,024            ][
    level 1    [ gist of 32 ][ gist of 32 ] ...
    level 0    [ 32 tokens  ][ 32 tokens  ] ...          ... partial tail

A node is the pair (lod, index). Its start (index x K^lod) and its width (K^lod) are derived, never stored. Tokens and
gists lie in pages. So do four facts about each gist: the version of the GistNet that made it, how often it was read,
when it was made, and whether it is protected. Of each block it is also known how often a window opened it, and its
*floor*: the finest level that is still there of it, 0 where nothing was taken away (see ``curation``).

B rows, T tokens, N nodes, K children of a node, D width, M nodes that a caller names.
"""

from pathlib import Path

import torch
from torch import Tensor

from . import build, encoding, slice_merge
from .disk_cache import DISK
from .encoding import Encoder
from .page_cache import MEMORY
from .pages import SIGNAL_COLUMNS, Pages
from .published import place_of

TOKENS, NODES = 8_192, 64  # entries of a page: what is read and written at once


class MegaContextTree:
    """Tokens [B, T] and every complete gist above them.

    Args:
        encoder: K children -> a gist, see ``encoding.Encoder``; a ``GistNet`` is one.
        base: a ``BaseLM``, or any function from ids [.., T] to embeddings [.., T, D].
        rows: B. Rows may differ in length.
        max_level: the highest level that is built; ``None``: as many as fill.
        dtype: of the stored gists; ``None``: the encoder's own.
        device: of all tensors.
        name: of this tree in ``parts`` after a merge.
        keys: tokens [E, K] -> keys of their blocks, see ``focus.keys.KeyNet``; each is kept beside the block's gist,
            2 bytes a number. ``None``: there are none.

    Raises:
        ValueError: a setting that is not allowed; an encoder of hidden states without a base LM.
    """

    def __init__(
        self, encoder: Encoder, base, rows=1, max_level=None, dtype=None, device="cpu", name="tree", keys=None
    ):
        if encoder.block_size < 2:
            raise ValueError(f"block_size={encoder.block_size} is not allowed in a tree: at least 2")
        if rows < 1:
            raise ValueError(f"rows={rows} is not allowed: at least 1")
        if max_level is not None and max_level < 1:
            raise ValueError(f"max_level={max_level} is not allowed: at least 1, or None for as many as fill")
        self.hidden = getattr(encoder, "needs_hidden", False)
        if self.hidden and not hasattr(base, "model"):
            raise ValueError("encoder: it needs hidden states, and this tree has no base LM that could give them")
        self.encoder, self.base, self.max_level, self.dtype, self.keys = encoder, base, max_level, dtype, keys
        self.block_size, self.width, self.rows, self.device = encoder.block_size, encoder.width, rows, device
        self.levels = [
            Pages(columns_of(0, self.width, dtype), rows, TOKENS, device)
        ]  # levels[n] holds the nodes of LOD n
        # Identities of the GistNets that made nodes of this tree. That of the GistNet in use takes a pass over all
        # weights, so it is computed when it is needed. Until then the stamp tells whether the weights have changed.
        self.versions: list[str | None] = [None]
        self.version, self.stamp = 0, encoding.stamp(encoder)  # of the GistNet in use
        self.compacted = 0  # blocks of which something was taken away
        self.home = None  # the file that the tree lives in and its state there, see ``storage``
        self.cache = None  # what of a stored tree is in memory, see ``page_cache``
        self.read_only = False  # a part of somebody else's window: nothing in it is changed, not even a count
        self.parts = [(name, torch.zeros(rows, dtype=torch.long))]  # (name, first token [B]) of each merged tree

    @classmethod
    def from_tokens(cls, tokens: Tensor, encoder: Encoder, base, lengths: Tensor | None = None, **settings):
        """tokens [B, T] -> the tree, on their device. ``lengths`` and errors are those of ``append``."""
        _expect(tokens, "tokens", "[B, T]", tokens.ndim == 2)
        tree = cls(encoder, base, rows=len(tokens), device=tokens.device, **settings)
        tree.append(tokens, lengths)
        return tree

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, [B], on the CPU."""
        return self.levels[0].lengths

    @property
    def depth(self) -> int:
        """The highest level that holds a node."""
        return len(self.levels) - 1

    @property
    def tokens(self) -> Tensor:
        """A copy of all tokens, [B, T] int32, 0 where a row is shorter."""
        return self.levels[0].whole("token")

    def gists(self, lod: int) -> Tensor:
        """A copy of all gists of a level, [B, N, D], 0 where a row is shorter."""
        return self._level(lod).whole("gist")

    def about(self, lod: int, what: str) -> Tensor:
        """A copy of one fact about a level's gists, [B, N]: ``version``, ``access``, ``time`` or ``protected``."""
        return self._level(lod).whole(what)

    def counts(self, lod: int) -> Tensor:
        """Nodes of a level in each row, [B], on the CPU; 0 where there is no such level."""
        return self.levels[lod].lengths if lod < len(self.levels) else torch.zeros(self.rows, dtype=torch.long)

    def bytes(self) -> int:
        """Bytes of all tokens, gists and facts about them."""
        return sum(level.bytes(column) for level in self.levels for column in level.columns)

    @property
    def front(self) -> int:
        """Tokens at the beginning of a window that keep their positions when it is rebased: the sink."""
        return self.block_size

    @property
    def sink(self) -> int:
        """Address of the sink: block 0, which stays raw."""
        return 0

    def rank(self, address: Tensor) -> Tensor:
        """How many tokens a window of all has before an address: of one tree the address itself; see ``composite``."""
        return address

    def address(self, rank: Tensor) -> Tensor:
        """Where the token stands that has so many before it."""
        return rank

    def part_of(self, address: Tensor) -> Tensor | None:
        """The number of the part that each address lies in; ``None``: there are no parts."""
        return None

    def append(self, tokens: Tensor, lengths: Tensor | None = None, gists: Tensor | None = None) -> None:
        """Take up tokens. Every block that they complete gets its gist, at every level. A partial tail stays LOD0.

        The result does not depend on how a text is cut into pieces, bit for bit.

        Args:
            tokens: [B, T] ids.
            lengths: how many tokens of each row are taken, [B]; ``None``: all.
            gists: ready gists of the level-1 blocks that these tokens complete, [B, N, D]; they are not encoded again.

        Raises:
            ValueError: shapes, ids that the base cannot embed, or gists that are not as many as the complete blocks.
                Nothing was taken up.
        """
        self._check_writable()
        lengths, b = self._checked(tokens, lengths), self.rows
        completed = (self.lengths + lengths) // self.block_size - self.counts(1)  # [B]
        wanted = [b, int(completed.max()), self.width]
        if gists is not None and list(gists.shape) != wanted:
            raise ValueError(f"gists have shape {list(gists.shape)}, expected {wanted}: one for each completed block")
        if self.hidden and gists is None and completed.any():
            raise ValueError("encoder: it needs hidden states, so append takes the gists of complete blocks ready made")
        ready = None if gists is None else slice_merge.Ready(gists, self.counts(1), self.version)
        build.extend(self, tokens, lengths, ready)

    def slice(self, start: int, stop: int | None = None) -> "MegaContextTree":
        """The tree of tokens start .. stop - 1: it takes over the nodes that lie on its grid, and encodes the rest.

        Raises:
            ValueError: ``start`` is not on the grid of blocks, or beyond ``stop``.
        """
        return slice_merge.cut(self, start, int(self.lengths.max()) if stop is None else stop)

    def edited(self, tokens: Tensor, lengths: Tensor | None = None) -> "MegaContextTree":
        """The tree of another text: nodes of this one that the GistNet in use has made are kept where all tokens below
        them, and in their left context, are the same and at the same place; the rest is encoded. Where this tree was
        appended to, with no gists ready made, it has the bits of a tree that was made from nothing.

        Args:
            tokens: [B, T] ids.
            lengths: how many tokens of each row count, [B]; ``None``: all.

        Raises:
            ValueError: shapes, ids that the base cannot embed; something was taken away from this tree, or its encoder
                needs hidden states.
        """
        return slice_merge.edited(self, tokens, self._checked(tokens, lengths))

    def merge(self, other: "MegaContextTree") -> None:
        """Append another tree. Its nodes that lie on this tree's grid are kept; the rest is encoded.

        Raises:
            ValueError: a row of this tree does not end on the grid of blocks, or the trees are not of one kind.
                Nothing was merged.
        """
        self._check_writable()
        slice_merge.merge(self, other)

    def go_on(self, other: "MegaContextTree", first: int, stop: int) -> None:
        """Append the tokens up to ``stop``, and their nodes, of another tree that began at token ``first`` of this one.

        What lies on this tree's grid and has its whole left context there is kept; the rest is encoded. The gists have
        the bits that they would have without the other tree, where ``first`` is a multiple of
        ``encoding.BATCH * block_size**lod`` for each level that the other tree has.

        Raises:
            ValueError: the trees are not of one kind, have several rows, or differ in the tokens that both have; or
                ``stop`` is before the end of this tree or behind that of the other. Nothing was appended.
        """
        self._check_writable()
        slice_merge.go_on(self, other, first, stop)

    def refresh(self, encoder: Encoder) -> int:
        """Use another GistNet from now on. Nodes that it has not made are encoded again, bottom up.

        Returns:
            How many gists were encoded.

        Raises:
            ValueError: its block size or width are others, or it needs hidden states.
        """
        self._check_writable()
        for what in ("block_size", "width"):
            if getattr(encoder, what) != getattr(self, what):
                raise ValueError(f"gistnet.{what}={getattr(encoder, what)}, the tree's is {getattr(self, what)}")
        if getattr(encoder, "needs_hidden", False):
            raise ValueError("encoder: it needs hidden states, which a refresh does not have; build the tree anew")
        if self.compacted:
            raise ValueError("refresh: what was taken away from this tree cannot be encoded again; restore it first")
        self.version, self.home = self.version_of(encoding.identity(encoder)), None  # others may read the old gists
        self.encoder, self.stamp, self.hidden = encoder, encoding.stamp(encoder), False
        return build.renew(self)

    def gather(self, lod: int | Tensor, index: Tensor) -> Tensor:
        """Nodes (lod, index), each [B, M] or one lod for all -> the vectors that the base LM reads for them, [B, M, D].

        The base embeds the tokens. Gists come in the dtype of its embeddings, and their access counts go up.

        Raises:
            ValueError: a node is not in the tree.
        """
        self._check_nodes(index, lod)
        b, m = index.shape
        row = torch.arange(b, device=self.device)[:, None].expand(b, m).flatten()
        lod = torch.as_tensor(lod, device=self.device).expand(b, m).flatten()
        return self.embeddings(row, lod, index.to(self.device).flatten()).view(b, m, self.width)

    @torch.no_grad()
    def embeddings(self, row: Tensor, lod: Tensor, index: Tensor) -> Tensor:
        """``gather`` for single nodes, row, lod and index [M] -> [M, D]. The caller has checked that they are there."""
        if self.cache is not None:
            self.cache.look(lod, index, self.block_size)
        embed = encoding.embedder(self.base)
        raw = (lod == 0).nonzero().squeeze(1)
        embedded = embed(self.levels[0].read("token", row[raw], index[raw]).long()[None])[0]
        out = embedded.new_empty(len(lod), self.width).index_copy_(0, raw, embedded)
        for n in range(1, self.depth + 1):
            here = (lod == n).nonzero().squeeze(1)
            out.index_copy_(0, here, self.levels[n].read("gist", row[here], index[here]).to(out.dtype))
            if not self.read_only:
                self.levels[n].add("access", row[here], index[here])
        return out

    def protect(self, lod: int, index: Tensor) -> None:
        """Keep nodes index [B, M] of a level, and all nodes above them, out of working contexts.

        Raises:
            ValueError: there are no gists of that level, or a node is not in the tree.
        """
        self._check_writable()
        self._level(lod)
        self._check_nodes(index, lod)
        b, m = index.shape
        row, index = torch.arange(b, device=self.device).repeat_interleave(m), index.to(self.device).flatten()
        for n in range(lod, self.depth + 1):
            mask = index < self.counts(n).to(self.device)[row]
            row, index = row[mask], index[mask]
            self.levels[n].write(row, index, protected=torch.ones_like(index, dtype=torch.bool))
            index = index // self.block_size

    def usable(self, row: Tensor, lod: Tensor, index: Tensor, sink: bool = True) -> Tensor:
        """Whether nodes, row, lod and index [M] each, may stand in a working context, [M].

        Such a node is in the tree, is not protected, and does not hold block 0, which stays raw: the attention sink.

        Args:
            sink: whether block 0 is one; that of a part of a ``Composite`` is a block like any other.
        """
        counts = torch.stack([level.lengths for level in self.levels]).to(self.device)  # [levels, B]
        known = (lod >= 0) & (lod <= self.depth)
        known &= (index >= 0) & (index < counts[lod.clamp(0, self.depth), row])
        if sink:
            known &= (lod == 0) | (index > 0)
        for n in range(1, self.depth + 1):
            here = ((lod == n) & known).nonzero().squeeze(1)
            known[here] = ~self.levels[n].read("protected", row[here], index[here])
        if self.compacted:
            here = known.nonzero().squeeze(1)
            known[here] = self.floors(row[here], lod[here], index[here]) <= lod[here]
        return known

    def floors(self, row: Tensor, lod: Tensor, index: Tensor) -> Tensor:
        """The finest level that is there of the spans of nodes, row, lod and index [M], [M].

        A floor above 1 belongs to a whole span of that level, so the first block of a node speaks for it.
        """
        first = index * self.block_size**lod // self.block_size
        out = torch.zeros_like(lod)
        here = (first < self.counts(1).to(first.device)[row]).nonzero().squeeze(1)
        if len(here):
            out[here] = self.levels[1].read("floor", row[here], first[here]).long()
        return out

    def openable(self, row: Tensor, lod: Tensor, index: Tensor) -> Tensor:
        """Whether the children of gists, row, lod and index [M], are there, [M]: nothing was taken away, and no page of
        theirs was found to be damaged."""
        may = lod > 0
        if self.compacted:
            may = may & (self.floors(row, lod, index) < lod)
        for n, _, number in self.cache.damaged if self.cache is not None else ():
            size = self.levels[n].size if n <= self.depth else 0
            first = index * self.block_size
            may = may & ~((lod == n + 1) & (first < (number + 1) * size) & (first + self.block_size > number * size))
        return may

    def note_opened(self, row: Tensor, lod: Tensor, index: Tensor) -> None:
        """A window has opened gists, row, lod and index [M]; blocks count it."""
        here = lod == 1
        if here.any() and not self.read_only:
            self.levels[1].add("opened", row[here], index[here])

    def note_worth(self, row: Tensor, index: Tensor, worth: Tensor) -> None:
        """LensNet has said what the tokens of blocks, row and index [M], are worth above their gists, nats [M]."""
        if len(index) and not self.read_only:
            self.take_signals()
            self.levels[1].add("worth", row, index, worth)
            self.levels[1].add("scored", row, index)

    @property
    def signals(self) -> bool:
        """Whether anything is known of what blocks are worth."""
        return self.depth > 0 and "worth" in self.levels[1].columns

    def take_signals(self) -> None:
        """Keep from now on what blocks are worth; where nothing is known it is 0."""
        if not self.signals:
            self.levels[1].columns = self.levels[1].columns | SIGNAL_COLUMNS

    def save(self, folder: str | Path) -> None:
        """Write the tree into a folder, in place of a tree that may be there; see ``storage``."""
        from .storage import save

        self._check_writable()
        save(self, Path(folder))

    def export(self, folder: str | Path) -> None:
        """Write the tree as safetensors and a manifest, for other programs; see ``interchange``. ``load`` reads it."""
        from .interchange import export

        export(self, Path(folder))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        encoder: Encoder,
        base,
        refresh=False,
        device="cpu",
        keys=None,
        memory=MEMORY,
        read_only=False,
        disk=DISK,
        device_memory=None,
    ) -> "MegaContextTree":
        """Open a saved tree: its pages are read when they are needed. ``storage`` says what is refused.

        Args:
            folder: of the tree; or a URL (http, https, s3) where one was published, which is read only.
            refresh: accept another GistNet than the one that made the tree, and encode its nodes again.
            keys: of the constructor. Where the tree was saved with none, or with those of another net, they are made;
                keys that nobody asks for are not read.
            memory: bytes of pages that stay in memory.
            read_only: it is somebody else's: windows may show it, nothing in it changes, and it cannot be saved.
            disk: bytes of pages from URLs that are kept on this disk, of all trees together.
            device_memory: bytes of pages that stay on the tree's device, where that is none of memory's; ``None``:
                256 MB, and on the CPU no such tier.
        """
        from .storage import load

        tree = load(
            place_of(folder), encoder, base, refresh, device, keys, memory, disk=disk, device_memory=device_memory
        )
        tree.read_only |= read_only
        return tree

    def identities(self) -> list[str]:
        """``versions``, with the identity of the GistNet in use filled in."""
        if self.versions[self.version] is None:
            same = encoding.stamp(self.encoder) == self.stamp
            self.versions[self.version] = encoding.identity(self.encoder) if same else "trained on since"
        return self.versions

    def version_of(self, identity: str) -> int:
        """The number of a GistNet in ``versions``. An unknown one is added."""
        if identity not in self.identities():
            self.versions.append(identity)
        return self.versions.index(identity)

    def new_level(self) -> Pages:
        """Pages for the level above the highest; ``dtype`` must be known."""
        columns = columns_of(len(self.levels), self.width, self.dtype, None if self.keys is None else self.keys.size)
        self.levels.append(Pages(columns, self.rows, NODES, self.device))
        self.levels[-1].source, self.levels[-1].lod = self.cache, self.depth
        return self.levels[-1]

    def check_ids(self, ids: Tensor) -> None:
        """Raises ValueError where the base cannot embed an id."""
        if ids.numel() == 0:
            return
        rows = encoding.vocabulary(self.base)
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= (rows or 2**31):
            wrong = low if low < 0 else high
            raise ValueError(f"tokens: id {wrong} is not allowed, the base LM embeds 0 to {(rows or 2**31) - 1}")

    def _checked(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """How many of tokens [B, T] count in each row, [B]; raises ValueError where they are not what a tree takes."""
        _expect(tokens, "tokens", f"[{self.rows}, T]", tokens.ndim == 2 and len(tokens) == self.rows)
        b, t = tokens.shape
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens have dtype {tokens.dtype}, expected whole numbers")
        lengths = torch.full((b,), t) if lengths is None else lengths.cpu().long()
        if lengths.shape != (b,) or lengths.min() < 0 or lengths.max() > t:
            raise ValueError(f"lengths={lengths.tolist()} are not allowed: {b} numbers from 0 to {t}")
        if (lengths == t).all():
            self.check_ids(tokens)
        else:
            self.check_ids(tokens[torch.arange(t, device=tokens.device) < lengths.to(tokens.device)[:, None]])
        return lengths

    def _check_writable(self) -> None:
        if self.read_only:
            raise ValueError("this tree was opened to be read only; its own folder is changed by who keeps it")

    def _level(self, lod: int) -> Pages:
        if not 1 <= lod <= self.depth:
            raise ValueError(f"lod={lod} has no gists, allowed are 1 to {self.depth}")
        return self.levels[lod]

    def _check_nodes(self, index: Tensor, lod: int | Tensor) -> None:
        _expect(index, "index", f"[{self.rows}, M]", index.ndim == 2 and len(index) == self.rows)
        lod = torch.as_tensor(lod, device=index.device)
        if lod.ndim and lod.shape != index.shape:
            raise ValueError(f"lod has shape {list(lod.shape)}, expected {list(index.shape)} like index")
        lod = lod.expand(index.shape)
        counts = torch.stack([level.lengths for level in self.levels]).to(index.device)  # [levels, B]
        row = torch.arange(self.rows, device=index.device)[:, None].expand(index.shape)
        mask = (lod >= 0) & (lod <= self.depth) & (index >= 0)
        mask &= index < counts[lod.clamp(0, self.depth), row]
        if not mask.all():
            r, m = (~mask).nonzero()[0].tolist()
            raise ValueError(f"node (lod {int(lod[r, m])}, index {int(index[r, m])}) of row {r} is not in the tree")


def columns_of(lod: int, width: int, dtype, key_size: int | None = None, signals: bool = False) -> dict[str, tuple]:
    """What is kept of each node of a level, see ``Pages``."""
    if lod == 0:
        return {"token": ((), torch.int32)}
    columns = {"gist": ((width,), dtype), "version": ((), torch.int32), "access": ((), torch.int32)}
    columns |= {"time": ((), torch.long), "protected": ((), torch.bool)}  # time: seconds since 1970
    if lod == 1:
        columns |= {"floor": ((), torch.uint8), "opened": ((), torch.int32)}
    if lod == 1 and signals:
        columns |= SIGNAL_COLUMNS
    if lod == 1 and key_size is not None:
        columns["key"] = ((key_size,), torch.float16)
    return columns


def _expect(tensor: Tensor, name: str, wanted: str, right: bool) -> None:
    if not right:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {wanted}")
