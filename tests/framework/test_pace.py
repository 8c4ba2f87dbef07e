"""A preset with a time: how many steps a run has is measured once, and then stands."""

import json

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from megactx.framework.app import run
from megactx.framework.config.search_path import compose
from megactx.framework.run import pace
from megactx.framework.run.device import Device


@pytest.fixture
def timed(gist_settings, monkeypatch):
    """Overrides of a gist run whose steps its minutes decide: two seconds a step, four a validation."""
    tried = []

    def try_steps(cfg, device):
        tried.append(cfg.preset.minutes)
        return 2.0, 4.0

    monkeypatch.setattr(pace, "_try", try_steps)
    lengths = ("preset.steps", "preset.warmup", "preset.validate_every", "preset.plateau_window")
    settings = [o for o in gist_settings if not o.startswith(lengths)]
    return [*settings, "preset.minutes=0.5"], tried


def preset(folder) -> dict:
    return OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))["preset"]


@pytest.mark.slow
def test_minutes_become_steps_and_warmup_validation_and_plateau_keep_their_share(timed, tmp_path, capsys):
    settings, _ = timed
    assert run([*settings, f"folder={tmp_path / 'a'}"]) == 0
    # 30 s less five validations of 4 s leave 10 s: five steps; 540 steps had 30 of warm-up and a validation each 108.
    expected = {"minutes": 0.5, "steps": 5, "warmup": 1, "validate_every": 1, "plateau_window": 5}
    assert {key: preset(tmp_path / "a")[key] for key in expected} == expected
    shown = capsys.readouterr().out
    assert "preset.minutes=0.5: a step takes 2.00 s here, a validation 4.0 s: so preset.steps=5" in shown
    assert "preset.minutes=0.5 gave 5 of 540 steps on this machine" in shown.partition("In short")[2], "said at the end"
    last = torch.load(tmp_path / "a" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 5 and last["config"]["preset"]["steps"] == 5


@pytest.mark.slow
def test_a_resumed_run_has_the_steps_that_it_began_with_whatever_the_machine_does_now(timed, tmp_path, monkeypatch):
    settings, tried = timed
    assert run([*settings, f"folder={tmp_path / 'a'}"]) == 0
    (tmp_path / "a" / "done").unlink()
    monkeypatch.setattr(pace, "_try", lambda cfg, device: (0.1, 0.1))
    assert run([*settings, f"folder={tmp_path / 'a'}", "resume=auto"]) == 0
    assert preset(tmp_path / "a")["steps"] == 5
    assert len(tried) == 1


def test_a_run_that_is_made_longer_by_hand_keeps_what_had_a_share_of_its_steps():
    cfg = compose(["experiment=demo", "preset.steps=600"])
    OmegaConf.set_struct(cfg, False)
    before = {"preset": {"minutes": 5, "steps": 200, "warmup": 11, "validate_every": 40, "plateau_window": 200}}
    pace.settle(cfg, ["preset.steps=600"], compose(["preset=demo"]), before, None, None)
    assert (cfg.preset.steps, cfg.preset.warmup, cfg.preset.validate_every) == (600, 11, 40)
    assert cfg.preset.minutes is None and cfg.stage.warmup == 11


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (["experiment=run10_base"], 720),  # an experiment with minutes of its own: its steps are the most
        (["experiment=run10_base", "preset.minutes=5"], 200),
        (["experiment=run10_base", "preset.minutes=null"], 1600),
        (["experiment=base_lm"], 4900),  # it counts steps, whatever minutes the group has
        (["experiment=base_lm", "preset.minutes=5"], 192),  # whole intervals
        (["experiment=run10_base", "preset=smoke"], 4),
    ],
)
def test_base_training_has_a_time_where_minutes_are_asked_for_and_its_phases_keep_their_shares(
    monkeypatch, arguments, steps
):
    monkeypatch.setattr(pace, "_try", lambda cfg, device: (1.5, 0.0))
    arguments = arguments if "preset=smoke" in arguments else [*arguments, "preset=demo"]
    cfg = compose(arguments)
    OmegaConf.set_struct(cfg, False)
    most, phases = cfg.preset.steps, [phase.steps for phase in cfg.datamodule.phases]
    pace.settle(cfg, arguments, compose(["stage=base_lm", arguments[-1]]), None, None, None)
    assert cfg.preset.steps == cfg.stage.max_steps == steps
    share = steps / most
    assert [phase.steps for phase in cfg.datamodule.phases] == [max(1, round(n * share)) for n in phases]
    assert cfg.preset.validate_every == max(1, round(compose(arguments).preset.validate_every * share))
    assert (cfg.preset.minutes is None) == (share == 1)


@pytest.mark.slow
def test_jobs_of_a_sweep_all_have_the_steps_of_the_first(timed, tmp_path):
    settings, tried = timed
    assert run(["-m", *settings, f"hydra.sweep.dir={tmp_path}", "seed=0,1"]) == 0
    assert [preset(path.parent)["steps"] for path in tmp_path.glob("*/done")] == [5, 5]
    assert len(tried) == 1
    (known,) = json.loads((tmp_path / "lengths.json").read_text()).values()
    assert known["preset.steps"] == 5


@pytest.mark.slow
def test_steps_given_by_hand_win_over_the_presets_minutes_and_both_by_hand_are_refused(timed, tmp_path, capsys):
    settings, tried = timed
    rest = [o for o in settings if not o.startswith("preset.minutes")]
    assert run([*rest, "preset.steps=4", "preset.validate_every=2", "preset.warmup=1", f"folder={tmp_path / 'a'}"]) == 0
    assert not tried and preset(tmp_path / "a")["steps"] == 4 and preset(tmp_path / "a")["minutes"] is None
    assert run([*settings, "preset.steps=4", f"folder={tmp_path / 'b'}"]) == 2
    assert "preset.minutes=0.5 and preset.steps are not allowed together" in capsys.readouterr().err


def test_minutes_that_say_nothing_are_refused(capsys):
    assert run(["experiment=alternating", "preset=demo", "preset.minutes=3"]) == 2
    assert "preset.minutes=3 says nothing here" in capsys.readouterr().err


@pytest.mark.slow
def test_the_first_steps_are_really_timed_and_change_nothing_in_the_run(gist_settings, tmp_path, capsys):
    lengths = ("preset.steps", "preset.warmup", "preset.validate_every", "preset.plateau_window")
    settings = [o for o in gist_settings if not o.startswith(lengths)]
    assert run([*settings, "preset.minutes=0.1", f"folder={tmp_path / 'a'}"]) == 0
    found = preset(tmp_path / "a")
    assert "a step takes 0." in capsys.readouterr().out
    by_hand = [f"preset.{key}={found[key]}" for key in ("steps", "warmup", "validate_every", "plateau_window")]
    assert run([*settings, *by_hand, f"folder={tmp_path / 'b'}"]) == 0
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for name in "ab"
    )
    assert all(torch.equal(one[key], other[key]) for key in one)


def ahead(seconds: float):
    """A stage with so many seconds of work at a rate of one operation a second."""

    class Stage:
        shorter = "preset=demo is a matter of minutes"

        def flops_ahead(self, data, preset):
            return seconds

    return Stage()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(500, ""), (1500, "25 minutes"), (4 * 3600, "4 hours"), (3.2 * 86400, "3 days"), (9.1e6, "4 months")],
)
def test_a_training_of_more_than_ten_minutes_says_so_and_how_to_make_it_short(monkeypatch, capsys, seconds, said):
    monkeypatch.setattr(pace, "_flops_per_second", lambda device: 0.5)
    device = Device("cpu", "32-true", "", 2)
    pace.announce(ahead(seconds), {"datamodule": {}, "preset": {}}, device)
    out = capsys.readouterr().out
    assert (f"about {said} on this machine" in out and "preset=demo" in out) if said else out == ""
    monkeypatch.undo()
    assert pace._flops_per_second(device) > 1e8


def test_a_run_of_phases_is_resumed_with_those_that_time_has_left():
    cfg = compose(["experiment=run10_base", "preset=demo"])
    OmegaConf.set_struct(cfg, False)
    kept = [{"steps": 30, "tokens": 512, "batch": 8}, {"steps": 10, "tokens": 1024, "batch": 4}]
    before = {"preset": {"minutes": 20, "steps": 40, "warmup": 3, "validate_every": 5}, "datamodule": {"phases": kept}}
    pace.settle(cfg, [], compose(["stage=base_lm", "preset=demo"]), before, None, None)
    assert (cfg.preset.steps, OmegaConf.to_container(cfg.datamodule.phases)) == (40, kept)


@pytest.mark.slow
def test_every_stage_says_how_much_work_is_ahead(tmp_path):
    for experiment in ("gist_stage2", "gist_lod2", "base_lm", "lens", "alternating", "end_to_end"):
        small, full = (
            instantiate(cfg.stage, _convert_="all").flops_ahead(
                OmegaConf.to_container(cfg, resolve=True)["datamodule"],
                OmegaConf.to_container(cfg.preset, resolve=True),
            )
            for cfg in (
                compose([f"experiment={experiment}", f"folder={tmp_path}", *more])
                for more in (["preset=demo", "debug=limit"], ["preset=full"])
            )
        )
        assert 0 < 20 * small < full, experiment
