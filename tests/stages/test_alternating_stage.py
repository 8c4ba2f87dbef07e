"""The alternating stage in miniature: who changes in which phase, what is kept, and that it goes on from anywhere."""

import json

import pytest
import torch
from hydra.utils import instantiate

from megactx.framework.app import run
from megactx.framework.config.search_path import compose
from megactx.stages.alternating import AlternatingStage
from megactx.stages.phases import PHASES, Place, Schedule


@pytest.fixture(scope="module")
def settings(joint_settings):
    """Two cycles of 2 + 2 + 2 steps."""
    return [
        "experiment=alternating",
        *joint_settings,
        *["stage.cycles=2", "stage.steps.gist=2", "stage.steps.lens=2", "stage.steps.lora=2", "datamodule.spans=3"],
        *["stage.windows.per_round=4", "stage.windows.edits=6", "preset.validate_every=6"],
        *["callbacks.checkpoint.every_n_train_steps=1", "callbacks.checkpoint.save_top_k=-1"],
    ]


def load(folder, name="last.ckpt") -> dict:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("alternating") / "run"
    assert run([*settings, f"folder={folder}"]) == 0
    return folder


def owner(name: str) -> str:
    if name.startswith("base."):
        return "lora"
    return {"gistnet": "gist", "lens": "lens"}.get(name.partition(".")[0], name)


def test_phases_come_in_turn_and_each_counts_its_own_steps():
    schedule = Schedule({"gist": 2, "lens": 0, "lora": 3}, 2)
    assert [schedule.at(step).phase for step in range(6)] == ["gist", "gist", "lora", "lora", "lora", "gist"]
    assert schedule.at(8) == Place(1, "lora", 1)
    slow = [[schedule.at(step).phase for step in range(n)] for n in range(11)]
    for n, phases in enumerate(slow):
        for name in PHASES:
            assert schedule.before(n, name) == phases.count(name), (n, name)


@pytest.mark.parametrize(
    ("steps", "cycles", "message"),
    [((0, 0, 0), 1, "at least one phase"), ((1, 0, 0), 0, "stage.cycles=0"), ((1, -1, 0), 1, "stage.steps.lens=-1")],
)
def test_a_schedule_in_which_nothing_learns_is_refused(steps, cycles, message):
    with pytest.raises(ValueError, match=message):
        Schedule(dict(zip(PHASES, steps, strict=True)), cycles)


def test_in_each_phase_exactly_its_parameters_change_and_all_of_them(whole):
    """Step n of the checkpoints is behind the n-th step."""
    states = {step: load(whole, f"step_{step:06d}.ckpt") for step in range(1, 13)}
    for step in range(2, 13):
        before, after = (states[s]["state_dict"] for s in (step - 1, step))
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        phase = Schedule({"gist": 2, "lens": 2, "lora": 2}, 2).at(step - 1).phase
        assert states[step]["place"] == {
            "cycle": step // 6,
            "phase": ("gist", "lens", "lora")[step % 6 // 2],
            "position": step % 2,
        }
        assert {owner(name) for name in changed} <= {phase, "tokens"}, step
        assert any(owner(name) == phase for name in changed), step
    first, last = states[1]["state_dict"], states[12]["state_dict"]
    stage = AlternatingStage.load_from_checkpoint(whole / "checkpoints" / "last.ckpt", weights_only=True)
    learned = {f"gistnet.{n}" for n, _ in stage.gistnet.named_parameters()}
    learned |= {f"lens.{n}" for n, _ in stage.lens.named_parameters()}
    learned |= {f"base.{n}" for n, p in stage.base.named_parameters() if "lora_" in n}
    assert learned <= set(last)
    same = {name for name in learned if torch.equal(first[name], last[name])}
    assert not same, "it did not learn"
    assert int(last["tokens"]) > 0 and last["lens.updates"] == 4


def test_windows_are_counted_once_however_many_batches_the_step_accumulates(settings, monkeypatch, tmp_path):
    from types import SimpleNamespace

    from megactx.stages import alternating

    stage = instantiate(compose([*settings, f"folder={tmp_path}"]).stage, _convert_="all")
    stage.data = SimpleNamespace(training_document=lambda key: {"ids": torch.zeros(10 + key[1])})
    counted = []
    monkeypatch.setattr(stage, "count_tokens", counted.append)
    monkeypatch.setattr(alternating, "ensure", lambda *arguments: [])
    for place in (Place(0, "lens", 0), Place(0, "lens", 0), Place(0, "lens", 1), Place(1, "lens", 0)):
        stage._windows(place)
    assert counted == [10 + 11 + 12 + 13] * 2


def test_every_parameter_that_learns_is_in_the_optimizer_and_in_the_checkpoint_and_the_base_is_in_neither(
    settings, whole
):
    stage = instantiate(compose([*settings, "folder=unused"]).stage, _convert_="all")
    held = {id(p) for group in stage.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert held == {id(p) for parameters in stage.parts.values() for p in parameters}
    saved = load(whole)["state_dict"]
    assert {name for name in saved if name.startswith("base.")} == {
        f"base.{name}" for name, _ in stage.base.named_parameters() if "lora_" in name
    }
    for phase in PHASES:
        stage.train()
        stage.learns(phase)
        mine = {id(p) for p in stage.parts[phase]}
        assert {id(p) for p in stage.parameters() if p.requires_grad} == mine
        assert stage.gistnet.training == (phase == "gist") and stage.lens.training == (phase == "lens")
        assert not stage.base.training


def test_each_cycle_measures_its_windows_anew_and_the_run_reports_what_the_base_lost(whole, settings):
    folders = [sorted((whole / "windows" / f"round_{cycle:02d}").glob("*.safetensors")) for cycle in range(2)]
    assert [len(found) for found in folders] == [4, 4]
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(*folders, strict=True))
    numbers = json.loads((whole / "base.json").read_text())
    assert numbers["adapter_parameters"] == 2 * 4 * 2 * 4 * 32 and numbers["train_base"] == "lora"
    assert numbers["perplexity_after"] != numbers["perplexity_before"] and numbers["steps"] == 12
    assert "LensNet" in (whole / "report.md").read_text()
    header = (whole / "metrics.csv").read_text().split("\n")[0].split(",")
    assert {"val/cost", "val/base_lost", "train/gist/dnll", "train/lens/huber", "train/lora/loss"} <= set(header)
    assert {"train/tokens", "lr/muon", "lr/adamw"} <= set(header)


@pytest.mark.slow
def test_a_run_that_stopped_inside_the_lens_phase_goes_on_to_the_same_weights(whole, settings, tmp_path, monkeypatch):
    original = AlternatingStage.lens_step

    def stops(self, *arguments):
        if self.global_step == 9:
            raise RuntimeError("the power is gone")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(AlternatingStage, "lens_step", stops)
        assert run([*settings, f"folder={tmp_path / 'run'}"]) == 3
    goes_on(tmp_path / "run", "lens", settings, whole)


@pytest.mark.parametrize(
    ("phase", "step"),
    [
        pytest.param("gist", 7, marks=pytest.mark.long),
        pytest.param("lens", 9, marks=pytest.mark.long),
        pytest.param("lora", 5, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_inside_a_phase_goes_on_to_the_same_weights(
    phase, step, whole, settings, killed, tmp_path
):
    done = killed(f"{phase}_step", step, *settings, f"folder={tmp_path / 'run'}")
    assert done.returncode == -9, done.stderr
    goes_on(tmp_path / "run", phase, settings, whole)


def goes_on(folder, phase: str, settings, whole) -> None:
    place = load(folder)["place"]
    assert (place["phase"], place["position"]) == (phase, 1)
    assert run([*settings, f"folder={folder}", "resume=auto"]) == 0
    same(load(folder), load(whole))
    assert (folder / "report.json").read_text() == (whole / "report.json").read_text()


def same(mine: dict, theirs: dict) -> None:
    assert mine["state_dict"].keys() == theirs["state_dict"].keys()
    assert all(torch.equal(mine["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    assert str(mine["optimizer_states"]) == str(theirs["optimizer_states"])
    assert mine["lr_schedulers"] == theirs["lr_schedulers"] and mine["place"] == theirs["place"]


@pytest.mark.slow
def test_resumed_in_another_folder_inside_a_lens_phase_it_learns_from_the_same_windows(whole, settings, tmp_path):
    middle = whole / "checkpoints" / "step_000009.ckpt"
    assert load(whole, middle.name)["place"] == {"cycle": 1, "phase": "lens", "position": 1}
    assert run([*settings, f"folder={tmp_path / 'run'}", f"resume={middle}"]) == 0
    same(load(tmp_path / "run"), load(whole))


def test_other_phases_than_those_of_the_checkpoint_are_refused(whole, settings, tmp_path, capsys):
    middle = whole / "checkpoints" / "step_000009.ckpt"
    assert run([*settings, "stage.steps.gist=4", f"folder={tmp_path / 'run'}", f"resume={middle}"]) == 2
    assert "the checkpoint stands at" in capsys.readouterr().err


@pytest.mark.slow
def test_a_phase_with_no_steps_is_left_out_and_another_run_starts_from_this_one(whole, settings, tmp_path, capsys):
    short = ["stage.steps.lens=0", "stage.cycles=1", f"stage.init={whole}", f"folder={tmp_path / 'run'}"]
    assert run([*settings, *short, "preset.validate_every=2", "stage.evaluate.documents=1"]) == 0
    assert "GistNet, LensNet, base LM" in capsys.readouterr().out
    assert not (tmp_path / "run" / "windows").exists()
    before, after = load(whole, "best.ckpt")["state_dict"], load(tmp_path / "run")["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("lens."))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("base."))


@pytest.mark.slow
def test_a_plateau_ends_it_before_its_last_cycle(settings, tmp_path, capsys):
    still = ["stage.gist_lr=0", "stage.muon_lr=null", "stage.steps={gist: 2, lens: 0, lora: 0}", "stage.cycles=5"]
    assert run([*settings, *still, "preset.validate_every=2", f"folder={tmp_path / 'run'}"]) == 0
    assert "improved by less than 5%" in capsys.readouterr().out
    assert load(tmp_path / "run")["global_step"] == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.steps.gist=-1", "stage.steps.gist=-1: allowed is a whole number from 0"),
        ("stage.cycles=0", "preset.steps=0"),
        ("stage.lora.rank=0", "stage.lora.rank=0 is not allowed with stage.train_base=lora: from 4 to 16"),
        ("stage.lora.rank=32", "stage.lora.rank=32 is not allowed: from 4 to 16"),
        ("stage.lora.layers=middle", "lora.layers=middle is not known, allowed are first_two, last_two, all"),
        ("stage.objective=mse", "stage.objective=mse: allowed is kl or delta_nll"),
        ("stage.budgets=[1.5]", "allowed is a list, each a number above 0, up to 1"),
        ("stage.windows.per_round=1", "stage.windows.per_round=1: allowed is a whole number from 2"),
        ("stage.lens=nowhere", "there is no such folder or checkpoint"),
        ("stage.lens=asset:tiny-lensnet", "stage.lens=null starts a new one"),
        ("stage.init=nowhere", "there is no such checkpoint or run folder"),
        ("datamodule.spans=-1", "datamodule.spans=-1: allowed is a whole number from 0"),
        ("trainer.max_steps=5", "stage.cycles and stage.steps make 12"),
    ],
)
def test_a_users_mistake_is_one_clear_message(override, message, settings, tmp_path, capsys):
    assert run([*settings, override, f"folder={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err
