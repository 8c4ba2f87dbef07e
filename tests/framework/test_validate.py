import os
from functools import cache

import pytest
from omegaconf import OmegaConf

from megactx.framework.config.search_path import compose
from megactx.framework.config.validate import _special, locate, validate


@cache
def parts(groups):
    return compose(["data=files", *groups])


def problems(*overrides: str, groups: tuple[str, ...] = ()) -> list[str]:
    start = ["data=files", "data.path=x", *groups]
    cfg = compose([*start, *overrides])
    OmegaConf.set_struct(cfg, False)
    try:
        validate(cfg, parts(groups))
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
        ("gistnet.dropout=1.5", "a number from 0, below 1"),
        ("contrastive.weight=-1", "a number from 0"),
        ("data.weights.code=-0.5", "a number from 0 or null"),
    ],
)
def test_a_value_out_of_range_is_told_with_what_is_allowed(override, allowed):
    assert f"{override}: allowed is {allowed}" in problems(override)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        # numbers
        ("stage.lr=abc", "stage.lr=abc: allowed is a number from 0"),
        ("stage.lr=-1", "stage.lr=-1: allowed is a number from 0"),
        ("stage.lr=nan", "stage.lr=nan: allowed is a number from 0"),
        ("contrastive.weight=inf", "contrastive.weight=inf: allowed is a number from 0"),
        ("preset.steps=null", "preset.steps=null: allowed is a whole number from 1"),
        ("preset.steps=true", "preset.steps=True: allowed is a whole number from 1"),
        ("preset.steps=[1]", "preset.steps=[1]: allowed is a whole number from 1"),
        ("horizon.tokens='32'", "horizon.tokens=32: allowed is a whole number from 1"),
        ("stage.evaluate.blocks=0", "stage.evaluate.blocks=0: allowed is a whole number from 1"),
        ("+stage.targets.dnll=low", "stage.targets.dnll=low: allowed is a number"),
        ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1: allowed is a number from 0"),
        # by the annotation of the argument
        ("callbacks.progress.every=often", "callbacks.progress.every=often: allowed is a whole number"),
        ("+trainer.limit_val_batches=few", "allowed is a whole number or a number or null"),
        ("loss.block.objective=5", "loss.block.objective=5: allowed is kl or delta_nll"),
        ("stage.controls=5", "stage.controls=5: allowed is a mapping"),
        ("logger.csv.folder=null", "logger.csv.folder=null: allowed is text"),
        # by the value that is replaced
        ("gistnet.head=[mlp]", "gistnet.head=['mlp']: allowed is text"),
        ("data.text_column=7", "data.text_column=7: allowed is text"),
        ("data.weights=5", "data.weights=5: allowed is a mapping"),
        ("name=null", "name=null: it needs a value"),
        # keys below a target, and below what is taken from elsewhere
        ("+stage.evaluate.block=3", "stage.evaluate.block: no such setting. Did you mean stage.evaluate.blocks?"),
        ("+loss.contrastive.wieght=1", "loss.contrastive.wieght: no such setting."),
        (
            "+stage.controls.mine={tpye: mean}",
            "stage.controls.mine.tpye: a GistNet has no such setting. Did you mean type?",
        ),
        ("+data.weights.prose=1", "data.weights.prose: no such setting."),
        (
            "+callbacks.speed.every=3",
            "callbacks.speed.every: megactx.framework.callbacks.throughput.Throughput takes no such",
        ),
        ("+stage._partial_=true", "stage._partial_: megactx.stages.gist.GistStage takes no such setting."),
        # places
        ("+callbacks.x={_target_: torch.nn.ReLU}", "callbacks.x._target_: torch.nn.ReLU is no Callback"),
        ("+logger.x={_target_: lightning.pytorch.callbacks.Timer}", "callbacks.Timer is no Logger"),
        ("trainer._target_=torch.nn.ReLU", "trainer._target_: torch.nn.ReLU is no Trainer"),
        ("callbacks.speed=5", "callbacks.speed=5: allowed is a mapping with a _target_, or null to leave it out"),
        ("+trainer.logger=false", "trainer.logger: it says nothing here; the group logger decides"),
        ("logger=[]", "logger: it is gone; logger=none leaves it out"),
        ("stage.evaluate.path=nowhere.txt", "stage.evaluate.path=nowhere.txt: no such file or folder"),
    ],
)
def test_what_would_fail_later_or_be_ignored_is_told_once(override, told):
    (line,) = problems(override)
    assert told in line


@pytest.mark.parametrize(
    "override",
    [
        "callbacks.speed=null",
        "stage.controls={}",
        "stage.controls.blockmean_linear=null",
        "+stage.controls.mine={type: mean, head: mlp}",
        "+stage.targets.dnll=0.5",
        "stage.muon_lr=null",
        "stage.lr=1",
        "data.weights.code=null",
        "preset.max_tokens=null",
        "trainer.precision=bf16-true",
        "+trainer.deterministic=warn",
        "+trainer.max_time={hours: 1}",
        "name=5",
        "callbacks=full",
        "logger=wandb",
        "debug=trace",
    ],
)
def test_what_is_right_passes(override):
    groups = (override,) if override.startswith(("callbacks=", "logger=", "debug=")) else ()
    assert problems(override, groups=groups) == []


def test_an_experiment_file_with_mistakes_is_refused_before_anything_is_built(tmp_path, capsys):
    from megactx.framework.app import run

    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [demo]\n"
        "preset: {stepps: 5, batch: many}\n"
        "gistnet: {haed: mlp}\n"
        "callbacks: {stop: {_target_: lightning.pytorch.callbacks.EarlyStoping}}\n"
    )
    assert run(["--config-dir", str(tmp_path), "experiment=mine", f"folder={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert "Did you mean preset.steps?" in said and "preset.batch=many: allowed is a whole number from 1" in said
    assert "Did you mean gistnet.head?" in said and "Did you mean EarlyStopping?" in said
    assert len(said.strip().splitlines()) == 4 and not (tmp_path / "run").exists()


def test_a_path_to_report_on_may_have_a_literal_name_with_pattern_characters(tmp_path):
    (tmp_path / "a[1].txt").write_text("x")
    problems = []
    _special({"stage": {"evaluate": {"path": str(tmp_path / "a[1].txt")}}}, problems)
    _special({"stage": {"evaluate": {"path": str(tmp_path / "a[2].txt")}}}, problems)
    assert len(problems) == 1 and "a[2].txt" in problems[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["preset.steps=2", "preset.warmup=1", "preset.validate_every=1", "trainer.max_steps=3"], "runs over 2 steps"),
        (["trainer.accumulate_grad_batches=2"], "set preset.accumulate, which is for all of them"),
        (["trainer.val_check_interval=3"], "set preset.validate_every, which is for all of them"),
        (["preset.steps=20", "preset.warmup=5", "preset.validate_every=21"], "preset.validate_every=21 is beyond"),
        (["preset.steps=20", "preset.validate_every=10"], "preset.warmup=1000 is beyond preset.steps=20"),
        (["~trainer.max_steps"], "trainer.max_steps: it is gone"),
        (["name=''"], "name=: it is empty"),
        (["data.text_column=''"], "data.text_column=: it is empty"),
        (["base.name='  '"], "base.name=  : it is empty"),
    ],
)
def test_settings_that_contradict_each_other_or_say_nothing_are_refused(overrides, said):
    assert any(said in problem for problem in problems(*overrides, groups=("stage=gist",))), problems(*overrides)


def test_steps_that_fit_each_other_pass():
    fits = ["preset.steps=20", "preset.warmup=20", "preset.validate_every=20"]
    assert problems(*fits) == []
    assert problems("preset.validate_every=30", *fits[:2], "+trainer.limit_val_batches=0") == []


def test_the_parts_of_an_alternating_run_warm_up_over_their_own_steps():
    cfg = compose(["experiment=alternating", "preset=demo", "stage.steps.lora=2", "stage.cycles=3"])
    OmegaConf.set_struct(cfg, False)
    with pytest.raises(ValueError, match="preset.warmup=30 is beyond stage.cycles x stage.steps.lora=6"):
        validate(cfg, compose(["stage=alternating", "preset=demo"]))
