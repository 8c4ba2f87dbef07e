"""A stage is loaded from a checkpoint by its path alone, from any process and any folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megactx.framework.app import run

REPOSITORY = Path(__file__).parents[2]
LOAD = """
import json, sys, torch
from megactx.stages.base_lm import BaseLMStage
from megactx.stages.gist import GistStage
for kind, path in json.loads(sys.argv[1]):
    stage = {"gist": GistStage, "base_lm": BaseLMStage}[kind].load_from_checkpoint(path)
    torch.save(stage.state_dict(), path + ".loaded")
"""


@pytest.fixture(scope="module")
def gist(gist_settings, base_folder, tmp_path_factory):
    """A gist run whose base was given by a relative path; -> its checkpoints."""
    work = tmp_path_factory.mktemp("work")
    shutil.copytree(base_folder, work / "models" / "base")
    settings = [setting for setting in gist_settings if not setting.startswith("base.name=")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert run([*settings, "base.name=models/base", "folder=run", "preset.steps=3", "preset.validate_every=1"]) == 0
    return work / "run" / "checkpoints"


@pytest.mark.slow
def test_a_stage_needs_nothing_but_the_path(gist, tiny_run, base_folder, tmp_path):
    assert run([*tiny_run, f"folder={tmp_path / 'base_lm'}", "preset.steps=2"]) == 0
    stages = [("gist", gist), ("base_lm", tmp_path / "base_lm" / "checkpoints")]
    paths = [(kind, str(folder / name)) for kind, folder in stages for name in ("last.ckpt", "best.ckpt")]
    (tmp_path / "elsewhere").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(paths)],
        cwd=tmp_path / "elsewhere",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for _, path in paths:
        loaded, saved = (torch.load(p, weights_only=True) for p in (f"{path}.loaded", path))
        assert saved["state_dict"] and all(torch.equal(loaded[k], v) for k, v in saved["state_dict"].items())
        assert {name.partition(".")[0] for name in loaded} >= {"base"}  # whole, also what the checkpoint only names


@pytest.mark.slow
def test_a_base_that_is_gone_is_named_and_another_place_can_be_given(gist, base_folder, tmp_path):
    from megactx.stages.gist import GistStage

    path, base = gist / "last.ckpt", gist.parents[1] / "models" / "base"
    base.rename(base.with_name("moved"))
    try:
        with pytest.raises(ValueError, match=f"base.name={base}: there is no such folder"):
            GistStage.load_from_checkpoint(path)
        stage = GistStage.load_from_checkpoint(path, base={"name": str(base.with_name("moved")), "dtype": None})
    finally:
        base.with_name("moved").rename(base)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(stage.state_dict()[name], value) for name, value in saved.items())
