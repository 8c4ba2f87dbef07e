"""The operations of the stages that read windows, against numbers that were reckoned by hand."""

import pytest
import torch

from megactx.framework.app import run
from megactx.framework.callbacks import throughput
from megactx.stages.window_work import WindowWork

# P = 100, V D = 50, L A = 8; a block of 4 costs 7; LensNet has 30 weights and l D = 6.
WORK = WindowWork(100, 50, 8, 7, 4, 30, 6)


def test_operations_of_windows_are_those_reckoned_by_hand():
    assert WORK.rows(3, before=5) == 2 * 100 * 3 + 4 * 8 * (6 + 7 + 8)  # columns that each row sees, itself included
    assert WORK.tree(70) == 7 * (17 + 4 + 1)
    assert WORK.full(9, 2) == 2 * 100 * 10 + 4 * 8 * 55 + 2 * 50 * 2
    assert WORK.window(4, 2) == 2 * (2 * 100 * 5 + 4 * 8 * 15 + 2 * 50 * 2)
    assert WORK.shown({1: 3, 2: 2}) == 3 * 7 * (3 + 2 * 5)
    assert WORK.lensnet(2, 10) == 2 * (2 * 30 * 10 + 4 * 6 * 100)
    window = 2 * 100 * 5 + 4 * 8 * 15 + 2 * 50 * 2
    edit = 2 * 100 * 4 + 4 * 8 * (3 + 4 + 5 + 6) + 2 * 50 * 2
    assert WORK.measured(16, 2, 4, 3) == 7 * 5 + window + 3 * edit


@pytest.mark.parametrize("experiment", ["end_to_end", "alternating"])
def test_a_stage_that_reads_windows_has_an_mfu(joint_settings, tmp_path, monkeypatch, experiment):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    found = []

    def setup(self, trainer, pl_module, stage):
        self.peak = 1e12

    def kept(self, processes):
        found.append(float(self.flops))
        return {}

    monkeypatch.setattr(throughput.Throughput, "setup", setup)
    monkeypatch.setattr(throughput.Throughput, "_values", kept)
    monkeypatch.setattr("megactx.stages.joint.JointStage.finish", lambda *_: None)
    more = ["preset.steps=2", "preset.validate_every=2"] if experiment == "end_to_end" else []
    if experiment == "alternating":
        more = ["stage.cycles=1", "stage.steps={gist:1,lens:1,lora:1}", "stage.windows.per_round=2"]
        more += ["stage.windows.edits=2", "preset.validate_every=3", "datamodule.spans=2"]
    assert run([f"experiment={experiment}", *joint_settings, *more, f"folder={tmp_path / 'a'}"]) == 0
    assert len(found) == (2 if experiment == "end_to_end" else 3) and min(found) > 1e6
