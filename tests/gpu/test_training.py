"""Steps of real recipes: in mixed precision on one device, and shared by two."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from hydra.utils import instantiate

from megactx.framework.config.search_path import compose

REPOSITORY = Path(__file__).parents[2]


def test_a_step_of_the_demo_in_bf16_mixed_moves_every_net_and_not_the_base(device, gist_settings):
    cfg = compose([s for s in gist_settings if not s.startswith("trainer")])
    stage, data = (instantiate(part, _convert_="all") for part in (cfg.stage, cfg.datamodule))
    stage.prepare(data)
    before = {name: p.detach().clone() for name, p in stage.named_parameters()}
    trainer = lightning.Trainer(
        accelerator=device, devices=1, precision="bf16-mixed", max_steps=2, limit_val_batches=0, barebones=True
    )
    trainer.fit(stage, data)
    assert trainer.global_step == 2
    assert {p.dtype for p in stage.nets.parameters()} == {torch.float32} and stage.base.model.dtype == torch.bfloat16
    for name, p in stage.named_parameters():
        if name.startswith("base."):
            assert torch.equal(p.cpu(), before[name].to(torch.bfloat16)), name
    for net in stage.nets:
        moved = [
            n for n, p in stage.nets[net].named_parameters() if not torch.equal(p.cpu(), before[f"nets.{net}.{n}"])
        ]
        assert moved and all(torch.isfinite(p).all() for p in stage.nets[net].parameters())


@pytest.mark.long
def test_two_devices_that_share_the_base_learn_what_one_learns(device, gist_settings, tmp_path):
    # NCCL takes no two processes on one card: there it is one process, whose layers are cut into one part.
    count = 2 if device == "cpu" else min(2, torch.cuda.device_count())
    kept = [s for s in gist_settings if s != "trainer=cpu"]
    kept += ["preset.batch=1", "preset.steps=3", "preset.validate_every=3", "stage.evaluate.controls=false"]
    kept += ["stage.evaluate.copies=0", "trainer.log_every_n_steps=1", f"trainer.accelerator={device}"]
    ways = {"one": ["preset.accumulate=2"], "two": ["trainer=fsdp", f"trainer.devices={count}"]}
    ways["two"] += [f"preset.accumulate={2 // count}"]
    found = {}
    for name, way in ways.items():
        command = [sys.executable, "train.py", *kept, *way, f"folder={tmp_path / name}"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            found[name] = [float(row["val/dnll"]) for row in csv.DictReader(file) if row["val/dnll"]]
    # Muon orthogonalises in bf16 on a card, where another order of a sum shows more.
    near = {"cpu": 1e-4, "cuda": 1e-2}[device]
    assert len(found["one"]) == 1 and found["two"] == pytest.approx(found["one"], rel=near)
