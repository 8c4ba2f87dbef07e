"""Parts come back from folders as they were, and only for the GistNet or base that they were trained with."""

import json

import pytest
import torch
from windows import WIDTH, K, gistnet, small_base, tree_of

from megactx.focus import LensNet
from megactx.lm.identity import record_of
from megactx.memory import WorkingContext
from megactx.parts.find import LENSNET as SETTINGS
from megactx.parts.find import WEIGHTS
from megactx.parts.read import gistnet_of, gistnet_settings, lensnet_of, load_gistnet, load_lensnet
from megactx.parts.write import save_gistnet, save_lensnet

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


@pytest.fixture
def exported(saved, tmp_path):
    """A folder with ``gistnet/`` and ``lensnet/`` in it, as an export has them."""
    folder, lens, net, base = saved
    save_gistnet(net, dict(block_size=K, num_heads=4, skip="none"), base, tmp_path / "out" / "gistnet")
    written = load_gistnet(tmp_path / "out" / "gistnet", base)
    save_lensnet(lens, OWN, written, tmp_path / "out" / "lensnet")
    return tmp_path / "out", lens, base


def test_an_export_has_the_parts_that_its_folders_have(exported):
    out, lens, base = exported
    net = gistnet_of(str(out), base)
    assert net.block_size == K and gistnet_settings(str(out))["skip"] == "none"
    found = lensnet_of(str(out), net, record_of(base, "small"), "stage.lens", OWN)
    assert torch.equal(found.tau, lens.tau)


@pytest.mark.parametrize("content", [b"", b"\xff\x00{", b"{}", b'{"settings": {}, "width": 32}'])
def test_a_damaged_description_of_a_gistnet_is_refused(exported, content):
    out, _, base = exported
    (out / "gistnet" / "gistnet.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"gistnet=.*: gistnet.json is damaged"):
        load_gistnet(out / "gistnet", base)


def test_damaged_weights_of_a_gistnet_are_refused(exported):
    out, _, base = exported
    (out / "gistnet" / WEIGHTS).write_bytes(b"\x08")
    with pytest.raises(ValueError, match="gistnet=.*: its weights do not fit its settings"):
        load_gistnet(out / "gistnet", base)


def test_a_name_that_leads_nowhere_is_told_with_its_own_setting(saved):
    base = saved[3]
    for path, message in (("asset:nothing", "there is no such asset"), ("/no/where", "there is no such folder or")):
        with pytest.raises(ValueError, match=f"^stage.gistnet={path}: {message}"):
            gistnet_of(path, base, "stage.gistnet")


def test_a_gistnet_that_another_one_began_with_is_named_where_it_is_gone(saved, tmp_path):
    net, base = saved[2:]
    weights = {f"gistnet.{name}": value for name, value in net.state_dict().items()}
    hparams = {"gistnet": str(tmp_path / "gone")}
    torch.save({"state_dict": weights, "hyper_parameters": hparams}, tmp_path / "lens.ckpt")
    with pytest.raises(ValueError, match=r"^gistnet=.*lens.ckpt, which began with gistnet=.*gone: there is no such"):
        gistnet_of(tmp_path / "lens.ckpt", base)
