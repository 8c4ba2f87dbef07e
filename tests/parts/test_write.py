"""A trained part as a folder of its own."""

import pytest
import torch

from megactx.framework.app import run
from megactx.lm import BaseLM
from megactx.parts.read import gistnet_of, load_gistnet
from megactx.parts.write import main


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
