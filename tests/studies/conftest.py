"""Two short runs of a gist stage, one of them trained, for the studies that read runs."""

import shutil

import pytest
import torch
import yaml

from megactx.framework.app import run

SMALL = ["block_size=8", "preset.steps=2", "preset.min_tokens=200", "preset.max_tokens=256"]
SMALL += ["stage.evaluate.blocks=6", "stage.evaluate.copies=0", "stage.evaluate.controls=false"]


@pytest.fixture(scope="session")
def trained_runs(gist_settings, tmp_path_factory):
    """Folders ``prose`` and ``code``, blocks of 8 tokens; the second is the first with other weights and shares."""
    folder = tmp_path_factory.mktemp("trained")
    prose, code = folder / "prose", folder / "code"
    own = [o for o in gist_settings if not o.startswith(("preset.steps", "preset.m", "data.weights", "stage."))]
    assert run([*own, *SMALL, "data.weights={narrative: 1, code: 0, structured: 0}", f"folder={prose}"]) == 0
    shutil.copytree(prose, code)
    config = yaml.safe_load((code / "config.yaml").read_text())
    config["data"]["weights"] = {"narrative": 0.0, "code": 1.0, "structured": 0.0}
    (code / "config.yaml").write_text(yaml.safe_dump(config))
    path = code / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    for value in checkpoint["state_dict"].values():
        value += 0.3 * torch.randn_like(value)
    torch.save(checkpoint, path)
    return [prose, code]
