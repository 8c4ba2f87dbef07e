"""A LensNet comes back from a folder as it was, and only for the GistNet that it was trained with."""

import json

import pytest
import torch
from windows import WIDTH, K, gistnet, small_base, tree_of

from megactx.focus import LensNet
from megactx.focus.pretrained import SETTINGS, WEIGHTS, load_lensnet, save_lensnet
from megactx.gist.pretrained import load_gistnet, save_gistnet
from megactx.memory import WorkingContext

OWN = dict(layers=1, num_heads=4, head="linear")


@pytest.fixture
def saved(tmp_path):
    base = small_base()
    net, lens = gistnet(base), LensNet(WIDTH, K, **OWN).eval()
    for p in lens.parameters():
        p.data = torch.randn_like(p).to(torch.bfloat16).float() * 0.1
        p.data = p.data.to(torch.bfloat16).float()
    lens.see(torch.randn(50))
    save_lensnet(lens, OWN, net, tmp_path / "lens", made_by="a test")
    return tmp_path / "lens", lens, net, base


def test_it_scores_as_before_with_its_running_tau(saved):
    folder, lens, net, base = saved
    loaded = load_lensnet(folder, net)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.tau, lens.tau) and loaded.updates == lens.updates
    context = WorkingContext.recency(tree_of(base), 60)
    with torch.no_grad():
        assert torch.equal(lens.score(context).score, loaded.score(context).score)


def test_the_gistnet_may_have_been_saved_in_the_meantime(saved, tmp_path):
    folder, _, net, base = saved
    settings = dict(block_size=K, num_heads=4, skip="none")
    save_gistnet(net, settings, base, tmp_path / "gistnet")
    load_lensnet(folder, load_gistnet(tmp_path / "gistnet", base))


def test_a_second_save_takes_the_place_of_the_first_and_leaves_nothing_else(saved):
    folder, lens, net, _ = saved
    lens.see(torch.randn(50) * 5)
    save_lensnet(lens, OWN, net, folder)
    assert load_lensnet(folder, net).updates == 2
    assert {path.name for path in folder.parent.iterdir()} == {"lens"}


def test_another_gistnet_is_refused_by_name(saved):
    folder, _, net, base = saved
    other = gistnet(base)
    next(other.parameters()).data.add_(1.0)
    with pytest.raises(ValueError, match="was trained with another GistNet"):
        load_lensnet(folder, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 64}, "its width is 64, the GistNet's 32"),
        ({"block_size": 8}, "its block_size is 8, the GistNet's 4"),
        ({"settings": {"layers": 2, "num_heads": 4}}, "its weights do not fit its settings"),
        ({"settings": {"no_such": 1}}, "lensnet.json is damaged"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(saved, change, message):
    folder, _, net, _ = saved
    about = json.loads((folder / SETTINGS).read_text()) | change
    (folder / SETTINGS).write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        load_lensnet(folder, net)


@pytest.mark.parametrize("name", [SETTINGS, WEIGHTS])
@pytest.mark.parametrize("content", [None, b"", b"\xff\x00{"])
def test_missing_and_damaged_files_are_refused(saved, name, content):
    folder, _, net, _ = saved
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="lensnet="):
        load_lensnet(folder, net)
