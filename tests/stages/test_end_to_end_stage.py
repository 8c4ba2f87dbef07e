"""The end-to-end stage in miniature: what learns, that parts of a step do not matter, and that it goes on exactly."""

import json

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from megactx.framework.app import run
from megactx.framework.config.search_path import compose
from megactx.stages.end_to_end import EndToEndStage

MEGA = ("attention=mega", "attention.segment=32", "attention.mid=32", "attention.live=32")
LORA = ("stage.train_base=lora", "stage.lora.layers=all", "stage.lora.embeddings=true")


@pytest.fixture(scope="module")
def settings(joint_settings):
    return [
        "experiment=end_to_end",
        *[setting for setting in joint_settings if not setting.startswith("stage.lora")],
        *["preset.steps=4", "preset.validate_every=2", "stage.windows.sources=2", "stage.windows.variants=6"],
        *["stage.windows.per_pass=4", "callbacks.checkpoint.every_n_train_steps=1", "datamodule.documents=1"],
        *["callbacks.checkpoint.save_top_k=-1"],
    ]


def load(folder, name="last.ckpt") -> dict:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run with LoRA that nothing interrupted."""
    folder = tmp_path_factory.mktemp("end_to_end") / "run"
    assert run([*settings, *LORA, "stage.lora.rank=4", f"folder={folder}"]) == 0
    return folder


def stage_and_data(settings, *more):
    cfg = compose([*settings, *more, "folder=unused"])
    torch.manual_seed(0)
    stage, data = (instantiate(part, _convert_="all") for part in (cfg.stage, cfg.datamodule))
    stage.prepare(data)
    data.setup()
    stage.data = data
    stage.log = lambda *arguments, **settings: None
    stage.base.float()
    return stage, data


def gradients(settings, *more) -> tuple[float, dict[str, torch.Tensor]]:
    stage, data = stage_and_data(settings, *more, "lensnet.dropout=0")
    for p in stage.base_parameters():  # a fresh adapter passes on no gradient of one of its two matrices
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    stage.learns("gist", "lens", "lora")
    stage.eval()  # no dropout; what learns keeps its gradient
    document = data.training_document([5, 0])
    found = stage.losses(document["ids"][None], document["cursor"], text=1)
    found["loss"].backward()
    return found["loss"].item(), {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "more",
    [
        (*LORA, "stage.lora.rank=4"),
        (*LORA, "stage.lora.rank=4", *MEGA),
        ("stage.train_base=full",),
        ("stage.objective=kl",),
    ],
)
def test_working_contexts_in_parts_give_the_gradients_of_all_at_once(more, settings):
    whole, parts = (
        gradients(settings, *more, "stage.weights.lod1=0.05", f"stage.windows.per_pass={n}", f"stage.recompute={keep}")
        for n, keep in ((6, "false"), (1, "true"))
    )
    assert abs(whole[0] - parts[0]) < 1e-5 and whole[1].keys() == parts[1].keys()
    owners = {name.split(".")[0] for name in whole[1]}
    assert owners == ({"gistnet", "lens"} if "objective" in more[0] else {"gistnet", "lens", "base"})
    for name, value in whole[1].items():
        torch.testing.assert_close(parts[1][name], value, rtol=2e-4, atol=1e-5 * float(value.abs().max()) + 1e-8)


def test_the_loss_is_the_weighted_sum_of_its_terms_and_soft_gists_reach_gistnet(settings):
    stage, data = stage_and_data(settings, "stage.weights={window: 0.5, lens: 2.0, choice: 0.1, lod1: 0.25, lod2: 0.0}")
    stage.eval()
    document = data.training_document([5, 0])
    found = stage.losses(document["ids"][None], document["cursor"], text=1)
    total = 0.5 * found["window"] + 2 * found["lens"] + 0.25 * found["lod1"]
    torch.testing.assert_close(found["loss"], total, rtol=1e-4, atol=1e-5)
    assert 0 < found["lod1"] < 2 and found["best"] <= found["cost"] and "lod2" not in found
    alone, data = stage_and_data(settings, "stage.weights={window: 0.0, lens: 0.0, choice: 0.0, lod1: 1.0, lod2: 0.0}")
    alone.losses(document["ids"][None], document["cursor"], text=1)["loss"].backward()
    assert sum(float(p.grad.abs().sum()) for p in alone.gistnet.parameters()) > 0


def test_gists_of_gists_are_predicted_where_the_horizon_is_that_long(settings):
    more = ["horizon.tokens=64", "stage.weights={window: 1.0, lens: 1.0, choice: 0.1, lod1: 0.02, lod2: 0.01}"]
    stage, data = stage_and_data(settings, *more)
    document = data.training_document([5, 0])
    found = stage.losses(document["ids"][None], document["cursor"], text=1)
    assert 0 < found["lod2"] < 2


def test_everything_learns_everything_is_kept_and_the_base_only_where_asked(settings, whole, tmp_path):
    stage = EndToEndStage.load_from_checkpoint(whole / "checkpoints" / "last.ckpt", weights_only=True)
    first, last = (load(whole, name)["state_dict"] for name in ("step_000001.ckpt", "last.ckpt"))
    learned = {
        name for name, p in stage.named_parameters() if name.startswith(("gistnet.", "lens.")) or "lora_" in name
    }
    held = {id(p) for group in stage.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert held == {id(p) for name, p in stage.named_parameters() if name in learned}
    assert learned <= set(last) and {name for name in last if name.startswith("base.")} <= learned
    assert not {name for name in learned if torch.equal(first[name], last[name])}
    assert {name.split(".")[3] for name in last if name.startswith("base.")} == {"embed_tokens", "layers"}
    numbers = json.loads((whole / "base.json").read_text())
    assert numbers["nll_after"] != numbers["nll_before"] and numbers["adapter_parameters"] > 0

    short = ["preset.steps=2", "stage.evaluate.documents=1"]
    assert run([*settings, *short, f"folder={tmp_path / 'frozen'}"]) == 0
    assert not any(name.startswith("base.") for name in load(tmp_path / "frozen")["state_dict"])
    assert json.loads((tmp_path / "frozen" / "base.json").read_text())["nll_after"] == pytest.approx(
        json.loads((tmp_path / "frozen" / "base.json").read_text())["nll_before"], rel=1e-6
    )


@pytest.mark.slow
def test_a_base_that_learns_as_a_whole_is_in_the_checkpoint_and_its_teacher_stays_what_it_was(settings, tmp_path):
    folder = tmp_path / "full"
    assert run([*settings, "stage.train_base=full", "preset.steps=2", f"folder={folder}"]) == 0
    stage = EndToEndStage.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    saved = load(folder)["state_dict"]
    assert {f"base.{name}" for name in stage.base.state_dict()} <= set(saved)
    with stage.original() as original:
        untouched = original.state_dict()
    assert any(not torch.equal(saved[f"base.{name}"].float(), value.float()) for name, value in untouched.items())


@pytest.mark.slow
@pytest.mark.parametrize("attention", [(), MEGA])
def test_a_run_that_stopped_goes_on_to_the_same_weights(attention, whole, settings, tmp_path, dies_at):
    asked, other = [*settings, *LORA, *attention, "stage.lora.rank=4"], whole
    if attention:
        other = tmp_path / "whole"
        assert run([*asked, f"folder={other}"]) == 0
        plain, mega = (load(folder)["state_dict"] for folder in (whole, other))
        assert any(not torch.equal(plain[name], value) for name, value in mega.items())
        assert (other / "report.json").read_text() != (whole / "report.json").read_text()
    dies_at(EndToEndStage, "losses", 4)
    assert run([*asked, f"folder={tmp_path / 'run'}"]) == 3
    goes_on(tmp_path / "run", [*asked, f"folder={tmp_path / 'run'}"], other)


def test_sizes_of_an_attention_are_refused_by_the_stage_itself_before_any_text_is_read(settings):
    cfg = compose([*settings, "attention=mega", "attention.segment=50", "folder=unused"])
    with pytest.raises(InstantiationException, match="attention.segment=50 is not allowed"):
        instantiate(cfg.stage, _convert_="all")


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "step"), [("losses", 3), ("validation_step", 2)])
def test_a_run_that_was_killed_goes_on_to_the_same_weights(moment, step, whole, settings, killed, tmp_path):
    asked = [*settings, *LORA, "stage.lora.rank=4", f"folder={tmp_path / 'run'}"]
    done = killed(moment, step, *asked)
    assert done.returncode == -9, done.stderr
    goes_on(tmp_path / "run", asked, whole)


def goes_on(folder, asked, whole) -> None:
    assert run([*asked, "resume=auto"]) == 0
    mine, theirs = load(folder), load(whole)
    assert all(torch.equal(mine["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    assert str(mine["optimizer_states"]) == str(theirs["optimizer_states"])
    assert (folder / "report.json").read_text() == (whole / "report.json").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.train_base=some", "stage.train_base=some: allowed is frozen or lora or full"),
        ("stage.train_base=lora", "stage.lora.rank=0 is not allowed with stage.train_base=lora: from 4 to 16"),
        ("stage.windows.variants=5", "a multiple of stage.windows.sources=2"),
        ("stage.windows.variants=2", "at least twice as many"),
        ("stage.windows.per_pass=0", "stage.windows.per_pass=0: allowed is a whole number from 1"),
        ("stage.weights.lens=-1", "stage.weights.lens=-1: allowed is a number from 0"),
        ("stage.weights.lod2=0.1", "horizon.tokens=8 is no multiple of 64"),
        ("stage.distance=-1", "stage.distance=-1: allowed is a number from 0"),
        ("stage.budgets=[0.1]", "take larger shares"),
        ("attention=mega attention.segment=50", "attention.segment=50 is not allowed"),
        ("datamodule.documents=0", "datamodule.documents=0: allowed is a whole number from 1"),
    ],
)
def test_a_users_mistake_is_one_clear_message(override, message, settings, tmp_path, capsys):
    assert run([*settings, *override.split(), f"folder={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err
