"""Other compressors through the same stage, history mode in the loss, and both in the report."""

import json
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch.utils.data import default_convert

from megactx.framework.app import run
from megactx.framework.config.search_path import compose
from megactx.lm import BaseLM
from megactx.parts.read import gistnet_of
from megactx.stages.gist import GistStage

SHORT = ["block_size=8", "stage.evaluate.copies=0"]
HISTORY = ["loss.history.weight=0.5", "loss.history.segment=16", "loss.history.recency=32"]
SLOTS = ["gisting", "gisting_shift", "gisting_separate", "gistpool"]


@pytest.fixture
def pool_run(gist_run):
    """The same run without what only a GistNet has."""
    return [override for override in gist_run if not override.startswith("gistnet.")]


def built(overrides):
    cfg = compose([override for override in overrides if not override.startswith("folder=")])
    stage = instantiate(cfg.stage, _convert_="all")
    data = instantiate(cfg.datamodule, _convert_="all")
    stage.prepare(data)
    data.setup()
    return stage, default_convert(data.training[0])


@pytest.mark.parametrize("compressor", SLOTS)
def test_every_compressor_by_keys_and_values_has_a_loss_whose_gradient_reaches_all_that_it_trains(pool_run, compressor):
    stage, batch = built([*pool_run, *SHORT, f"compressor={compressor}"])
    with torch.no_grad():
        for p in stage.main.parameters():  # LoRA starts at zero, and then its first matrix has no gradient
            p.add_(0.01 * torch.randn_like(p))
    context = stage.context(batch)
    losses, dnll = stage.losses[0].per_net(context)
    carriers = context.carriers(batch["block_starts"])
    losses.sum().backward()
    assert losses.shape == dnll.shape == (2,) and carriers[0].first == 1 and carriers[1].first == 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.main.parameters())
    optimizer = stage.configure_optimizers()["optimizer"]
    inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert inside == {id(p) for p in stage.nets.parameters()}, "what is trained is in the optimizer, and nothing else"


def test_a_gistpool_is_trained_in_the_ladder_as_it_is_alone(pool_run):
    stages = {
        "gistpool": built([*pool_run, *SHORT, "compressor=gistpool"])[0],
        "ladder": built(["experiment=ladder", *[o for o in pool_run if not o.startswith("experiment=")], *SHORT])[0],
    }
    after = {}
    for name, stage in stages.items():
        net = stage.main if name == "gistpool" else stage.nets["gistpool"]
        optimizer = stage.configure_optimizers()["optimizer"]
        own = {id(p): key for key, p in net.named_parameters()}
        found = {own[id(p)]: group for group in optimizer.param_groups for p in group["params"] if id(p) in own}
        settings = {key: {k: v for k, v in group.items() if k != "params"} for key, group in found.items()}
        assert all(group["weight_decay"] == 0.01 for group in optimizer.param_groups), "of all that learns"
        for seed, parameter in enumerate(net.parameters()):  # the same weights and gradients, three steps
            torch.manual_seed(seed)
            parameter.data.copy_(torch.randn_like(parameter))
            parameter.grad = torch.randn_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])  # the peak: the warm-up begins near 0
        for _ in range(3):
            optimizer.step()
        after[name] = settings, {key: p.detach().clone() for key, p in net.named_parameters()}
    assert after["gistpool"][0] == after["ladder"][0]
    alone, beside = after["gistpool"][1], after["ladder"][1]
    assert alone.keys() == beside.keys() and all(torch.equal(alone[key], beside[key]) for key in alone)
    assert stages["ladder"].configure_optimizers()["optimizer"].parts[0].param_groups, "Muon is on beside it"


def test_history_mode_has_its_share_of_the_loss_and_reaches_the_gistnet(gist_run):
    parts = {}
    for weight in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        stage, batch = built(
            [*gist_run, *SHORT, *HISTORY, f"loss.history.weight={weight}", f"loss.block.weight={1 - weight}"]
        )
        stage.log = lambda *args, **kwargs: None
        parts[weight] = stage.training_step(batch, 0)
        assert ("segments" in batch) == (weight > 0)
    torch.testing.assert_close(parts[0.5], 0.5 * parts[0.0] + 0.5 * parts[1.0], rtol=1e-4, atol=1e-6)
    parts[1.0].backward()
    assert all(p.grad is not None for name, p in stage.main.named_parameters() if "backbone" not in name)


def test_a_block_that_comes_back_has_its_weight_in_the_loss_and_reaches_the_gistnet(gist_run):
    parts = {}
    for recall in (0.0, 0.5, 1.0):
        torch.manual_seed(0)
        asked = [*gist_run, *SHORT, *HISTORY, "loss.history.weight=0", f"loss.recall.weight={recall}"]
        stage, batch = built(asked)
        logged = {}
        stage.log = lambda name, value, logged=logged, **kwargs: logged.update({name: value})
        parts[recall] = stage.training_step(batch, 0)
        assert ("copied_blocks" in batch) == ("train/recall/dnll" in logged) == (recall > 0)
    assert parts[0.0] != parts[1.0]
    torch.testing.assert_close(parts[0.5], (parts[0.0] + parts[1.0]) / 2, rtol=1e-4, atol=1e-6)
    stage.zero_grad()
    next(loss for loss in stage.losses if loss.name == "recall")(stage.context(batch))[0].sum().backward()
    assert all(p.grad is not None for name, p in stage.main.named_parameters() if "backbone" not in name)


def test_what_comes_back_is_any_old_block_of_its_segment(gist_run):
    batch = built([*gist_run, *SHORT, *HISTORY, "loss.history.segments=500"])[1]
    copied, last = batch["copied_blocks"], batch["segments"] - 32 - 8
    assert copied.shape == last.shape and (copied % 8 == 0).all() and (copied >= 8).all() and (copied <= last).all()
    assert (copied == 8).any() and (copied == last).any() and len(copied.unique()) > 5


def test_segments_are_a_function_of_the_seed_and_the_index_and_leave_the_rest_of_the_batch_as_it_was(gist_run):
    _, plain = built([*gist_run, *SHORT])
    _, one = built([*gist_run, *SHORT, *HISTORY])
    _, two = built([*gist_run, *SHORT, *HISTORY])
    assert torch.equal(one["segments"], two["segments"]) and torch.equal(one["block_starts"], plain["block_starts"])
    assert (one["segments"] % 8 == 0).all() and (one["segments"] >= 48).all()


@pytest.mark.slow
def test_a_run_of_gistpool_in_both_modes_ends_with_a_report_of_both(pool_run, tmp_path, capsys):
    controls = ["+stage.controls.pool={name: gisting, block_size: 8, shift: true, lr: 1.0e-3}"]
    asked = [*pool_run, *SHORT, *HISTORY, *controls, "compressor=gistpool", "stage.evaluate.history=6"]
    assert run(asked) == 0, capsys.readouterr().err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["subject"] == "gistpool" and report["geometry"] == {}
    assert {"gistpool", "pool", "blockmean_linear", "last token"} <= set(report["history"]["recovery"]["overall"])
    assert set(report["history"]["gain"]) >= {"gistpool", "last token"} and report["history"]["segments"] <= 6
    text = (tmp_path / "run" / "report.md").read_text()
    assert "history recovery" in text and "gain at equal budget" in text
    assert "gistpool, pool: keys and values have no output row" in text
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[2] for name in saved if name.startswith("nets.gistpool.")} == {"token", "adapters"}


@pytest.mark.slow
def test_a_run_of_gistpool_goes_on_to_the_same_weights(pool_run, tmp_path, monkeypatch):
    asked = [*pool_run, *SHORT, "compressor=gistpool", "stage.evaluate.controls=false"]
    assert run([*asked, f"folder={tmp_path / 'whole'}"]) == 0
    step = GistStage.training_step

    def stops(self, batch, index):
        if self.global_step == 2:  # behind a checkpoint
            raise RuntimeError("the power is gone")
        return step(self, batch, index)

    monkeypatch.setattr(GistStage, "training_step", stops)
    assert run([*asked, f"folder={tmp_path / 'part'}"]) == 3
    monkeypatch.setattr(GistStage, "training_step", step)
    assert run([*asked, f"resume={tmp_path / 'part'}"]) == 0
    one, two = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "run")  # a run that starts from another one has a folder of its own
    )
    assert one.keys() == two.keys() and [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["compressor=gistpool", "gistnet.head=linear"], "gistnet.head: it is for compressor=gistnet, but"),
        (["compressor=gistpool", "pooling=cls"], "pooling: it is for compressor=gistnet, but"),
        (["compressor=gistpool", "contrastive=c05"], "contrastive.weight=0.05"),
        (["compressor=gistpool", "stage.evaluate.reconstruction=4"], "stage.evaluate.reconstruction=4"),
        (["compressor=gistpool", "compressor.rank=-1"], "compressor.rank=-1"),
        (["compressor=gistpool", "compressor.position=middle"], "compressor.position=middle"),
        (["compressor.name=avgpool"], "compressor.name=avgpool is not allowed"),
        (["compressor.name=gistpol"], "compressor.name=gistpol is not known"),
        (["compressor=gistpool", "loss.recall.weight=0.1"], "loss.recall.weight=0.1 is not allowed with gistpool"),
        (["loss.recall.weight=-1"], "loss.recall.weight=-1"),
        (["loss.history.weight=-1.5"], "loss.history.weight=-1.5"),
        (["loss.block.weight=0"], "loss: all weights are 0"),
        (["loss.history.weight=1", "loss.history.segment=20"], "history.segment=20"),
        (["loss.history.weight=1"], "data.min_tokens=200"),
        (
            [*HISTORY, "loss.recall.weight=0.1", "loss.recall.recency=16"],
            "loss.recall.recency=16, but datamodule.history.recency=32: set them alike",
        ),
        (
            [*HISTORY, "datamodule.history.segment=24"],
            "loss.history.segment=16, but datamodule.history.segment=24: set them alike",
        ),
        (["gistnet.block_size=16"], "stage.controls.blockmean_linear.block_size=8 differs from block_size=16"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_message(pool_run, capsys, overrides, named):
    assert run([*pool_run, *SHORT, *overrides]) == 2
    assert named in capsys.readouterr().err


def test_a_gistnet_of_several_vectors_is_trained_and_measured_and_no_tree_takes_it(gist_run, base_folder, capsys):
    folder = next(o for o in gist_run if o.startswith("folder=")).partition("=")[2]
    given = [*gist_run, *SHORT, *HISTORY, "gistnet.slots=2", "stage.evaluate.history=4", "stage.evaluate.level2=4"]
    assert run(given) == 0
    made = json.loads((Path(folder) / "report.json").read_text())
    assert made["history"] and not made["level2"]
    assert "gistnet.slots is 2" in " ".join(made["notes"])
    base = BaseLM.from_pretrained(str(base_folder), "float32").freeze()
    assert gistnet_of(folder, base, "--gistnet", slots=True).slots == 2
    with pytest.raises(ValueError, match="gistnet.slots=2 is not allowed here"):
        gistnet_of(folder, base, "stage.gistnet")
    capsys.readouterr()
    assert run([*given, f"folder={folder}2", "loss.recall.weight=0.5"]) == 2
    assert "loss.recall.weight=0.5 is not allowed with gistnet, which makes several vectors" in capsys.readouterr().err
