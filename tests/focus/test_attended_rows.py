"""Windows and what follows them, under MegaAttention and under a sliding window, in one pass."""

import pytest
import torch
from windows import K, following, small_base, tree_of, window

from megactx.focus import moves
from megactx.focus.attended_rows import AttendedRows
from megactx.focus.edit_labels import continuation_nll, measure_values
from megactx.focus.packed import Windows
from megactx.memory.pyramid import Attention
from megactx.runtime.node_prefill import NodePrefill

H = 7
MEGA = Attention("mega", segment=16, mid=16, live=16)
KINDS = {"mega": MEGA, "strips": Attention("mega", segment=16, mid=16, live=16, overlap=8)}


def contexts(kind: str = "llama", **settings):
    base = small_base(kind)
    return base, window(tree_of(base, **settings))


@pytest.mark.parametrize("kind", ["llama", "smollm3"])
@pytest.mark.parametrize("attention", KINDS)
def test_one_pass_says_what_a_session_says_that_reads_token_by_token(attention, kind):
    base, context = contexts(kind, gaussian_rope="damped")
    found = AttendedRows.of(KINDS[attention], context).read(base, following(2, H))
    session = NodePrefill(base, KINDS[attention])
    said = [session.read(context)]
    for number in range(H - 1):
        positions = (context.ends() + number)[:, None]
        said.append(session.step(following(2, H)[:, number : number + 1], positions)[:, 0])
    said = torch.stack(said, dim=1)
    assert (found - said).abs().max() < 1e-4 * said.abs().max()


@pytest.mark.parametrize(
    "attention", [Attention("mega", segment=16, mid=16, live=10**6), Attention("window", window=10**6)]
)
def test_where_every_entry_is_seen_it_is_plain_attention(attention):
    base, context = contexts()
    plain = continuation_nll(base, context, following(2, H))
    assert torch.allclose(continuation_nll(base, context, following(2, H), attention), plain, atol=1e-5)
    assert not torch.allclose(continuation_nll(base, context, following(2, H), MEGA), plain, atol=1e-3)


def test_under_a_sliding_window_each_token_sees_the_sink_and_what_is_near():
    base, context = contexts()
    near = 20
    rows = AttendedRows.of(Attention("window", window=near), context)
    found = rows.read(base, following(2, H))
    for row, count in enumerate(context.counts.tolist()):
        start, stop = (part[row, :count] for part in (context.starts(), context.starts() + context.widths()))
        end = int(context.ends()[row])
        start = torch.cat([start, end + torch.arange(H - 1)])
        stop = torch.cat([stop, end + 1 + torch.arange(H - 1)])
        mask = torch.zeros(len(start), len(start), dtype=torch.bool)
        for one in range(len(start)):
            for other in range(one + 1):
                sink, close = stop[other] <= K, stop[other] > start[one] - near + 1
                mask[one, other] = sink or close or one == other
        entries = torch.cat([context.to_tensor()[row, :count], base.embed(following(2, H)[row, :-1])])
        positions = torch.cat([context.positions()[row, :count], end + torch.arange(H - 1)])
        said = base(entries[None], positions[None], mask[None, None])[0, count - 1 :]
        assert (found[row] - said).abs().max() < 1e-4 * said.abs().max()


def test_windows_may_be_read_in_parts_and_in_any_order():
    base, context = contexts()
    rows, which = AttendedRows.of(MEGA, context), torch.tensor([1, 0])
    whole = rows.read(base, following(2, H))
    assert torch.allclose(rows[which].read(base, following(2, H)[which]), whole[which], atol=1e-5)
    assert torch.allclose(rows[1:].read(base, following(2, H)[1:]), whole[1:], atol=1e-5)


def test_a_gradient_goes_into_the_gists_that_the_window_shows_and_into_nothing_else():
    base, context = contexts()
    windows = Windows.of(context, MEGA)
    gists = torch.randn(int(windows.place.max()) + 1, base.width, requires_grad=True)
    windows.read(base, gists, following(1, H)[0], context.tree.encoder).square().sum().backward()
    assert (gists.grad.abs().sum(1) > 0).all()
    entries = context.to_tensor().requires_grad_()
    rows = AttendedRows.of(MEGA, context)
    hidden = rows.read(base, following(2, H), entries)
    assert torch.equal(hidden, rows.read(base, following(2, H)))
    hidden.square().sum().backward()
    assert (entries.grad.abs().sum(2) > 0).equal(context.mask)


@pytest.mark.parametrize("attention", [*KINDS.values(), Attention("window", window=20)])
def test_the_value_of_an_edit_is_what_reading_the_edited_window_saves(attention):
    base, context = contexts()
    edits = moves(context, 8).edits(context)
    edits = edits[torch.arange(0, len(edits), 3)]
    assert edits.expand.any() and not edits.expand.all() and len({*edits.row.tolist()}) == 2
    values, plain = measure_values(base, context, edits, following(2, H), attention)
    assert torch.allclose(plain, continuation_nll(base, context, following(2, H), attention).mean(1), atol=1e-5)
    for number in range(len(edits)):
        edited = context.copy()
        edited.budget = 10**6
        edits[number : number + 1].apply(edited)
        after = continuation_nll(base, edited, following(2, H), attention).mean(1)[edits.row[number]]
        won = float(plain[edits.row[number]] - after) * (1 if edits.expand[number] else -1)
        assert abs(float(values[number]) - won) < 1e-5
