"""Packed branches under MegaAttention are what reading the window of each branch by itself gives."""

import pytest
import torch
import torch.nn.functional as F
from windows import BASES, VOCABULARY, K, gistnet, small_base

from megactx.gist.carriers.last_token import LastToken
from megactx.gist.loss import Context
from megactx.gist.losses.block import Block
from megactx.gist.reading import read_carriers
from megactx.gist.substitution import check_blocks
from megactx.lm import BaseLM
from megactx.lm.prefill import blocks, prefill, rows_at
from megactx.memory import MegaContextTree, WorkingContext
from megactx.memory.pyramid import Attention
from megactx.memory.trunk import check_room, trunk
from megactx.parts.read import gistnet_of

HORIZON = 8
SIZES = dict(segment=16, mid=16, live=24)
LENGTHS = (150, 97, 61, 20)  # the last one is live as a whole
KINDS = [{}, {"overlap": 8}, {"overlap": 16, "live": 40}, {"segment": 4, "mid": 8}, {"summaries": False}]


def documents(vocabulary: int = VOCABULARY, lengths=LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, vocabulary, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(4))
    return ids, torch.tensor(lengths)


def nll(base: BaseLM, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(base.logits(hidden).float().flatten(0, -2), tokens.flatten(), reduction="none")


def window(tree: MegaContextTree, tokens: int, start: int | None = None, lod: int = 1) -> WorkingContext:
    """The first tokens of a tree of one row, raw but for a span that a gist stands for."""
    index, lods = torch.arange(tokens), torch.zeros(tokens, dtype=torch.long)
    if start is not None:
        width = tree.block_size**lod
        index = torch.cat([index[:start], torch.tensor([start // width]), index[start + width :]])
        lods = torch.cat([lods[:start], torch.tensor([lod]), lods[start + width :]])
    return WorkingContext(tree, lods[None], index[None], [len(index)], tokens)


def alone(base, net, attention, ids, start, lod=1, end=None) -> tuple[torch.Tensor, torch.Tensor]:
    """A document ids [T] up to ``end``: the NLL [H] behind the gist of a span, and behind the span itself."""
    tree, width = MegaContextTree.from_tokens(ids[None], net, base), net.block_size**lod
    end = len(ids) if end is None else end
    after = ids[start + width : start + width + HORIZON]
    gist = attention.read(base, window(tree, end, start, lod))[0, start : start + HORIZON]
    raw = attention.read(base, window(tree, end))[0, start + width - 1 : start + width - 1 + HORIZON]
    return nll(base, gist, after), nll(base, raw, after)


def packed(base, net, read, starts, lod=1) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for starts [B, N] of every document, [B, N, H] each."""
    width = net.block_size**lod
    hidden = read_carriers(base, read, starts, [net.compress_level(base, read, starts, lod)], width, HORIZON)[0]
    after = blocks(read.ids, starts + width, HORIZON)
    full = rows_at(read.hidden, starts + width - 1, HORIZON)
    return tuple(nll(base, states, after).view(*starts.shape, -1) for states in (hidden, full))


def live_starts(attention, lengths, width: int, count: int = 3) -> torch.Tensor:
    """Of each document the first eligible start and the last ones."""
    rows = []
    for length in lengths.tolist():
        least = max(width, attention.live_from(length))
        row = torch.arange(-(-least // width) * width, length - width - HORIZON + 1, width)
        rows.append(torch.cat([row[:1], row[-1:].expand(count), row])[[0, *range(-count + 1, 0)]])
    return torch.stack(rows)


@pytest.mark.parametrize("more", KINDS)
@pytest.mark.parametrize("kind", BASES)
def test_branches_behind_a_trunk_are_windows_read_by_themselves(kind, more):
    base, attention = small_base(kind), Attention("mega", **(SIZES | more))
    net, (ids, lengths) = gistnet(base), documents()
    starts = live_starts(attention, lengths, K)
    read = trunk(base, net, ids, lengths, attention)
    check_blocks(starts, lengths, K, HORIZON, read.first)
    gists, raws = packed(base, net, read, starts)
    plain, _ = packed(base, net, prefill(base, ids), starts)
    for row, length in enumerate(lengths.tolist()):
        for place, start in enumerate(starts[row].tolist()):
            behind = start + K + HORIZON
            # A window that ends with the horizon is the same one as long as no border lies between.
            same = attention.live_from(behind) == attention.live_from(length)
            for end in {length, behind} if same else {length}:
                gist, raw = alone(base, net, attention, ids[row, :length], start, end=end)
                torch.testing.assert_close(gists[row, place], gist, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(raws[row, place], raw, atol=1e-5, rtol=1e-5)
    assert (gists - plain)[:3].abs().amax() > 1e-3  # and they are not what plain attention gives
    torch.testing.assert_close(gists[3], plain[3], atol=1e-5, rtol=1e-5)  # but where all is live


def test_gists_of_gists_too():
    base, attention = small_base(), Attention("mega", **SIZES)
    net, (ids, lengths) = gistnet(base), documents(lengths=(150, 97, 61))
    starts = live_starts(attention, lengths, K**2, count=2)
    found = packed(base, net, trunk(base, net, ids, lengths, attention), starts, lod=2)
    for row, length in enumerate(lengths.tolist()):
        for place, start in enumerate(starts[row].tolist()):
            expected = alone(base, net, attention, ids[row, :length], start, lod=2)
            for values, wanted in zip(found, expected, strict=True):
                torch.testing.assert_close(values[row, place], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overlap", [0, 32])
def test_with_the_embedded_base_too(overlap):
    base = BaseLM.from_pretrained("asset:tiny-base", "float32").freeze()
    net = gistnet_of("asset:tiny-gistnet", base, "stage.gistnet").eval()
    attention = Attention("mega", segment=64, mid=64, live=96, overlap=overlap)
    ids, lengths = documents(base.vocab_size, (330, 260))
    starts = live_starts(attention, lengths, net.block_size, count=2)
    with torch.no_grad():
        gists, raws = packed(base, net, trunk(base, net, ids, lengths, attention), starts)
        for row, length in enumerate(lengths.tolist()):
            for place, start in enumerate(starts[row].tolist()):
                gist, raw = alone(base, net, attention, ids[row, :length], start)
                torch.testing.assert_close(gists[row, place], gist, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(raws[row, place], raw, atol=1e-5, rtol=1e-5)


def test_a_gradient_reaches_the_gistnet_through_the_branch_as_through_the_whole_window():
    base, attention = small_base(), Attention("mega", **SIZES, overlap=8)
    net, (ids, lengths) = gistnet(base).requires_grad_(True), documents(lengths=(97,))
    start = attention.live_from(97)
    read = trunk(base, net, ids, lengths, attention)
    packed(base, net, read, torch.tensor([[start]]))[0].sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    pyramid = attention.pyramid(window(MegaContextTree.from_tokens(ids, net, base), 97, start))
    column, gist = pyramid.leaves[0, start], net.encode_block(base.embed(ids[:, start : start + K]))
    columns = torch.cat([pyramid.to_tensor()[:, :column], gist[None], pyramid.to_tensor()[:, column + 1 :]], dim=1)
    hidden = base(columns, pyramid.positions(), pyramid.mask.dense())[0, pyramid.leaves[0]]
    nll(base, hidden[start : start + HORIZON], ids[0, start + K : start + K + HORIZON]).sum().backward()
    assert found and any(gradient.abs().max() > 1e-3 for gradient in found.values())
    for name, p in net.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], p.grad, atol=1e-4, rtol=1e-3)


def test_where_everything_is_live_the_trunk_is_the_plain_prefill_bit_for_bit():
    base, (ids, lengths) = small_base(), documents()
    plain, mega = prefill(base, ids), trunk(base, gistnet(base), ids, lengths, Attention("mega", live=10**6, segment=4))
    assert torch.equal(plain.hidden, mega.hidden)
    assert all(
        torch.equal(*pair) for one in zip(plain.cache, mega.cache, strict=True) for pair in zip(*one, strict=True)
    )
    assert mega.first == plain.first == 0


def test_a_trunk_reads_with_gists_as_they_are_now_and_without_dropout():
    base, attention = small_base(), Attention("mega", **SIZES)
    net, (ids, lengths) = gistnet(base, dropout=0.5).train(), documents()
    one, other = (trunk(base, net, ids, lengths, attention).hidden for _ in range(2))
    assert torch.equal(one, other) and net.training and not one.requires_grad
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1)
    assert not torch.equal(one, trunk(base, net, ids, lengths, attention).hidden)


def test_a_block_before_the_live_region_is_refused():
    base, attention = small_base(), Attention("mega", **SIZES)
    net, (ids, lengths) = gistnet(base), documents(lengths=(97, 61))
    read = trunk(base, net, ids, lengths, attention)
    assert read.first.tolist() == [[64], [32]] and read.document(1).first.tolist() == [[32]]
    context = Context(base, {"gistnet": net}, read, {"lengths": lengths}, HORIZON)
    context.batch["block_starts"] = torch.tensor([[64], [32]])
    Block()(context)
    context.batch["block_starts"] = torch.tensor([[64], [28]])
    with pytest.raises(ValueError, match="block start 28 of document 1 is not eligible: .* at least 32"):
        Block()(context)


def test_what_no_packed_pass_can_read_is_refused():
    base, (ids, lengths) = small_base(), documents()
    with pytest.raises(ValueError, match="attention.kind=window is not allowed here: many branches"):
        trunk(base, gistnet(base), ids, lengths, Attention("window"))
    with pytest.raises(ValueError, match="attention.kind=mega is not allowed with nets that read"):
        trunk(base, LastToken(K), ids, lengths, Attention("mega", **SIZES), with_states=True)


@pytest.mark.parametrize(("segment", "tokens", "needed"), [(16, 4, 12), (16, 16, 24), (8, 16, 32), (4, 16, 36)])
def test_every_document_has_room_in_its_live_region_where_it_is_said_to_be_wide_enough(segment, tokens, needed):
    attention = Attention("mega", segment=segment, live=needed)
    check_room(attention, tokens, HORIZON)
    for length in range(2 * tokens + HORIZON, 300):
        assert len(live_starts(attention, torch.tensor([length]), tokens, count=1))
    less = Attention("mega", segment=segment, live=needed - 1)
    with pytest.raises(ValueError, match=f"attention.live={needed - 1} is not allowed: at least {needed}"):
        check_room(less, tokens, HORIZON)
    check_room(Attention(), tokens, HORIZON)
