"""Pages of a stored tree on the model's device: a tier of its own, with a budget, pins and evictions."""

import pytest
import torch
from torch import nn

from megactx import FocusAllocator, LensNet
from megactx.gist import GistNet
from megactx.memory import MegaContextTree, WorkingContext
from megactx.memory import tree as tree_module

K, WIDTH = 4, 32
PAGE = 8 * (WIDTH * 4 + 4 + 8)  # bytes of gists, versions and times of a page


@pytest.fixture
def models(device):
    torch.manual_seed(0)
    table = nn.Embedding(50, WIDTH).requires_grad_(False).to(device)
    net = GistNet(WIDTH, 0.05, block_size=K, num_heads=4, skip="none").eval().requires_grad_(False).to(device)
    return net, table


@pytest.fixture
def saved(models, device, tmp_path, monkeypatch):
    monkeypatch.setattr(tree_module, "TOKENS", 64)
    monkeypatch.setattr(tree_module, "NODES", 8)
    ids = torch.randint(50, (1, 2000), generator=torch.Generator().manual_seed(1))
    tree = MegaContextTree.from_tokens(ids.to(device), *models)
    tree.save(tmp_path / "tree")
    return tree


@pytest.fixture
def opened(saved, models, device, tmp_path):
    def load(device_memory, memory=2**20):
        return MegaContextTree.load(
            tmp_path / "tree", *models, device=device, memory=memory, device_memory=device_memory
        )

    return load


def gist(tree, index):
    at = torch.tensor([index], device=tree.device)
    return tree.levels[1].read("gist", torch.zeros_like(at), at)


def uses(tree):
    return {name: tier.uses for name, tier in tree.cache.tiers.items()}


def test_a_page_comes_from_the_disk_once_and_then_from_memory_to_the_device(saved, opened, device):
    tree = opened(3 * PAGE)
    for number in (0, 1, 2, 3, 0, 0):  # three of them have room on the device
        found = gist(tree, 8 * number)
        assert found.device.type == device and torch.equal(found, gist(saved, 8 * number))
    assert uses(tree) == {"device": 1, "memory": 1, "disk": 4}
    said = tree.cache.metrics()
    assert said["device"]["bytes"] == 3 * PAGE and said["device"]["evicted"] == 2
    assert said["memory"]["bytes"] == 4 * PAGE and said["memory"]["evicted"] == 0
    assert 0 < said["memory"]["p50"] and 0 < said["disk"]["p50"]


def test_memory_has_a_budget_of_its_own(opened):
    tree = opened(PAGE, memory=2 * PAGE)
    for number in (0, 1, 2, 2, 1, 0):
        gist(tree, 8 * number)
    assert uses(tree) == {"device": 1, "memory": 1, "disk": 4}
    assert tree.cache.metrics()["memory"]["bytes"] == 2 * PAGE and tree.cache.tiers["memory"].evicted == 2


def test_the_pages_of_a_window_stay_on_the_device_and_its_children_wait_in_memory(saved, opened, device):
    tree = opened(0)
    lod, index = torch.tensor([2, 3], device=device), torch.tensor([20, 6], device=device)
    found = tree.embeddings(torch.zeros_like(lod), lod, index)
    assert torch.equal(found, saved.embeddings(torch.zeros_like(lod), lod, index))
    tree.cache.worker.shutdown()
    tree.cache.ahead(())
    assert (1, "body", 80 // 8) in tree.cache.shelf.pages and "gist" not in tree.levels[1].pages[80 // 8]
    tree.levels[1].whole("gist")
    assert "gist" in tree.levels[2].pages[20 // 8] and "gist" in tree.levels[3].pages[0]
    assert [n for n, page in enumerate(tree.levels[1].pages) if "gist" in page] == [len(tree.levels[1].pages) - 1]


def test_what_was_changed_on_the_device_stays_until_it_is_saved_and_comes_back_changed(opened, device, tmp_path):
    tree = opened(PAGE)
    gist(tree, 10)
    at, ones = torch.tensor([10], device=device), torch.ones(1, WIDTH, device=device)
    tree.levels[1].write(torch.zeros_like(at), at, gist=ones)
    for number in range(20, 30):
        gist(tree, 8 * number)
    assert torch.equal(gist(tree, 10), ones)
    tree.save(tmp_path / "tree")
    for number in range(20, 30):
        gist(tree, 8 * number)
    assert "gist" not in tree.levels[1].pages[1] and torch.equal(gist(tree, 10), ones)


def test_a_tree_grows_alike_with_and_without_room_on_the_device(opened, device, tmp_path):
    trees = [opened(0, memory=0), opened(2**20)]
    for step in range(3):
        for tree in trees:
            tree.append(torch.full((1, 100), step, device=device))
    for lod in range(1, trees[0].depth + 1):
        assert torch.equal(trees[0].gists(lod), trees[1].gists(lod))
    assert torch.equal(trees[0].tokens, trees[1].tokens)


def test_the_lens_and_the_allocator_choose_alike_over_a_device_that_is_too_small(saved, opened, device):
    torch.manual_seed(0)
    lens = LensNet(WIDTH, K, layers=1, num_heads=4).eval().requires_grad_(False).to(device)
    nn.init.normal_(lens.last.weight, std=0.5)
    chosen = []
    for tree in (saved, opened(2 * PAGE, memory=4 * PAGE)):
        context, allocator = WorkingContext.recency(tree, 300), FocusAllocator(protected=8)
        for _ in range(3):
            found = lens.score(context, margin=allocator.margin(lens.tau))
            allocator.refocus(context, found.score, found.price)
        chosen.append((context.lod.cpu(), context.index.cpu(), context.to_tensor().cpu()))
    assert all(torch.equal(one, other) for one, other in zip(*chosen, strict=True))


def test_on_a_card_there_is_such_a_tier_without_being_asked_for(saved, opened, device):
    assert ("device" in opened(None).cache.tiers) == ("device" in saved.cache.tiers) == (device != "cpu")
