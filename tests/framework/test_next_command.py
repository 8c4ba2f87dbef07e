"""What a run prints as the next command can be pasted: it has what the run had, quoted for the shell."""

import shlex

import pytest
from omegaconf import OmegaConf

from megactx.framework.config.search_path import compose
from megactx.framework.run.next_command import next_command, setting
from megactx.framework.run.resume import plain
from megactx.stages.gist import following


def left(folder, overrides: list[str], choices: dict, **more) -> None:
    """The record of a run, as it leaves it in its folder."""
    OmegaConf.save(
        OmegaConf.create({"command": ["python", "train.py", *overrides], "choices": choices}), folder / "run.yaml"
    )
    cfg = compose([*overrides, *more.pop("elsewhere", [])])
    OmegaConf.set_struct(cfg, False)
    OmegaConf.save(OmegaConf.create(plain(cfg)), folder / "config.yaml")


def test_the_next_command_keeps_base_data_preset_and_seed_of_the_run(tmp_path):
    path = tmp_path / "my texts, 'old' ones"
    overrides = ["experiment=demo", "base=hf", "base.name=my/model", "data=files", setting("data.path", path)]
    overrides += [
        "data.weights={narrative: 1, code: 0, structured: 0}",
        "preset.steps=40",
        "gistnet.num_heads=4",
        "seed=3",
    ]
    left(tmp_path, overrides, {"base": "hf", "data": "files", "preset": "demo", "trainer": "auto", "stage": "gist"})
    command = next_command(tmp_path, "gist_stage2", {"stage.init": tmp_path})
    words = shlex.split(command)
    assert words[:3] == ["python", "train.py", "experiment=gist_stage2"]
    cfg = compose(words[2:])
    assert cfg.base.name == "my/model" and cfg.base.dtype == "bfloat16" and cfg.data.path == str(path)
    assert cfg.preset.steps == 40 and cfg.preset.warmup == 30 and cfg.gistnet.num_heads == 4
    assert dict(cfg.data.weights) == {"narrative": 1, "code": 0, "structured": 0}
    assert cfg.stage.init == str(tmp_path) and cfg.seed == 3 and cfg.horizon.tokens == 64


def test_what_comes_behind_a_run_in_miniature_is_one_too(tmp_path):
    left(tmp_path, ["experiment=demo", "debug=limit"], {"preset": "demo", "stage": "gist", "debug": "limit"})
    assert "debug=limit" in shlex.split(next_command(tmp_path, "gist_stage2", {"stage.init": tmp_path}))


def test_what_goes_on_from_the_weights_has_the_losses_of_the_run(tmp_path):
    overrides = ["experiment=demo", "loss=[block,reconstruction]", "loss.reconstruction.weight=0.2"]
    left(tmp_path, overrides, {"preset": "demo", "stage": "gist"})
    cfg = compose(shlex.split(next_command(tmp_path, "gist_stage2", {"stage.init": tmp_path}))[2:])
    assert sorted(cfg.loss) == ["block", "reconstruction"] and cfg.loss.reconstruction.weight == 0.2


def test_a_base_and_data_that_an_experiment_has_set_in_its_own_file_are_kept_too(tmp_path):
    elsewhere = ["base=hf", "base.name=my/model", "data=files", "data.path=x"]
    choices = {"base": "hf", "data": "files", "preset": "full"}
    left(tmp_path, ["experiment=gist_stage1"], choices, elsewhere=elsewhere)
    cfg = compose(shlex.split(next_command(tmp_path, "gist_stage2", {}))[2:])
    assert cfg.base.name == "my/model" and cfg.data.path == "x"
    assert cfg.data.weights.code == 0.6  # the next stage's own


def test_a_secret_is_in_no_command_and_a_folder_without_a_record_gives_a_plain_one(tmp_path):
    assert (
        next_command(tmp_path, "demo", {"base.name": "a b"})
        == """python train.py experiment=demo 'base.name='"'"'a b'"'"''"""
    )
    left(tmp_path, ["experiment=demo"], {})
    run = OmegaConf.load(tmp_path / "run.yaml")
    run.command.append("+data.api_key=(hidden)")
    OmegaConf.save(run, tmp_path / "run.yaml")
    assert "hidden" not in next_command(tmp_path, "demo", {})


@pytest.mark.parametrize(
    "value", ["a b", "x,y", "it's", "a=b", "[1]", "null", "12", "c:\\d", "$HOME", "a#b", "é", "", "~/x", "a/b.c"]
)
def test_a_setting_is_read_again_as_it_was(value):
    cfg = compose(["data=files", *shlex.split(shlex.join([setting("data.path", value)]))])
    assert cfg.data.path == value


@pytest.mark.parametrize(
    ("experiment", "behind", "takes"),
    [
        ("demo", "gist_stage2", "stage.init"),
        ("gist_stage1", "gist_stage2", "stage.init"),
        ("gist_stage2", "gist_stage3", "stage.init"),
        ("gist_stage3", "lens", "stage.gistnet"),
    ],
)
def test_behind_a_stage_of_the_curriculum_comes_the_next_one(experiment, behind, takes, tmp_path):
    overrides = [f"experiment={experiment}", "preset=demo", "seed=3", "gistnet.num_heads=4"]
    left(tmp_path, overrides, {"experiment": experiment, "preset": "demo", "stage": "gist"})
    words = shlex.split(following(tmp_path))
    assert words[2] == f"experiment={behind}" and f"{takes}={tmp_path}" in words
    cfg = compose(words[2:])
    assert cfg.seed == 3 and ("gistnet.num_heads=4" in words) == (takes == "stage.init")
