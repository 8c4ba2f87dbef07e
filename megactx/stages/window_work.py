"""Floating-point operations of the stages that read working contexts, by formula; see ``Throughput``.

P parameters of the base's layers, V D of its head, L layers of attention width A, q operations of GistNet for one
block of K, p weights of LensNet's l layers of width D. A document has C tokens before its cursor and H behind it, its
windows W entries, as many as the budget allows. Backward through the base is for activations alone, unless it learns
as a whole: ``learns`` is 2 or 3, forward included. Recomputation, and what is not a matrix product, are left out.

    rows R behind c columns   2 P R + 4 L A (R c + R (R + 1) / 2)              forward
    tree                      q (C / K + C / K^2 + ...)                        whole nodes only
    full context              R = C + H - 1 rows, and 2 V D H                  forward
    window that is learned    learns x (R = W + H - 1 rows, and 2 V D H)
    gists shown               3 q for each block that is encoded for them      where GistNet learns
    LensNet                   2 p W + 4 l D W^2 for a window                   three times that where it learns
    measured window           tree, R = W + H - 1 rows, 2 V D H, and for each of E edits R = W / 2 + H rows behind
                              W / 2 columns, and 2 V D H: an edit may be anywhere, so this is the mean
"""

from dataclasses import dataclass

from .work import Work


@dataclass(frozen=True)
class WindowWork:
    """The formulas, with the sizes of a stage."""

    body: int  # P
    head: int  # V D
    attention: int  # L A
    net: int  # q
    block: int  # K
    lens: int  # p
    mixing: int  # l D
    learns: int = 2

    @classmethod
    def of(cls, stage) -> "WindowWork":
        """Read off a stage with ``base``, ``gistnet`` and ``lens``."""
        base, lens = Work.of_base(stage.base), stage.lens
        weights = sum(p.numel() for p in lens.parameters() if p.ndim == 2) - lens.lod.weight.numel()
        learns = 3 if stage.train_base == "full" else 2
        net, block = stage.gistnet.flops_per_block(stage.base), stage.gistnet.block_size
        return cls(
            base.body, base.head, base.attention, net, block, weights, len(lens.blocks) * stage.base.width, learns
        )

    def rows(self, rows: float, before: float = 0) -> float:
        return 2 * self.body * rows + 4 * self.attention * (rows * before + rows * (rows + 1) / 2)

    def scored(self, tokens: int) -> float:
        return 2 * self.head * tokens

    def tree(self, tokens: int) -> float:
        nodes, total = tokens // self.block, 0
        while nodes:
            total, nodes = total + nodes, nodes // self.block
        return self.net * total

    def full(self, cursor: int, horizon: int) -> float:
        return self.rows(cursor + horizon - 1) + self.scored(horizon)

    def window(self, entries: int, horizon: int) -> float:
        return self.learns * (self.rows(entries + horizon - 1) + self.scored(horizon))

    def shown(self, nodes: dict[int, int]) -> float:
        """nodes: lod -> how many gists are shown."""
        blocks = sum(count * (self.block**lod - 1) // (self.block - 1) for lod, count in nodes.items())
        return 3 * self.net * blocks

    def lensnet(self, windows: int, entries: int) -> float:
        return windows * (2 * self.lens * entries + 4 * self.mixing * entries**2)

    def measured(self, cursor: int, horizon: int, entries: int, edits: int) -> float:
        own = self.rows(entries / 2 + horizon, entries / 2) + self.scored(horizon)
        return self.tree(cursor) + self.rows(entries + horizon - 1) + self.scored(horizon) + edits * own
