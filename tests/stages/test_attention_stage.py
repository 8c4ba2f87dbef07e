"""Adapters that learn to read under another attention."""

import json

import pytest
import torch

from megactx.framework.app import run
from megactx.lm.adapters import adapters_of
from megactx.stages.attention import AttentionStage
from megactx.studies.mega_attention import main


@pytest.fixture(scope="module")
def settings(joint_settings):
    left = ("stage.lens", "lensnet", "datamodule", "stage.budgets", "stage.evaluate", "horizon")
    shared = [override for override in joint_settings if not override.startswith(left)]
    own = ["steps=4", "batch=2", "validate_every=2", "validation_documents=2", "plateau_window=4"]
    return [
        "experiment=mega_attention",
        *shared,
        *(f"preset.{setting}" for setting in own),
        *["data.min_tokens=300", "data.max_tokens=320", "stage.evaluate.documents=3", "horizon.tokens=8"],
        *["attention.segment=64", "attention.mid=64", "attention.live=64", "attention.window=100"],
    ]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention") / "run"
    assert run([*settings, f"folder={folder}"]) == 0
    return folder


def weights(folder) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_adapters_alone_learn_and_are_kept(whole):
    loaded = AttentionStage.load_from_checkpoint(whole / "checkpoints" / "last.ckpt", weights_only=True)
    names = adapters_of(loaded.base)
    kept = {name for name in weights(whole) if name.startswith("base.")}
    assert kept == {f"base.{name}" for name in names} and len(kept) > 4
    assert all(p.abs().max() > 0 for name, p in names.items() if "lora_B" in name), "some of it was not trained"
    assert {id(p) for p in names.values()} == {id(p) for p in loaded.groups()[0]["params"]}
    learning = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert learning == kept


def test_the_report_has_full_attention_and_the_mask_before_and_after(whole):
    rows = json.loads((whole / "report.json").read_text())["table"]
    found = {(row["metric"], row["carrier"], row.get("span")): row["point"] for row in rows}
    assert found["dnll", "full attention", "settled"] == 0
    assert {row["carrier"] for row in rows} == {"full attention", "mega, trained", "mega, untrained"}
    assert 0 < found["pairs", "mega, trained", None] < 1
    header = (whole / "metrics.csv").read_text().split("\n")[0].split(",")
    assert {"train/kl", "train/dnll", "val/dnll", "val/kl"} <= set(header)


@pytest.mark.slow
def test_a_run_that_is_interrupted_goes_on_to_the_same_weights(settings, whole, tmp_path, monkeypatch):
    step = AttentionStage.training_step

    def stopped(stage, batch):
        if stage.global_step == 3:
            raise KeyboardInterrupt
        return step(stage, batch)

    with monkeypatch.context() as patch:
        patch.setattr(AttentionStage, "training_step", stopped)
        assert run([*settings, f"folder={tmp_path / 'run'}"]) == 130
    assert run([*settings, f"folder={tmp_path / 'run'}", "resume=auto"]) == 0
    mine, theirs = weights(tmp_path / "run"), weights(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_runs_are_compared_on_the_same_documents(settings, whole, texts, tmp_path, capsys):
    control = tmp_path / "control"
    assert run([*settings, "attention=window", "attention.window=40", "preset.steps=2", f"folder={control}"]) == 0
    capsys.readouterr()
    options = ["--path", str(texts), "--tokens", "300", "--documents", "2", "--out", str(tmp_path / "out")]
    assert main([*options, "--trained", str(whole), str(control)]) == 0
    shown = capsys.readouterr().out
    assert "run: mega, trained" in shown and "control: window, trained" in shown and "mega without gists" in shown


def test_plain_attention_without_training_costs_nothing(settings, whole):
    stage = AttentionStage.load_from_checkpoint(whole / "checkpoints" / "last.ckpt", weights_only=True)
    ids = torch.randint(50, (1, 90))
    context = stage.window(ids)
    with torch.no_grad():
        plain = stage.base(stage.base.embed(ids), None)
        for p in adapters_of(stage.base).values():
            p.zero_()
        before = stage.base(stage.base.embed(ids), None)
        assert not torch.allclose(plain, before)
        assert torch.allclose(stage.untrained(stage.attention, context), stage.attention.read(stage.base, context))


def test_windows_with_gists_keep_the_sink_and_the_live_region_raw(whole):
    stage = AttentionStage.load_from_checkpoint(whole / "checkpoints" / "last.ckpt", weights_only=True)
    stage.hparams.coarse = 1.0
    torch.manual_seed(0)
    shown = [stage.coarsened(320) for _ in range(20)]
    assert any(chosen.any() for chosen in shown)
    for chosen in shown:
        assert not chosen[0] and not chosen[(320 - 128) // 8 :].any()
        context = stage.window(torch.randint(50, (1, 320)), chosen)
        assert int((context.lods()[0] == 1).sum()) == int(chosen.sum()) and int(context.ends()) == 320


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention.segment=60", "attention.segment=60 is not allowed"),
        ("stage.lora.rank=0", "stage.lora.rank=0 is not allowed"),
        ("block_size=16", "block_size: the compressor has 8"),
    ],
)
def test_a_users_mistake_is_one_clear_message(settings, override, message, tmp_path, capsys):
    assert run([*settings, override, f"folder={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
