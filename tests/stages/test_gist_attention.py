"""A gist stage under MegaAttention: it draws live blocks, trains, resumes and reports, and refuses what stays plain."""

import json
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.strategies import FSDPStrategy
from omegaconf import OmegaConf
from torch.utils.data import default_convert

from megactx.framework.app import run
from megactx.framework.config.search_path import compose
from megactx.memory import MegaContextTree, WorkingContext
from megactx.stages.gist import GistStage

MEGA = ["attention=mega", "attention.segment=64", "attention.mid=64", "attention.live=96", "attention.overlap=32"]


@pytest.fixture(scope="module")
def settings(gist_settings):
    return [o.replace("experiment=demo", "experiment=gist_stage1") for o in gist_settings if "copies" not in o] + MEGA


def parts_of(settings, *overrides):
    """-> the stage, and its data that is set up."""
    cfg = compose([*settings, *overrides])
    stage, data = (instantiate(part, _convert_="all") for part in (cfg.stage, cfg.datamodule))
    stage.log = lambda *_, **__: None
    stage.prepare(data)
    data.setup()
    return stage, data


def load(folder) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_blocks_of_training_validation_and_report_are_live(settings):
    stage, data = parts_of(settings)
    drawn = [default_convert(data.training[index]) for index in range(4)]
    for batch in [*drawn, *map(default_convert, data.val_dataloader()), *data.evaluation_documents()]:
        first = stage.attention.live_from(batch["lengths"])[:, None]
        assert (batch["block_starts"] >= first).all() and (first > 0).all()
        assert (batch["block_starts"] + 64 <= batch["lengths"][:, None]).all()


def test_a_step_gives_the_gistnet_and_its_control_a_gradient_and_another_one_than_plain_attention(settings):
    torch.manual_seed(0)
    stage, data = parts_of(settings)
    batch, gradients = default_convert(data.training[0]), []
    for attention in (stage.attention, type(stage.attention)()):
        stage.attention = attention
        stage.zero_grad()
        stage.training_step(batch, 0).backward()
        gradients.append({n: p.grad.clone() for n, p in stage.nets.named_parameters() if p.grad is not None})
    mega, plain = gradients
    assert mega.keys() == plain.keys() and {name.partition(".")[0] for name in mega} == {"gistnet", "blockmean_linear"}
    assert all(not torch.equal(gradient, plain[name]) for name, gradient in mega.items() if gradient.any())
    assert not any(p.grad is not None for p in stage.base.parameters())


def test_where_everything_is_live_a_step_is_that_of_plain_attention_bit_for_bit(settings):
    losses = []
    for more in (["attention.live=100000"], ["attention=plain"]):
        torch.manual_seed(0)
        stage, data = parts_of(settings, *more)
        losses.append(stage.training_step(default_convert(data.training[0]), 0).detach())
    assert torch.equal(*losses)


@pytest.mark.slow
def test_a_run_ends_with_its_report_and_one_that_stopped_goes_on_to_the_same_weights(
    settings, tmp_path, dies_at, capsys
):
    whole, part = tmp_path / "whole", tmp_path / "part"
    asked = [*settings, "preset=smoke", "stage.evaluate.copies=4"]
    assert run([*asked, f"folder={whole}"]) == 0
    shown = capsys.readouterr().out
    assert "In short, on held-out documents after 4 steps" in shown
    following = next(line for line in shown.split("\n") if line.startswith("Next: "))
    assert all(override in following for override in ["experiment=gist_stage2", *MEGA])
    numbers = json.loads((whole / "report.json").read_text())
    assert any("read under Attention(kind='mega', segment=64" in note for note in numbers["notes"])
    assert "val/dnll" in (whole / "metrics.csv").read_text().split("\n")[0]

    dies_at(GistStage, "training_step", 4)
    assert run([*asked, f"folder={part}"]) == 3
    assert run([*asked, f"folder={part}", "resume=auto"]) == 0
    mine, theirs = load(part), load(whole)
    assert all(torch.equal(mine["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    assert str(mine["optimizer_states"]) == str(theirs["optimizer_states"])
    assert (part / "report.json").read_text() == (whole / "report.json").read_text()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["attention.live=63"],
            "attention.live=63 is not allowed: at least 64, so that 32 tokens that become a gist and",
        ),
        (["attention.segment=50"], "attention.segment=50 is not allowed"),
        (["attention=window"], "attention.kind=window is not allowed here: many branches"),
        (
            ["loss.history.weight=0.5"],
            "loss.history.weight=0.5 is not allowed with attention.kind=mega: that loss",
        ),
        (["loss.recall.weight=0.1"], "loss.recall.weight=0.1 is not allowed with attention.kind=mega"),
        (["loss.questions.weight=1"], "loss.questions.weight=1 is not allowed with attention.kind=mega"),
        (["loss.level2.weight=1"], "attention.live=96 is not allowed: at least 2016, so that 1024 tokens that become"),
        (["compressor={name: gisting}"], "compressor=gisting is not allowed with attention.kind=mega"),
        (["gistnet.slots=2"], "compressor=gistnet is not allowed with attention.kind=mega"),
        (["gistnet.input=hidden"], "attention.kind=mega is not allowed with gistnet, which reads states"),
        (["stage.prefills.gigabytes=1"], "stage.prefills.gigabytes=1 is not allowed with attention.kind=mega"),
        (["stage.keep_controls=true"], "stage.keep_controls=true is not allowed with attention.kind=mega"),
        (["stage.evaluate.history=4"], "stage.evaluate.history=4 is not allowed with attention.kind=mega"),
    ],
)
def test_what_would_be_read_plainly_or_not_at_all_is_refused_by_name(settings, overrides, said):
    with pytest.raises(InstantiationException) as error:
        instantiate(compose([*settings, *overrides]).stage, _convert_="all")
    assert said in str(error.value.__cause__)


def test_a_ladder_is_refused_as_its_rungs_are_measured_plainly(settings):
    ladder = {
        "_target_": "megactx.studies.ladder.Ladder",
        "ladder": {"oracle": 0, "history_oracle": 0, "oracle_steps": 1},
    }
    stage = OmegaConf.create(OmegaConf.to_container(compose(settings).stage, resolve=True))
    with pytest.raises(InstantiationException) as error:
        instantiate(OmegaConf.merge(stage, ladder), _convert_="all")
    assert "attention.kind=mega is not allowed in a ladder" in str(error.value.__cause__)


def test_processes_that_cut_up_the_base_are_refused(settings):
    stage, _ = parts_of(settings)
    stage._trainer = SimpleNamespace(strategy=FSDPStrategy(), world_size=1, precision="32-true")
    with pytest.raises(ValueError, match="attention.kind=mega is not allowed with trainer=fsdp"):
        stage.setup("fit")


def test_operations_of_a_document_are_those_of_the_tokens_that_its_rows_see(settings):
    stage, _ = parts_of(settings)
    ids = torch.randint(2, 500, (1, 500))
    tree, index = MegaContextTree.from_tokens(ids, stage.main, stage.base), torch.arange(500)[None]
    mask = stage.attention.pyramid(WorkingContext(tree, torch.zeros_like(index), index, [500], 500)).mask
    near = mask.leaf[0] & (mask.start[0] >= 32)
    seen = int(mask.dense()[0, 0][mask.leaf[0]][:, near].sum()) + 32 * int(mask.is_live.sum())
    work, batch = stage._work(), {"lengths": torch.tensor([500]), "block_starts": torch.zeros(1, 0)}
    read = float(work(batch)) - 2 * work.body * 500
    assert read == pytest.approx(4 * work.attention * seen, rel=0.03)
    plain = float(parts_of(settings, "attention=plain")[0]._work()(batch)) - 2 * work.body * 500
    assert plain == 2 * work.attention * 500**2 > 1.3 * read
