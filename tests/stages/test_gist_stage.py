"""The stage trains its GistNet and nothing else, and what it trained is what it saves and reports."""

import csv
import json
import os
import shutil
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hydra.errors import InstantiationException
from lightning.pytorch.strategies import FSDPStrategy

from megactx.data.files import Files
from megactx.framework.app import run
from megactx.framework.config.search_path import compose
from megactx.lm.prefill_cache import PrefillCache
from megactx.stages.gist import GistStage

composed = cache(lambda *overrides: compose(overrides))


def config_of(overrides: list[str]):
    """Without the folder, which is another one for each test."""
    return composed(*(o for o in overrides if not o.startswith("folder=")))


def stage_of(overrides: list[str]) -> GistStage:
    from hydra.utils import instantiate

    return instantiate(config_of(overrides).stage, _convert_="all")


def data_of(overrides: list[str], stage: GistStage):
    from hydra.utils import instantiate

    module = instantiate(config_of(overrides).datamodule, _convert_="all")
    stage.prepare(module)
    module.setup()
    return module


def batch_of(module, index: int = 0) -> dict:
    from torch.utils.data import default_convert

    return default_convert(module.training[index])


def block_loss(stage, batch):
    """Of each net."""
    return stage.losses[0].per_net(stage.context(batch))[0]


def test_a_run_ends_with_tables_a_picture_the_controls_and_the_next_command(gist_run, texts, tmp_path, capsys):
    assert run([*gist_run, f"stage.evaluate.path={texts}", "stage.evaluate.reconstruction=2"]) == 0
    shown = capsys.readouterr().out
    assert "In short, on held-out documents after 4 steps: gistnet repairs this share of what" in shown
    assert "the nearest control: " in shown
    folder = tmp_path / "run"
    written = (folder / "report.md").read_text()
    assert (
        "gist of gists) was not measured: evaluate.level2 is 0" in written
        and "copy recovery was not measured at 256 tokens" in written
    )
    for row in (
        "full",
        "dropped",
        "last token",
        "random gist",
        "another block's gist",
        "untrained mean",
        "blockmean_linear",
    ):
        assert row in shown
    assert "attention=" not in shown.partition("Next: ")[2], "a stage takes that by itself"
    assert "Next: python train.py" in shown and "MFLOP per block of 32 tokens" in shown and "block hash" in shown
    for part in (folder, folder / "other"):
        numbers = json.loads((part / "report.json").read_text())
        assert numbers["horizon"] == 32 and numbers["blocks"] >= 24
        assert numbers["groups"]["overall"]["rows"]["full"]["dnll"] == 0
        assert numbers["flops_per_block"]["gistnet"] > numbers["flops_per_block"]["blockmean_linear"] > 0
        assert {"diversity", "code/diversity", "attention_entropy", "reconstruction_nll"} <= set(numbers["geometry"])
        assert list(numbers["copies"]) == ["64"] and numbers["copies"]["64"]["blocks"] == 4  # no room for 256 tokens
        assert numbers["level2"] is None and any("hierarchical" in note for note in numbers["notes"])
        assert (part / "report.md").exists() and (part / "report.png").stat().st_size > 10_000
    logged = (folder / "metrics.csv").read_text().split("\n")[0].split(",")
    assert {"val/dnll", "val/code/kl", "val/attention_entropy"} <= set(logged)

    loaded = GistStage.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert saved and not any(name.startswith("base.") for name in saved)
    assert {f"nets.{name}" for name, _ in loaded.nets.named_parameters()} <= set(saved)
    for name, p in loaded.nets.state_dict().items():
        torch.testing.assert_close(p, saved[f"nets.{name}"])


@pytest.mark.parametrize("experiment", ["gist_stage1", "gist_stage2", "gist_stage3"])
@pytest.mark.slow
def test_every_stage_of_the_curriculum_runs_with_its_horizon_and_loss(experiment, gist_run, tmp_path):
    weights = {
        "gist_stage1": "{narrative: 1, code: 0, structured: 0}",
        "gist_stage2": "{narrative: 0, code: 1, structured: 0}",
    }
    overrides = [o for o in gist_run if not o.startswith(("experiment=", "data.weights"))]
    overrides += [f"experiment={experiment}", "preset=demo", "preset.steps=2", "preset.min_tokens=200"]
    overrides += [f"data.weights={weights.get(experiment, '{narrative: 0.6, code: 0.4, structured: 0}')}"]
    assert run(overrides) == 0
    horizon = {"gist_stage1": 32, "gist_stage2": 64, "gist_stage3": 128}[experiment]
    assert json.loads((tmp_path / "run" / "report.json").read_text())["horizon"] == horizon
    head = (tmp_path / "run" / "metrics.csv").read_text().split("\n")[0]
    assert ("train/contrastive" in head) == (experiment != "gist_stage1")


@pytest.mark.parametrize("muon_lr", ["null", "0.01"])
def test_every_trained_parameter_is_in_the_optimizer_and_no_parameter_of_the_frozen_base_is(gist_run, muon_lr):
    stage = stage_of([*gist_run, f"stage.muon_lr={muon_lr}"])
    optimizer = stage.configure_optimizers()["optimizer"]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in stage.nets.parameters()}
    assert not held & {id(p) for p in stage.base.parameters()}
    assert all(p.requires_grad for p in stage.nets.parameters())
    stage.train()
    assert not stage.base.training and stage.gistnet.training


def test_training_lowers_the_loss_of_the_gistnet_and_of_its_control_and_leaves_the_base_alone(gist_run):
    torch.manual_seed(0)
    stage = stage_of([*gist_run, "stage.lr=0.003", "stage.muon_lr=null"])
    module = data_of(gist_run, stage)
    before = {name: p.clone() for name, p in stage.base.state_dict().items()}
    optimizer = stage.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 0.003
    batch, losses = batch_of(module), []
    for _ in range(25):
        loss = block_loss(stage, batch)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    assert (losses[-1] < 0.8 * losses[0]).all(), torch.stack([losses[0], losses[-1]])
    assert all(torch.equal(p, before[name]) for name, p in stage.base.state_dict().items())


@pytest.mark.parametrize("seam_weight", [0.0, 0.3])
def test_the_seam_counts_as_much_as_it_is_told_to(gist_run, seam_weight):
    def loss_of(horizon, seam_weight=1.0):
        torch.manual_seed(0)
        stage = stage_of([*gist_run, f"horizon.tokens={horizon}", f"loss.block.seam_weight={seam_weight}"])
        with torch.no_grad():
            return block_loss(stage, batch)

    batch = batch_of(data_of(gist_run, stage_of(gist_run)))
    plain, seam = loss_of(16), loss_of(4, seam_weight)  # all of a horizon of 4 is seam
    body = (16 * plain - 4 * seam) / 12
    weighted = (4 * seam_weight * seam + (16 - 4 * seam_weight) * body) / 16
    torch.testing.assert_close(loss_of(16, seam_weight), weighted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seam_weight", [-0.1, 1.1])
def test_a_seam_weight_outside_0_to_1_is_refused_by_name(gist_run, seam_weight):
    with pytest.raises(
        InstantiationException, match=f"loss.block.seam_weight={seam_weight} is not allowed: a number from 0 to 1"
    ):
        stage_of([*gist_run, f"loss.block.seam_weight={seam_weight}"])


def test_every_gistnet_with_a_backbone_has_muon_and_nothing_else_has(gist_run):
    more = "stage.controls.{}={{{},block_size:32}}"
    nets = {"second": "layers:1,num_heads:4", "blockmean_mlp": "type:mean,head:mlp"}
    stage = stage_of([*gist_run, "stage.muon_lr=0.01", *[f"+{more.format(*net)}" for net in nets.items()]])
    muon, _ = stage.configure_optimizers()["optimizer"].parts
    held = {id(p) for group in muon.param_groups for p in group["params"]}
    for name, net in stage.nets.items():
        matrices = {id(p) for p in net.parameters() if p.ndim == 2}
        assert matrices <= held if name in ("gistnet", "second") else not matrices & held, name


def test_a_control_does_not_change_the_gistnets_gradient_even_through_clipping(gist_run):
    gradients = []
    for extra in ([], ["stage.controls={}"]):
        torch.manual_seed(0)
        stage = stage_of([*gist_run, *extra])
        module = data_of(gist_run, stage)
        loss = block_loss(stage, batch_of(module))
        (loss.sum() * 100).backward()
        stage.configure_gradient_clipping(None, 1.0)
        gradients.append([p.grad.clone() for p in stage.gistnet.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_contrastive_term_takes_only_blocks_that_have_a_right_neighbour(gist_run):
    stage = stage_of([*gist_run, "horizon.tokens=4", "contrastive.weight=1.0"])
    ids, block = torch.randint(2, 500, (1, 3 * 32 + 4)), 32
    batch = {"ids": ids, "block_starts": torch.tensor([[32, 64]]), "lengths": torch.tensor([100])}
    gists = stage.gistnet.encode_block(stage.base.embed(ids[0, 32:96].view(2, block))).view(1, 2, -1)
    right = stage.gistnet.encode_block(stage.base.embed(ids[:, 64:96]))
    expected = torch.relu(0.2 - (1 - torch.cosine_similarity(gists[0, :1], right))).mean()
    loss = next(loss for loss in stage.losses if loss.name == "contrastive")
    assert loss(stage.context(batch))[1]["contrastive_without_pairs"] == 0
    torch.testing.assert_close(loss(stage.context(batch))[0], expected[None])
    values, numbers = loss(stage.context(batch | {"block_starts": torch.tensor([[64, 64]])}))
    assert values == 0 and numbers["contrastive_without_pairs"] == 1


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["gistnet.num_heads=5"], "gistnet.num_heads=5"),
        (["gistnet.pooling=max"], "gistnet.pooling=max"),
        (["horizon.tokens=240"], "horizon.tokens=240"),
        (["data.path=/no/such/file"], "data.path=/no/such/file"),
        (["base.name=/no/such/folder"], "base.name=/no/such/folder"),
        (["loss.block.objective=mse"], "loss.block.objective=mse"),
        (["+stage.targets.recal=0.5"], "stage.targets.recal"),
        (["data.max_tokens=9999"], "data.max_tokens=9999"),
        (["data.min_tokens=250", "data.max_tokens=240"], "data.min_tokens=250"),
        (["resume=/no/such/checkpoint"], "resume=/no/such/checkpoint"),
        (["stage.prefills.gigabytes=-1"], "stage.prefills.gigabytes=-1: allowed is a number from 0"),
        (["stage.prefills.dtype=int8"], "stage.prefills.dtype=int8"),
        (["trainer=cuda_bf16"], "trainer=cuda_bf16"),
    ],
)
def test_a_users_mistake_exits_2_with_one_line_that_names_the_setting(gist_run, overrides, said, capsys):
    if said.startswith("trainer") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert (
        run(
            [o for o in gist_run if not o.startswith(("trainer=", "trainer.precision")) or said[:7] != "trainer"]
            + overrides
        )
        == 2
    )
    lines = capsys.readouterr().err.strip().split("\n")
    assert said in " ".join(lines) and "Traceback" not in " ".join(lines)


@pytest.mark.parametrize("more", [[], ["gistnet.input=hidden"], ["gistnet.type=base", "gistnet.rank=4"]])
def test_a_step_over_prefills_that_were_kept_has_the_gradients_of_one_that_reads_the_documents(
    gist_run, more, tmp_path, monkeypatch
):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path))
    stage = stage_of([*gist_run, *more])
    batch, found = batch_of(data_of(gist_run, stage)), []
    for kept in (None, PrefillCache(stage.base, 1, "float32", layers=[2]), PrefillCache(stage.base, 1, layers=[2])):
        stage.kept = kept
        stage.zero_grad()
        block_loss(stage, batch)[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in stage.main.parameters() if p.grad is not None]))
    plain, exact, rounded = found
    assert (exact - plain).norm() < 1e-4 * plain.norm()
    assert (rounded - plain).norm() < 2e-2 * plain.norm()


def test_an_encoder_of_the_bases_layers_is_refused_where_they_are_cut_up(gist_run):
    for kind, refused in (("base", True), ("transformer", False)):
        stage = stage_of([*gist_run, f"gistnet.type={kind}", "gistnet.layers=1"])
        stage._trainer = SimpleNamespace(strategy=FSDPStrategy(), world_size=1, precision="32-true")
        if refused:
            with pytest.raises(ValueError, match="gistnet.type=base is not allowed with trainer=fsdp"):
                stage.setup("fit")
        else:
            stage.setup("fit")


@pytest.mark.slow
def test_a_run_over_kept_prefills_has_the_same_bits_the_first_time_and_afterwards(gist_run, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path / "cache"))
    weights = []
    for name in "ab":
        given = [o for o in gist_run if not o.startswith("folder=")]
        assert run([*given, "stage.prefills.gigabytes=1", f"folder={tmp_path / name}"]) == 0
        weights.append(torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    assert list((tmp_path / "cache" / "prefills").rglob("*.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_a_batch_without_a_pair_for_the_contrastive_term_ends_no_run_and_is_counted(gist_run, tmp_path, texts):
    for path in sorted(
        texts.iterdir()
    ):  # one text has room for a pair; the others, and so nearly all batches, have not
        (tmp_path / path.name).write_text(path.read_text()[:150])
    (tmp_path / "long.md").write_text(sorted(texts.glob("*.md"))[0].read_text())
    short = ["horizon.tokens=4", "preset.min_tokens=68", "preset.max_tokens=100", f"data.path={tmp_path}", "seed=3"]
    short += ["preset.batch=1", "data.weights={narrative: null, code: null, structured: 0}", "preset.steps=6"]
    assert run([*gist_run, *short, "contrastive.weight=0.1"]) == 0
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/contrastive"]]
    counts = [float(row["train/contrastive_without_pairs"]) for row in rows]
    assert counts == sorted(counts) and counts[-1] > 0
    assert any(float(row["train/contrastive"]) == 0 for row in rows)


def test_a_contrastive_term_that_can_never_have_a_pair_is_refused(gist_run, tmp_path, capsys):
    short = ["horizon.tokens=4", "preset.min_tokens=68", "preset.max_tokens=90", "contrastive.weight=0.1"]
    assert run([*gist_run, *short]) == 2
    assert "contrastive.weight=0.1 is not allowed here: no training document has 96 tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_texts_that_changed_since_a_stop_are_refused_by_auto_and_told_to_a_path(gist_run, tmp_path, texts, capsys):
    shutil.copytree(texts, tmp_path / "texts")
    own = [*gist_run, f"data.path={tmp_path / 'texts'}", "preset.validate_every=1"]
    assert run([*own, "preset.steps=1"]) == 0
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["source"] == Files(str(tmp_path / "texts")).fingerprint()
    path = sorted((tmp_path / "texts").glob("*.py"))[0]
    times = path.stat()
    path.write_text(path.read_text().replace("e", "a"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    capsys.readouterr()
    assert run([*own, "preset.steps=2", "resume=auto"]) == 2
    assert "the texts of data.source have changed since this run was stopped" in capsys.readouterr().err
    own[[o.startswith("folder=") for o in own].index(True)] = f"folder={tmp_path / 'other'}"
    assert run([*own, "preset.steps=2", f"resume={tmp_path / 'run'}"]) == 0
    assert "changed: the texts of data.source: fingerprint" in capsys.readouterr().out


def test_an_option_at_a_place_of_the_users_own_is_composed_like_any_other(gist_run, capsys):
    assert run([*gist_run, "+loss@loss.other=block"]) == 2
    assert "loss=other is not known, allowed are block" in capsys.readouterr().err
