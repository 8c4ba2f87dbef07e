"""What studies read: two short runs of a gist stage, one of them trained, and small models in memory and exported."""

import shutil

import pytest
import torch
import yaml

from megactx.focus import LensNet
from megactx.framework.app import run
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.parts.write import save_gistnet, save_lensnet
from megactx.runtime import Models

K = 4
GISTNET = dict(block_size=K, num_heads=4, skip="none")
LENSNET = dict(layers=1, num_heads=4)
SMALL = ["block_size=8", "preset.steps=2", "preset.min_tokens=200", "preset.max_tokens=256"]
SMALL += ["stage.evaluate.blocks=6", "stage.evaluate.copies=0", "stage.evaluate.controls=false"]
SMALL += ["loss.history.recency=48"]


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


@pytest.fixture(scope="session")
def models(base_folder):
    base = BaseLM.from_pretrained(str(base_folder), "float32").freeze()  # takes 512 positions
    torch.manual_seed(0)
    gistnet = GistNet(base.width, base.embedding_rms(), **GISTNET).eval().requires_grad_(False)
    lensnet = LensNet(base.width, K, **LENSNET).eval().requires_grad_(False)
    torch.nn.init.normal_(lensnet.last.weight, std=0.05)
    return Models(base, gistnet, lensnet, "small")


@pytest.fixture(scope="session")
def exported(models, tmp_path_factory):
    """A folder that the command takes; without the LensNet, which lies beside it."""
    folder = tmp_path_factory.mktemp("length") / "models"
    models.base.model.save_pretrained(folder)
    models.base.tokenizer.save_pretrained(folder)
    save_gistnet(models.gistnet, GISTNET, models.base, folder / "gistnet")
    save_lensnet(models.lensnet, LENSNET, models.gistnet, folder.parent / "lensnet")
    return folder
