"""What a session expects of the next block, and where the gist of the block that came stands."""

import pytest
import torch
import torch.nn.functional as F

from megactx.memory import MegaContextTree
from megactx.memory.prediction import AMONG, expected
from megactx.runtime import Controller, Session, Settings
from megactx.runtime import foretelling as module
from megactx.runtime.metrics import measured

K = 4


def slow(readout, tree, row, block, state):
    """Reciprocal ranks of a block by the readout and by its control, a loop over all candidates."""
    gists = tree.gists(1)[row]
    found = []
    for foretold in (readout(state), readout.from_newest(gists[block - 1])):
        near = [float(F.cosine_similarity(foretold, gist, dim=0)) for gist in gists[: block + 1][-AMONG:]]
        found.append(1 / sum(cosine >= near[-1] for cosine in near))
    return torch.tensor(found)


def pushed(stream, tokens):
    for column in tokens.T:
        stream.push(column)


def pushed_late(stream, tokens):
    """As a server does: nothing is read before somebody asks what follows."""
    stream.lazy = True
    for column in tokens.T:
        stream.push(column)
        stream.logits()


def scored(stream, tokens):
    stream.append(tokens, score=True)


@pytest.mark.parametrize("read", [pushed, pushed_late, scored])
@torch.no_grad()
def test_the_rank_of_each_block_that_came_is_that_of_a_loop_wherever_rows_end(
    foretelling, foretelling_models, ids, read
):
    events, tokens = [], ids(2, 70)
    stream = foretelling("recency").stream(2, observers=[events.append])
    first = torch.tensor([30, 23])
    stream.append(tokens[:, :30], first)
    rest = torch.stack([tokens[row, n : n + 38] for row, n in enumerate(first.tolist())])
    read(stream, rest)
    base, told = foretelling_models.base, 0
    for event in events:
        for row, rank in enumerate(event.foretold.rank):
            if rank.isnan().any():
                continue
            block = int(event.foretold.blocks[row]) - 1
            whole = torch.cat([tokens[row, : first[row]], rest[row]])[None]  # all raw: the model itself reads the same
            state = base(base.embed(whole), None)[0, block * K - 1]
            assert torch.allclose(rank, slow(foretelling_models.prediction, stream.tree, row, block, state))
            told += 1
    # Of the nine blocks that came in each row, all but the first one: nobody read the end of the block before that.
    assert told == 2 * 8


@pytest.mark.parametrize("how", [{}, {"reuse": "approximate"}, dict(attention="mega", segment=16, mid=16, live=16)])
@torch.no_grad()
def test_the_newest_gists_alone_are_read_and_a_block_is_ranked_among_them(
    foretelling, foretelling_models, ids, monkeypatch, how
):
    events = []
    stream = foretelling(**how).stream(observers=[events.append])
    stream.append(ids(1, (AMONG + 20) * K))
    stream.logits()
    events.clear()
    with monkeypatch.context() as patch:
        patch.setattr(MegaContextTree, "gists", lambda *_: pytest.fail("all gists are read"))
        pushed(stream, ids(1, 6 * K, seed=1))
    for before, event in zip(events[:-1], events[1:], strict=True):
        block = int(event.foretold.blocks[0]) - 1
        reference = slow(foretelling_models.prediction, stream.tree, 0, block, before.foretold.state[0])
        assert torch.allclose(event.foretold.rank[0], reference) and block > AMONG
    assert len(events) == 6 and not events[0].foretold.rank.isnan().any(), "the window was read before the first"


@torch.no_grad()
def test_of_text_that_is_appended_the_first_block_is_what_was_foretold(foretelling, foretelling_models, ids):
    events = []
    stream = foretelling().stream(observers=[events.append])
    stream.append(ids(1, 10 * K))
    stream.logits()
    state = stream.hidden[0]
    stream.append(ids(1, 7 * K + 1, seed=1))
    (rank,) = [event.foretold.rank[0] for event in events if not event.foretold.rank.isnan().any()]
    assert torch.allclose(rank, slow(foretelling_models.prediction, stream.tree, 0, 10, state))


@torch.no_grad()
def test_what_is_near_is_what_expects_shows_and_nothing_where_nothing_was_read(
    foretelling, foretelling_models, ids, monkeypatch
):
    found, hidden = [], []
    stream = foretelling().stream(
        2, observers=[lambda event: found.append((event.foretold.near(0), event.foretold.near(1)))]
    )
    stream.append(ids(2, 60))
    stream.window()
    assert found == [([], [])]
    stream.logits()
    for column in ids(2, 5 * K, seed=1).T:
        stream.push(column)
        hidden.append((stream.hidden, stream.tree.counts(1)))
    for near, (state, counts) in zip(found[1:], hidden[K - 1 :: K], strict=True):
        for row in (0, 1):
            among = range(int(counts[row]))
            assert near[row] == expected(foretelling_models.prediction, stream.tree, state[row], 8, row, among)
            gists = F.normalize(stream.tree.gists(1)[row, : len(among)], dim=-1)
            best = (gists @ foretelling_models.prediction(state[row])).argsort(descending=True)[:8]
            assert [index for index, _ in near[row]] == best.tolist()
    monkeypatch.setattr(module, "NEWEST", 5)
    pushed(stream, ids(2, K, seed=2))
    assert sorted(index for index, _ in found[-1][0]) == list(range(16, 21)), "of a long history the newest are asked"


def test_nothing_is_said_without_a_readout_and_nothing_kept_without_observers(controller, foretelling, ids):
    events = []
    stream = controller().stream(observers=[events.append])
    pushed(stream, ids(1, 5 * K))
    assert [event.foretold for event in events] == [None] * 5
    assert not [value for event in events for value in measured(event) if "prediction" in value.name]
    alone = foretelling().stream()
    pushed(alone, ids(1, 5 * K))
    assert not alone.foretelling.states


def test_a_session_that_was_loaded_has_foretold_nothing_yet(foretelling, tmp_path):
    events = []
    with Session(foretelling(), [events.append]) as session:
        session.append("def read(path):\n" * 8)
        for _ in session.generate(3 * K):
            pass
        assert any(event.foretold.rank.isfinite().all() for event in events)
        session.save(tmp_path / "kept")
    events.clear()
    with Session.load(tmp_path / "kept", foretelling(), [events.append]) as session:
        for _ in session.generate(4 * K):
            pass
    finite = [bool(event.foretold.rank.isfinite().all()) for event in events]
    assert not finite[0] and all(finite[2:]) and len(finite) > 2


@torch.no_grad()
def test_gists_that_were_taken_away_or_cannot_be_read_are_not_asked(foretelling, ids, monkeypatch):
    events = []
    stream = foretelling().stream(observers=[events.append])
    stream.append(ids(1, 40 * K))
    tree, gone = stream.tree, torch.arange(K, 5 * K)
    tree.levels[1].write(torch.zeros_like(gone), gone, floor=torch.full_like(gone, 2))
    tree.compacted = len(gone)
    stream.restore(None)
    stream.logits()
    pushed(stream, ids(1, K, seed=1))
    monkeypatch.setattr(module, "NEAR", 100)
    near = [index for index, _ in events[-1].foretold.near()]
    assert sorted(near) == [*range(K), *range(5 * K, 41)] and events[-1].foretold.rank.isfinite().all()

    def damaged(*_):
        raise ValueError("a page is damaged")

    for name in ("rank_of", "expected"):
        monkeypatch.setattr(module, name, damaged)
    pushed(stream, ids(1, K, seed=2))
    assert events[-1].foretold.rank.isnan().all() and events[-1].foretold.near() == []
    monkeypatch.undo()
    pushed(stream, ids(1, K, seed=3))
    assert events[-1].foretold.rank.isfinite().all() and len(events[-1].foretold.near()) == 8


def test_what_is_measured_is_the_mean_of_the_rows_that_were_foretold(foretelling, ids):
    events = []
    stream = foretelling().stream(3, observers=[events.append])
    stream.append(ids(3, 24), torch.tensor([24, 22, 20]))
    for n, column in enumerate(ids(3, 5 * K, seed=1).T):
        stream.push(column, torch.tensor([True, True, n > 10]))
    seen = 0
    for event in events:
        told = {value.attribute: value.value for value in measured(event) if value.name == "megactx.prediction.rank"}
        ranks = event.foretold.rank[~event.foretold.rank.isnan().any(1)]
        assert told == (dict(zip(("readout", "map"), ranks.mean(0).tolist(), strict=True)) if len(ranks) else {})
        seen += 0 < len(ranks) < 3
    assert seen, "some rows were foretold, and others not"


def test_the_embedded_models_say_what_they_expect():
    from megactx.runtime import load_models

    events, models = [], load_models(device="cpu")
    session = Session(Controller(models, Settings(budget=512)), [events.append])
    session.append("def read(path):\n    return path.read_text()\n" * 20, score=True)
    told = [event.foretold.rank for event in events if event.foretold.rank.isfinite().all()]
    assert len(told) > 5 and all((rank > 0).all() and (rank <= 1).all() for rank in told)
    assert len(events[-1].foretold.near()) == 8
