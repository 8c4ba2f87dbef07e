"""A trained part as a folder of its own."""

import os
import shutil
import signal

import pytest
import torch

from megactx.focus import LensNet
from megactx.framework.app import run
from megactx.framework.files import clear
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.parts.read import gistnet_of, load_gistnet, load_lensnet
from megactx.parts.write import main, save_gistnet, save_lensnet


@pytest.mark.slow
def test_the_gistnet_of_a_run_becomes_a_folder_that_loads_with_its_base(gist_run, base_folder, tmp_path, capsys):
    assert run([*gist_run, "gistnet.type=base", "gistnet.layers=1", "gistnet.rank=4", "stage.evaluate.copies=0"]) == 0
    assert main([str(tmp_path / "run"), str(tmp_path / "net")]) == 0
    assert f"--gistnet {tmp_path / 'net'}" in capsys.readouterr().out
    base = BaseLM.from_pretrained(str(base_folder)).freeze()
    kept, own = load_gistnet(tmp_path / "net", base), gistnet_of(tmp_path / "run", base)
    for name, value in own.state_dict().items():
        assert torch.equal(kept.state_dict()[name], value.to(torch.bfloat16).float())


@pytest.mark.parametrize("what", ["nothing", "a base"])
def test_what_has_no_gistnet_is_a_mistake_that_is_told(what, base_folder, tmp_path, capsys):
    given = base_folder if what == "a base" else tmp_path / "nothing"
    assert main([str(given), str(tmp_path / "net")]) == 2
    assert f"RUN={given}" in capsys.readouterr().err and not (tmp_path / "net").exists()


@pytest.mark.parametrize("kind", ["gistnet", "lensnet"])
def test_a_kill_at_any_step_of_a_save_leaves_a_part_that_loads(kind, base_folder, tmp_path):
    base = BaseLM.from_pretrained(str(base_folder)).freeze()
    given = {"gistnet": {"block_size": 8, "num_heads": 4}, "lensnet": {"layers": 1, "num_heads": 4}}[kind]
    gistnet = GistNet(base.width, base.embedding_rms(), block_size=8, num_heads=4)
    save_gistnet(gistnet, {"block_size": 8, "num_heads": 4}, base, tmp_path / "of")
    gistnet = load_gistnet(tmp_path / "of", base)
    of = {"gistnet": base, "lensnet": gistnet}[kind]
    save, load = {"gistnet": (save_gistnet, load_gistnet), "lensnet": (save_lensnet, load_lensnet)}[kind]
    torch.manual_seed(0)
    net = gistnet if kind == "gistnet" else LensNet(base.width, 8, **given)
    folder, killed, last = tmp_path / "below" / "net", True, 0
    save(net, given, of, folder)
    while killed:
        child = os.fork()
        if child == 0:
            left = last

            def step():
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

            for owner, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")):
                real = getattr(owner, name)
                setattr(owner, name, lambda *a, real=real, **k: (step(), real(*a, **k), step()))
            save(net, given, of, folder)
            os._exit(0)
        killed = os.waitpid(child, 0)[1] != 0
        load(folder, of)
        last += 1
    clear(folder.parent)
    assert last > 6 and [path.name for path in folder.parent.iterdir()] == ["net"]
