import os

import pytest
from omegaconf import OmegaConf

from megactx.framework.search_path import compose
from megactx.framework.validate import locate, validate


def problems(*overrides: str, groups: tuple[str, ...] = ()) -> list[str]:
    start = ["data=files", "data.path=x", *groups]
    cfg = compose([*start, *overrides])
    OmegaConf.set_struct(cfg, False)
    try:
        validate(cfg, compose(["data=files", *groups]))
    except ValueError as error:
        return str(error).splitlines()
    return []


def test_the_composed_defaults_and_legitimate_additions_pass():
    assert problems() == []
    assert problems("+trainer.limit_val_batches=2", "+callbacks.lr={_target_: lightning.pytorch.callbacks.Timer}") == []


def test_all_problems_are_told_at_once():
    told = problems("+lrr=1", "+gistnet.haed=mlp", "preset.batch=0", "+stage.horizn=1", "seed=-1")
    assert len(told) == 5


def test_a_misspelt_key_of_a_part_is_told_with_what_was_meant():
    assert problems("+gistnet.haed=mlp") == ["gistnet.haed: no such setting. Did you mean gistnet.head?"]
    assert problems("+preset.step=4") == ["preset.step: no such setting. Did you mean preset.steps?"]
    assert problems("+callbacks.progres.every=2")[0].startswith("callbacks.progres: no such setting.")


def test_a_misspelt_argument_of_a_target_is_told_with_what_was_meant():
    (told,) = problems("+trainer.max_step=1")
    assert "lightning.Trainer takes no such setting" in told and "Did you mean trainer.max_steps?" in told


def test_a_target_that_lacks_an_argument_is_told():
    (told,) = problems("+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping}")
    assert told == "callbacks.stop.monitor: lightning.pytorch.callbacks.EarlyStopping needs it"


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.exec",
        "torch.os.system",
        "torch.load",
        "torch.hub.load",
        "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
        "megactx.framework.app.os.system",
        "lightning.pytorch.trainer.trainer.os.system",
        "megactx",
    ],
)
def test_a_target_outside_of_models_and_training_is_refused(target):
    with pytest.raises(ValueError, match="not allowed"):
        locate(target)


def test_a_refused_target_is_not_executed(tmp_path):
    mark = tmp_path / "mark"
    told = problems(f"+callbacks.bad={{_target_: os.system, command: 'touch {mark}'}}", "stage._target_=os.getcwd")
    assert any("os.system is not allowed" in line for line in told)
    assert any("os.getcwd is not allowed" in line for line in told)
    assert not mark.exists() and os.getcwd()


def test_a_target_that_does_not_exist_is_told_with_what_was_meant():
    with pytest.raises(ValueError, match="Did you mean ModelCheckpoint"):
        locate("lightning.pytorch.callbacks.ModelCheckpoints")


def test_a_setting_without_a_value_is_told():
    (told,) = problems(groups=("base=hf",))
    assert told == "base.name: it has no value yet; set base.name=..."


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("preset.steps=abc", "a whole number from 1"),
        ("preset.batch=1.5", "a whole number from 1"),
        ("horizon.tokens=0", "a whole number from 1"),
        ("gistnet.dropout=1.5", "a number from 0 to 1"),
        ("contrastive.weight=-1", "a number from 0"),
        ("data.weights.code=-0.5", "a number from 0"),
    ],
)
def test_a_value_out_of_range_is_told_with_what_is_allowed(override, allowed):
    assert f"{override}: allowed is {allowed}" in problems(override)
