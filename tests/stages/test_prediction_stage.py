"""A readout that learns to foretell the next gist, from texts that are read once."""

import csv
import json

import pytest
import torch

from megactx.framework.app import run
from megactx.lm import BaseLM
from megactx.memory import prediction
from megactx.parts.read import load_prediction
from megactx.stages.prediction import PredictionStage
from megactx.studies.prediction import main as ranked
from megactx.studies.prediction import models_of, stage_of
from megactx.studies.speculative import main as decoded


@pytest.fixture(scope="module")
def settings(joint_settings):
    left = ("stage.lens", "lensnet", "datamodule", "stage.budgets", "stage.evaluate", "horizon", "stage.lora")
    shared = [override for override in joint_settings if not override.startswith(left)]
    own = ["steps=6", "batch=2", "validate_every=3", "validation_documents=2", "plateau_window=6"]
    return [
        "experiment=mega_prediction",
        *shared,
        *(f"preset.{setting}" for setting in own),
        *["data.min_tokens=300", "data.max_tokens=320", "stage.evaluate.documents=4", "horizon.tokens=8"],
        *["stage.readout.levels=2", "stage.lr=0.01", "base.dtype=bfloat16"],  # as many bases are stored
    ]


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prediction") / "run"
    assert run([*settings, f"folder={folder}"]) == 0
    return folder


def settings_of_base(settings) -> str:
    return next(s.partition("=")[2] for s in settings if s.startswith("base.name="))


def weights(folder) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_the_readout_alone_learns_and_the_report_has_its_controls(whole):
    stage = PredictionStage.load_from_checkpoint(whole / "checkpoints" / "last.ckpt", weights_only=True)
    learning = {name for name, p in stage.named_parameters() if p.requires_grad}
    assert learning and all(name.startswith("readout.") for name in learning)
    fresh = prediction.Readout(32, levels=2).state_dict()
    assert all(not torch.equal(value, fresh[name]) for name, value in stage.readout.state_dict().items())
    rows = json.loads((whole / "report.json").read_text())["table"]
    told = {(row["carrier"], row["span"]) for row in rows if row["metric"] == "mrr"}
    assert told == {
        (name, span)
        for name in ("readout", "newest gist again", "mean gist", "map of the newest gist")
        for span in ("level 1", "level 2")
    }
    header = (whole / "metrics.csv").read_text().split("\n")[0].split(",")
    assert {"train/loss", "train/control", "val/loss", "val/control"} <= set(header)
    with (whole / "metrics.csv").open(newline="") as file:
        ranks = [(float(row["val/mrr"]), float(row["val/mrr_map"])) for row in csv.DictReader(file) if row["val/mrr"]]
    assert ranks and all(1 / 256 <= value <= 1 for pair in ranks for value in pair)


def test_a_text_is_read_once(whole, monkeypatch):
    stage = PredictionStage.load_from_checkpoint(whole / "checkpoints" / "last.ckpt", weights_only=True).train()
    read, whole_read = [], prediction.prefill
    monkeypatch.setattr(prediction, "prefill", lambda base, ids: (read.append(len(ids[0])), whole_read(base, ids))[1])
    ids = torch.randint(50, (90,))
    first, again = stage.example(ids), stage.example(ids.clone())
    assert read == [90] and all(map(torch.equal, sum(first.levels, ()), sum(again.levels, ())))
    stage.hparams.kept = 2
    for length in (40, 50):
        stage.example(ids[:length])
    stage.example(ids)
    assert read == [90, 40, 50, 90], "the oldest went"


def test_the_folder_of_the_readout_is_that_of_the_run(whole):
    stage = PredictionStage.load_from_checkpoint(whole / "checkpoints" / "best.ckpt", weights_only=True)
    own, kept = stage.readout.state_dict(), load_prediction(whole / "prediction", stage.gistnet).state_dict()
    assert all(torch.allclose(own[name], kept[name], rtol=1e-2, atol=1e-3) for name in own)
    with torch.no_grad():
        next(stage.gistnet.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="was trained with another GistNet"):
        load_prediction(whole / "prediction", stage.gistnet)


def goes_on_exactly(settings, tmp_path, monkeypatch) -> dict:
    """Stop ``run`` at step 4 and go on: it ends as ``whole`` has; -> its weights."""
    step = PredictionStage.training_step

    def stopped(stage, batch):
        if stage.global_step == 4:
            raise KeyboardInterrupt
        return step(stage, batch)

    with monkeypatch.context() as patch:
        patch.setattr(PredictionStage, "training_step", stopped)
        assert run([*settings, f"folder={tmp_path / 'run'}"]) == 130
    assert run([*settings, f"folder={tmp_path / 'run'}", "resume=auto"]) == 0
    mine, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    return mine


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [0, 1])
def test_a_run_that_is_interrupted_goes_on_to_the_same_weights(settings, gigabytes, tmp_path, monkeypatch):
    settings = [*settings, f"stage.prefills.gigabytes={gigabytes}"]
    assert run([*settings, f"folder={tmp_path / 'whole'}"]) == 0
    goes_on_exactly(settings, tmp_path, monkeypatch)


def test_ranks_and_entries_on_other_texts_and_drafts_behind_them(whole, texts, tmp_path, capsys):
    shared = ["--path", str(texts), "--documents", "2", "--out", str(tmp_path / "out")]
    assert ranked([str(whole), *shared, "--tokens", "300", "--entries", "1", "--worth", "2"]) == 0
    shown = capsys.readouterr().out
    assert "what opening a block is worth" in shown and "tokens like the newest" in shown
    assert "map of the newest gist" in shown and "its own gist" in shown
    assert ranked([str(whole), *shared, "--tokens", "300", "--worth", "3"]) == 2
    assert "--worth=3, --entries=0: allowed is at most --documents=2" in capsys.readouterr().err
    assert decoded([str(whole), *shared, "--prompt", "200", "--answer", "16", "--budget", "400"]) == 0
    shown = capsys.readouterr().out
    assert "block of the foretold gist" in shown and "2 of 2" in shown


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "scratch"])
def test_a_base_that_learns_too_foretells_gists_of_the_base_as_it_was_and_goes_on_exactly(
    settings, kind, texts, tmp_path, monkeypatch, capsys
):
    settings = [*settings, f"stage.train_base={kind}", "stage.lora.rank=4", "stage.base_lr=0.01"]
    assert run([*settings, f"folder={tmp_path / 'whole'}"]) == 0, capsys.readouterr().err
    mine = goes_on_exactly(settings, tmp_path, monkeypatch)

    stage, frozen = stage_of(str(tmp_path / "run")), settings_of_base(settings)
    learned = {name for name in mine if name.startswith("reader." if kind == "scratch" else "base.")}
    assert learned and all(kind == "scratch" or "lora" in name for name in learned)
    ids = torch.randint(50, (90,))
    with torch.no_grad():
        example, cost = stage.read_by(ids)
        reader = stage.reader or stage.base
        logits = reader.model(input_ids=ids[None]).logits[0].float()
        then = prediction.example_of(BaseLM.from_pretrained(frozen, "float32"), stage.gistnet, ids, 2)
    torch.testing.assert_close(cost, torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none"))
    assert not torch.allclose(example.of(1)[0], then.of(1)[0], atol=1e-3)  # it reads otherwise
    torch.testing.assert_close(example.of(1)[1], then.of(1)[1], rtol=1e-2, atol=1e-3)  # what is foretold is the same
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        costs = [float(row["train/nll"]) for row in csv.DictReader(file) if row.get("train/nll")]
    assert costs[-1] < costs[0] - 0.02 if kind == "scratch" else len({*costs}) > 1
    assert "base LM that learned" in (tmp_path / "run" / "report.md").read_text()
    assert not (tmp_path / "run" / "prediction").exists()
    shared = ["--path", str(texts), "--documents", "2", "--tokens", "300", "--out", str(tmp_path / "out")]
    assert ranked([str(tmp_path / "run"), *shared]) == 0
    assert ranked([str(tmp_path / "run"), *shared, "--entries", "1"]) == (2 if kind == "scratch" else 0)
    short = [*shared[:4], "--prompt", "200", "--answer", "8", "--budget", "400", "--out", str(tmp_path / "out")]
    assert decoded([str(tmp_path / "run"), *short]) == (2 if kind == "scratch" else 0)


def test_where_the_weight_is_0_a_base_learns_nothing_from_the_readout(whole):
    about = torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["hyper_parameters"]
    gradients = []
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        stage = PredictionStage(**about | {"train_base": "scratch", "weight": weight})
        stage.set_dtype(torch.float32)
        example, cost = stage.read_by(torch.randint(50, (90,)))
        losses = stage.losses([example])
        learned = [p for p in stage.reader.parameters() if p.requires_grad]
        for loss in (losses[0], cost.mean()):
            found = torch.autograd.grad(loss, learned, retain_graph=True, allow_unused=True)
            gradients.append(sum(float(part.abs().sum()) for part in found if part is not None))
        losses.sum().backward()
        assert stage.readout.readouts[0].weight.grad.abs().sum() > 0
    assert gradients[0] == 0 < gradients[2]  # of the readout, by weight
    assert gradients[1] > 0 < gradients[3]  # of the next tokens, always


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stage.readout.levels=3", "levels=3 is not allowed"),
        ("stage.readout.head=deep", "head=deep"),
        ("block_size=16", "block_size: the compressor has 8"),
    ],
)
def test_a_users_mistake_is_one_clear_message(settings, override, message, tmp_path, capsys):
    assert run([*settings, override, f"folder={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_a_study_reads_in_fp32_whatever_the_weights_were_stored_in(whole):
    models = models_of(str(whole))
    parts = (models.base, models.gistnet, models.prediction)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


def test_a_model_without_a_readout_is_told(base_folder, tmp_path, capsys):
    assert ranked([str(base_folder), "--out", str(tmp_path)]) == 2
    assert "there is no readout for it" in capsys.readouterr().err
