import os
import pickle
import time

import lightning
import pytest
import torch
from omegaconf import OmegaConf

from megactx.framework.config.search_path import compose
from megactx.framework.run.curriculum import changed, stage_config
from megactx.framework.run.resume import (
    check_accumulation,
    check_fits,
    check_source,
    differences,
    differing,
    find,
    plain,
    read,
)


class Net(lightning.LightningModule):
    def __init__(self, width: int):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, width)


def config(folder, *overrides):
    cfg = compose(["experiment=base_lm", "data=files", "data.path=x", f"folder={folder}", *overrides])
    OmegaConf.set_struct(cfg, False)
    return cfg


def leave_a_run(folder, *overrides):
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": {}, "hyper_parameters": {}}, folder / "checkpoints" / "last.ckpt")
    OmegaConf.save(OmegaConf.create(plain(config(folder, *overrides))), folder / "config.yaml")
    return folder


def test_never_starts_fresh_whatever_lies_there(tmp_path):
    leave_a_run(tmp_path / "old")
    assert find(config(tmp_path / "new"), tmp_path / "new") == (None, tmp_path / "new")


def test_auto_takes_the_newest_unfinished_run_of_the_same_settings(tmp_path):
    for name in ("a", "b", "c", "d"):
        leave_a_run(tmp_path / name, *(["seed=1"] if name == "c" else []))
        os.utime(tmp_path / name / "checkpoints" / "last.ckpt", (time.time(), time.time() + ord(name)))
    (tmp_path / "d" / "done").touch()  # finished; c has another seed
    checkpoint, folder = find(config(tmp_path / "new", "resume=auto"), tmp_path / "new")
    assert folder == tmp_path / "b" and checkpoint == folder / "checkpoints" / "last.ckpt"


def test_auto_lets_the_length_the_logger_and_the_folder_differ(tmp_path):
    run = leave_a_run(tmp_path / "old")
    assert differing(config(tmp_path / "new", "resume=auto", "preset.steps=9999", "logger=tensorboard"), run) == []


def test_a_result_is_that_of_all_settings_and_of_the_length(tmp_path):
    run = leave_a_run(tmp_path / "old")
    same = ["resume=auto", "logger=none", "name=other"]
    assert changed(config(tmp_path / "new", *same), [], run) == []
    assert changed(config(tmp_path / "new", "stage.muon_lr=0.5"), [], run) == ["stage.muon_lr: 0.015 -> 0.5"]
    assert "preset.steps: 4900 -> 9999" in changed(config(tmp_path / "new", "preset.steps=9999"), [], run)


@pytest.mark.slow
def test_a_curriculum_that_is_done_is_that_of_its_stages_settings(tmp_path):
    def whole(*overrides) -> tuple:
        cfg = compose(["experiment=curriculum", f"folder={tmp_path}", *overrides])
        OmegaConf.set_struct(cfg, False)
        return cfg, ["experiment=curriculum", *overrides]

    cfg, overrides = whole()
    OmegaConf.save(OmegaConf.create(plain(cfg)), tmp_path / "config.yaml")
    for name in cfg.curriculum:
        (tmp_path / name).mkdir()
        stage, _ = stage_config(name, overrides, tmp_path)
        stage.stage.init = "where the stage before ended"
        OmegaConf.save(OmegaConf.create(plain(stage)), tmp_path / name / "config.yaml")
    assert changed(cfg, overrides, tmp_path) == []
    edited = OmegaConf.load(tmp_path / "gist_stage2" / "config.yaml")
    edited.gistnet.dropout = edited.stage.gistnet.dropout = 0.3  # as if the experiment's file had said so then
    OmegaConf.save(edited, tmp_path / "gist_stage2" / "config.yaml")
    assert changed(cfg, overrides, tmp_path)[0] == "gist_stage2: gistnet.dropout: 0.3 -> 0.1"


def test_auto_starts_fresh_where_there_is_none_and_says_so(tmp_path, caplog):
    caplog.set_level("INFO")
    assert find(config(tmp_path / "new", "resume=auto"), tmp_path / "new") == (None, tmp_path / "new")
    assert "starting fresh" in caplog.text


def test_auto_with_a_folder_of_ones_own_looks_nowhere_else(tmp_path):
    leave_a_run(tmp_path / "other", "seed=1")  # unfinished, in the same place
    new = tmp_path / "new"
    assert find(config(new, "resume=auto"), new, named=True) == (None, new)
    leave_a_run(new)
    assert find(config(new, "resume=auto"), new, named=True) == (new / "checkpoints" / "last.ckpt", new)
    with pytest.raises(ValueError, match="new was begun with other settings: .*seed: 0 -> 2"):
        find(config(new, "resume=auto", "seed=2"), new, named=True)


def test_auto_stops_at_a_near_miss_and_names_the_settings_that_differ(tmp_path):
    leave_a_run(tmp_path / "old")
    cfg = config(tmp_path / "new", "resume=auto", "stage.muon_lr=0.5", "+stage.config.attention_bias=true")
    with pytest.raises(ValueError) as error:
        find(cfg, tmp_path / "new")
    assert "stage.muon_lr: 0.015 -> 0.5" in str(error.value)
    assert "stage.config.attention_bias: (unset) -> True" in str(error.value)


def test_a_missing_path_is_an_error_and_a_run_folder_means_its_last_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="resume=.*nowhere"):
        find(config(tmp_path / "new", f"resume={tmp_path / 'nowhere'}"), tmp_path / "new")
    run = leave_a_run(tmp_path / "old")
    checkpoint, folder = find(config(tmp_path / "new", f"resume={run}"), tmp_path / "new")
    assert checkpoint == run / "checkpoints" / "last.ckpt" and folder == tmp_path / "new"


def test_a_pickle_payload_is_refused_and_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for save, name in ((torch.save, "zip.ckpt"), (lambda o, p: p.write_bytes(pickle.dumps(o)), "raw.ckpt")):
        save({"state_dict": {}, "hyper_parameters": Payload()}, tmp_path / name)
        with pytest.raises(ValueError, match="resume=.*(refused|no checkpoint)"):
            read(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut off"])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="resume=.*x.ckpt"):
        read(tmp_path / "x.ckpt")


def test_a_checkpoint_of_another_architecture_is_refused_with_the_settings_named(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": Net(4).state_dict(), "hyper_parameters": {"width": 4}}, path)
    assert check_fits(Net(4), path)["hyper_parameters"] == {"width": 4}
    with pytest.raises(ValueError, match=r"stage.width: 4 -> 8.*layer.*\(4.*\(8"):
        check_fits(Net(8), path)
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 4}}, path)
    with pytest.raises(ValueError, match="another stage: only there lr; only here width"):
        check_fits(Net(8), path)


def test_another_accumulation_is_refused_with_the_one_that_fits():
    saved = {"config": {"trainer": {"accumulate_grad_batches": 4}}}
    check_accumulation(saved, {"trainer": {"accumulate_grad_batches": 4}})
    check_accumulation({}, {"trainer": {"accumulate_grad_batches": 2}})  # it does not say
    with pytest.raises(ValueError, match="preset.accumulate=2.*written with 4"):
        check_accumulation(saved, {"trainer": {"accumulate_grad_batches": 2}})


def test_changed_texts_are_refused_where_a_run_goes_on_by_itself_and_told_where_a_path_asks_for_it():
    saved = {"source": "then"}
    for resume in ("auto", "never"):  # never: a job of a sweep, a stage of a curriculum
        assert check_source(saved, "then", resume) is None
        with pytest.raises(ValueError, match="texts of data.source have changed .* then, now other"):
            check_source(saved, "other", resume)
    assert "then -> other" in check_source(saved, "other", "runs/a")
    assert check_source({}, "other", "auto") is None  # an older checkpoint does not know


def test_a_class_of_the_framework_that_has_moved_is_the_same_class():
    def lines(then: str, now: str) -> list[str]:
        return differences({"callbacks": {"best": {"_target_": then}}}, {"callbacks": {"best": {"_target_": now}}})

    here = "megactx.framework.callbacks.checkpoints.Best"
    assert not lines("megactx.framework.checkpoints.Best", here)
    assert lines("megactx.framework.checkpoints.Newest", here) and lines("mine.checkpoints.Best", here)
