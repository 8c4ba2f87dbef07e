"""What nobody reads goes and comes back bit for bit; what is protected, new or opened stays; a kill loses nothing."""

import os
import shutil
import signal
import sqlite3

import pytest
import torch

from megactx.focus import moves
from megactx.memory import MegaContextTree, WorkingContext, archive, storage
from megactx.memory import tree as tree_module
from megactx.memory.curation import Curated

K = 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(tree_module, "TOKENS", 64)
    monkeypatch.setattr(tree_module, "NODES", 16)
    monkeypatch.setattr(archive, "RECENT", 200)
    monkeypatch.setattr(archive, "RUN", 32)


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, (1, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(encoder, table, tmp_path):
    """2,000 tokens: block 20 is protected, block 40 was opened, blocks 100 to 119 come again as 200 to 219."""
    tokens = ids(2000)
    tokens[:, 800:880] = tokens[:, 400:480]
    tree = MegaContextTree.from_tokens(tokens, encoder(K), table)
    tree.protect(1, torch.tensor([[20]]))
    tree.note_opened(torch.tensor([0]), torch.tensor([1]), torch.tensor([40]))
    tree.save(tmp_path / "tree")
    tree.cache.file.close()
    return tmp_path / "tree"


UNREAD = {"unread": {"behind": 0}}


def everything(tree) -> list[torch.Tensor]:
    return [level.whole(name) for level in tree.levels for name in level.columns]


@pytest.mark.parametrize("floor", [1, 2])
def test_what_was_compacted_is_gone_and_comes_back_bit_for_bit(folder, encoder, table, floor):
    before = everything(MegaContextTree.load(folder, encoder(K), table))
    curated = Curated(folder, floor)
    sizes = curated.file.sizes()
    plan = curated.plan(UNREAD)
    assert everything(MegaContextTree.load(folder, encoder(K), table))[0].equal(before[0])  # a plan changes nothing
    assert curated.apply(plan) > 0
    after = curated.file.sizes()
    assert after["tokens"] < sizes["tokens"] / 2 and after["archive"] > 0
    assert (after["gists"] < sizes["gists"]) == (floor == 2)
    tree = MegaContextTree.load(folder, encoder(K), table)
    floors = tree.levels[1].whole("floor")[0]
    assert tree.compacted == int((floors > 0).sum()) > 200 and set(floors.tolist()) == {0, floor}
    assert not floors[[0, 20, 40]].any() and not floors[-50:].any()
    gone = floors > 0
    assert not tree.tokens[0].view(-1, K)[gone].any()
    assert torch.equal(tree.tokens[0].view(-1, K)[~gone], before[0][0].view(-1, K)[~gone])
    assert Curated(folder, floor).restore(0, 2000) > 0
    for one, other in zip(everything(MegaContextTree.load(folder, encoder(K), table)), before, strict=True):
        assert torch.equal(one, other)
    assert {action for _, action, *_ in Curated(folder).log()} == {"compact", "restore"}
    assert not storage.damaged(folder)


def test_policies_choose_what_they_say_and_keep_has_the_last_word(folder):
    blocks = Curated(folder)

    def chosen(**named):
        return {name: mine.nonzero()[:, 0].tolist() for name, mine in blocks.chosen(named).items()}

    assert chosen(duplicate={})["duplicate"] == [*range(100, 120)]  # of two that are alike the newer one stays
    unread = chosen(unread={"behind": 1000})["unread"]
    assert unread == [n for n in range(1, 250) if n not in (20, 40)]
    assert chosen(unread={"behind": 0}, keep={"spans": "8-1600+40-44"})["unread"] == [1, *range(400, 450)]
    assert 40 in chosen(unread={"behind": 0}, age={"days": -1}, keep={"opened": 2})["age"]
    assert chosen(age={"days": 1})["age"] == []
    few = chosen(budget={"megabytes": (blocks.bytes - 10 * blocks.freed) / 1e6})["budget"]
    assert few == [*range(1, 11)]
    with pytest.raises(ValueError, match="policy=forget is not known, there are age, budget, dnll"):
        chosen(forget={})
    with pytest.raises(ValueError, match="policy=age: .*weeks"):
        chosen(age={"weeks": 3})


def test_entropy_takes_what_says_least_and_what_was_measured_counts_where_it_is_known(folder, encoder, table):
    tree = MegaContextTree.load(folder, encoder(K), table)
    one = torch.arange(1, tree.tokens.shape[1]) // K == 60  # block 60 says one word, the most common one
    tree.levels[0].pages[3]["token"][0, 240 - 3 * 64 : 244 - 3 * 64] = int(tree.tokens[0].mode().values)
    tree.levels[0].dirty.add(("body", 3))
    tree.save(folder)
    assert int(one.sum()) == K
    blocks = Curated(folder)
    counts = torch.bincount(blocks.levels[0].whole("token")[0].long()).double()
    told = -(counts / counts.sum()).log()[blocks.levels[0].whole("token")[0].long()].view(-1, K).mean(1)
    chosen = blocks.chosen({"entropy": {"share": 0.1}})["entropy"]
    assert 60 in chosen.nonzero()[:, 0] and int(chosen.sum()) == int(0.1 * int(blocks.may.sum()))
    assert told[chosen].max() <= told[blocks.may & ~chosen].min() + 1e-6
    assert not blocks.chosen({"entropy": {"by": "nll"}})["entropy"].any()  # nothing was measured
    numbers = torch.tensor([50, 51, 52, 53])
    blocks.note_measured(numbers, torch.tensor([0.3, 0.0, -0.1, 0.2]), torch.tensor([4.0, 1.0, 2.0, 3.0]))
    again = Curated(folder)

    def found(**named):
        return {name: mine.nonzero()[:, 0].tolist() for name, mine in again.chosen(named).items()}

    assert found(entropy={"by": "nll", "share": 0.5})["entropy"] == [51, 52]
    assert found(dnll={})["dnll"] == [51, 52] and found(dnll={"nats": 0.2})["dnll"] == [51, 52, 53]
    left = found(unread={"behind": 0}, keep={"dnll": 0.25})["unread"]
    assert 50 not in left and {51, 52, 53} <= {*left}
    with pytest.raises(ValueError, match="share=2, by=words is not allowed"):
        again.chosen({"entropy": {"share": 2, "by": "words"}})


def test_a_window_shows_the_floor_and_opens_nothing_below_it(folder, encoder, table):
    curated = Curated(folder, 2)
    curated.apply(curated.plan(UNREAD | {"keep": {"spans": "1000-1400"}}))
    tree = MegaContextTree.load(folder, encoder(K), table)
    for level in tree.levels[1:]:  # no window holds what is protected, and what stands above it
        index = torch.arange(int(level.lengths))
        level.write(torch.zeros_like(index), index, protected=torch.zeros_like(index))
    for budget in (60, 200, 900, 2000):
        context = WorkingContext.recency(tree, budget, debug=True)  # every invariant holds
        opens = moves(context, 0).expand[0]
        floors = tree.floors(torch.zeros_like(context.lod[0]), context.lod[0], context.index[0])
        assert torch.equal(opens, (context.lod[0] > 0) & (floors < context.lod[0])) and (floors <= context.lod[0]).all()
        shut = ((context.lod[0] > 0) & ~opens).nonzero()[:, 0]
        assert len(shut) or budget == 60
        for column in shut[:2].tolist():
            with pytest.raises(ValueError, match="was taken away"):
                context.expand(column)
    context = WorkingContext.recency(tree, 200)
    before = tree.levels[1].whole("opened").sum()
    column = (moves(context, 0).expand[0] & (context.lod[0] == 1)).nonzero()[0, 0]
    context.expand(column)
    assert tree.levels[1].whole("opened").sum() == before + 1
    for wrong in (lambda: tree.slice(0, 400), lambda: tree.refresh(encoder(K, factor=2.0))):
        with pytest.raises(ValueError, match="restore it first"):
            wrong()


def test_what_was_protected_or_opened_since_the_plan_was_made_stays(folder, encoder, table):
    plan = Curated(folder).plan(UNREAD)
    tree = MegaContextTree.load(folder, encoder(K), table)
    tree.protect(1, torch.tensor([[50]]))
    tree.note_opened(torch.tensor([0]), torch.tensor([1]), torch.tensor([60]))
    tree.append(ids(40, seed=1))
    tree.save(folder)
    Curated(folder).apply(plan)
    floors = MegaContextTree.load(folder, encoder(K), table).levels[1].whole("floor")[0]
    assert not floors[[50, 60]].any() and floors[[49, 51, 59, 61]].all()
    with pytest.raises(ValueError, match="was curated meanwhile"):  # the one that was open before
        tree.cache.budget = 0
        tree.cache.held.clear()
        for page in tree.levels[0].pages:
            page.clear()
        assert tree.tokens is not None


def test_a_tree_grows_on_and_moves_with_its_archive(folder, encoder, table, tmp_path):
    before = MegaContextTree.load(folder, encoder(K), table).tokens
    curated = Curated(folder)
    curated.apply(curated.plan(UNREAD))
    tree = MegaContextTree.load(folder, encoder(K), table)
    tree.append(ids(100, seed=1))
    tree.save(folder)
    tree.save(tmp_path / "elsewhere")
    for place in (folder, tmp_path / "elsewhere"):
        assert Curated(place).restore(0, 2000) > 0
        again = MegaContextTree.load(place, encoder(K), table)
        assert torch.equal(again.tokens, torch.cat([before, ids(100, seed=1).int()], 1)) and again.compacted == 0


def test_what_is_purged_is_gone_for_good_and_the_log_says_so(folder):
    curated = Curated(folder)
    curated.apply(curated.plan(UNREAD))
    assert curated.purge(days=1) == 0 and (count := curated.purge(days=0)) > 20
    assert curated.restore(0, 2000) == 0 and curated.file.sizes()["archive"] == 0
    assert sum(action == "purge" for _, action, *_ in curated.log()) == count


def test_a_damaged_archive_is_named_and_restores_nothing(folder):
    curated = Curated(folder)
    curated.apply(curated.plan(UNREAD))
    db = sqlite3.connect(curated.file.path, isolation_level=None)
    db.execute("UPDATE archive SET value = x'00' WHERE start = 420")
    db.close()
    before = int((Curated(folder).floor > 0).sum())
    with pytest.raises(ValueError, match="archive of tokens 420 to 451 is damaged"):
        Curated(folder).restore(0, 2000)
    assert int((Curated(folder).floor > 0).sum()) == before
    assert Curated(folder).restore(452, 2000) > 0


def test_an_apply_or_restore_that_is_killed_is_done_or_not_done(folder, encoder, table, tmp_path):
    before = everything(MegaContextTree.load(folder, encoder(K), table))
    plan = Curated(folder).plan({"duplicate": {}})
    Curated(folder).apply(plan)
    after = everything(MegaContextTree.load(folder, encoder(K), table))
    Curated(folder).file.close()
    seen = set()
    for number, step in enumerate([*range(0, 400, 40), *range(400, 4000, 450), 10**6]):
        place = tmp_path / f"{number}"
        shutil.copytree(folder, place)
        child = os.fork()
        if child == 0:
            try:
                curated, left = Curated(place), [step]

                def count(left=left):
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

                curated.file.db.set_progress_handler(count, 1)
                curated.restore(0, 2000)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        found = everything(MegaContextTree.load(place, encoder(K), table))
        state = [all(map(torch.equal, found, wanted)) for wanted in (before, after)]
        assert any(state) and not storage.damaged(place)
        seen.add(state.index(True))
    assert seen == {0, 1}


@pytest.mark.parametrize("floor", [1, 2])
def test_an_open_tree_is_archived_with_what_is_not_saved_of_it_and_what_became_protected_or_is_shown_stays(
    folder, encoder, table, floor
):
    plan = Curated(folder, floor).plan(UNREAD)
    tree = MegaContextTree.load(folder, encoder(K), table)
    tree.append(ids(40, seed=1))
    tree.protect(1, torch.tensor([[50]]))
    before = everything(tree)
    live = archive.LiveArchive(tree, 2000, lambda asked: torch.tensor([70]))
    assert live.apply(plan) > 0
    floors = tree.levels[1].whole("floor")[0]
    assert not floors[[0, 20, 40, 50, 70]].any() and tree.compacted == int((floors > 0).sum()) > 180
    again = MegaContextTree.load(folder, encoder(K), table)
    assert all(map(torch.equal, everything(again), everything(tree))) and again.lengths == tree.lengths
    tree.append(ids(40, seed=2))
    tree.save(folder)  # its home is still there
    assert live.restore(0, 2000) > 0 and tree.compacted == 0
    for one, other in zip(everything(tree), before, strict=True):
        assert torch.equal(one[:, : other.shape[1]], other)
    assert not storage.damaged(folder)
