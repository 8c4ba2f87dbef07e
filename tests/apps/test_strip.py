"""Pictures of a tree and a working context."""

import io

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from megactx.apps.pictures import plot_strip
from megactx.apps.strip import strip
from megactx.memory import MegaContextTree, WorkingContext


class Mean:
    width = 4

    def __init__(self, block_size):
        self.block_size = block_size

    def encode_block(self, children):
        return children.mean(1)

    def offset_in(self, tokens):
        return tokens - 1


def tree_of(block_size, lengths) -> MegaContextTree:
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    table = torch.nn.Embedding(9, Mean.width).requires_grad_(False)
    return MegaContextTree.from_tokens(tokens, Mean(block_size), table, torch.tensor(lengths))


@pytest.fixture
def context():
    tree = tree_of(4, [100, 30])
    index = torch.arange(100).repeat(2, 1)
    context = WorkingContext(tree, torch.zeros_like(index), index, tree.lengths, 100)
    context.collapse(1, torch.arange(1, 20))
    context.collapse(2, torch.tensor([1, 2, 3]))
    return context


def lines(picture) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=140).print(picture)
    return out.getvalue().splitlines()


def drawn_in(colour: str, path) -> int:
    """Pixels of a picture that have a colour."""
    rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int(((torch.tensor(imread(path))[..., :3] - rgb).abs().amax(-1) < 0.02).sum())


def test_the_terminal_shows_levels_entries_and_edits_over_the_timeline(context):
    before = context.copy()
    context.expand(4 + 3 + 3)  # the gist of tokens 28 .. 31 is behind the sink, LOD1 1 .. 3 and LOD2 1
    shown = lines(strip(context, before, columns=50))
    assert [line.split()[0] for line in shown[:5]] == ["LOD3", "LOD2", "LOD1", "sees", "new"]
    assert shown[0].endswith("1 gists") and shown[2].endswith("25 gists")
    assert shown[0][6:56].count("░") == 32 and shown[0][6:56].count(" ") == 18  # 64 of 100 tokens
    assert shown[4].endswith(" 4 entries")
    assert shown[4][6:56].count("^") in (2, 8)
    assert f"{int(context.counts[0])} entries for 100 tokens" in shown[3]
    assert {"█", "▓", "▒"} <= set(shown[3])
    legend = ["█ token", "▓ gist of 4", "▒ gist of 16", "░ gist of 64"]  # told apart without colour too
    assert shown[5].split("  ")[3:7] == legend
    assert shown[3][6:8] == "██" and shown[3][50:56] == "██████"


def test_the_picture_is_a_png_in_which_lods_have_their_colours(context, tmp_path):
    before = context.copy()
    context.expand(5)
    plot_strip(tmp_path / "strip.png", context, before, row=0)
    assert imread(tmp_path / "strip.png").shape[:2] == (400, 1400)
    for colour in ("#009E73", "#0072B2", "#E69F00"):
        assert drawn_in(colour, tmp_path / "strip.png") > 500


def test_tokens_that_are_narrower_than_a_pixel_have_their_colour(tmp_path):
    tree = tree_of(32, [4096])
    plot_strip(tmp_path / "strip.png", WorkingContext.recency(tree, 288))  # 256 tokens: 80 columns of 60 pixels
    assert drawn_in("#009E73", tmp_path / "strip.png") > 3000


def test_a_long_history_is_drawn_in_joined_blocks(tmp_path):
    tree = tree_of(4, [20_000])
    context = WorkingContext.recency(tree, 1500)
    plot_strip(tmp_path / "strip.png", context)
    assert (tmp_path / "strip.png").stat().st_size > 1000
    assert lines(strip(context))[-2].endswith("for 20,000 tokens")


def test_what_cannot_be_drawn_is_named(context, tmp_path):
    with pytest.raises(ValueError, match="row=2 is not allowed: 0 to 1"):
        strip(context, row=2)
    with pytest.raises(ValueError, match="row=-1"):
        plot_strip(tmp_path / "x.png", context, row=-1)
    with pytest.raises(ValueError, match="columns=0"):
        strip(context, columns=0)
