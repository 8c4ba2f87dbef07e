"""A core that learns to read its facts: the loss against plain passes, and a run that goes on exactly."""

import csv
import json

import pytest
import torch
import torch.nn.functional as F

from megactx.data.knowledge_module import CaseBatches, Cases
from megactx.data.tokenizer import load_tokenizer
from megactx.framework.app import run
from megactx.lm import BaseLM
from megactx.stages.core import CoreStage

PROSE = ["Nothing is told of anybody here.", "It goes on like that for a while.", "Some readers skip such lines."]
SETTINGS = dict(config=None, muon_lr=0.01, adamw_lr=1e-3, weight_decay=0.0, warmup=1, decay=0.5, max_steps=4)
SETTINGS |= dict(card={"name": "x", "data": "people"}, evaluate={"questions": 6}, margin=0.5)
CASES = dict(block=32, tokens=400, entities=3, between=1, changed=0.5, hops=0.3, seed=0)


def built(base_folder, knowledge: bool, margin=0.5) -> tuple[CoreStage, Cases]:
    cases = Cases(PROSE, load_tokenizer(base_folder), knowledge=knowledge, **CASES)
    return CoreStage(knowledge=knowledge, weights=str(base_folder), **SETTINGS | {"margin": margin}), cases


def plain_nll(model, window: list[int], case) -> torch.Tensor:
    """Nats of the answer behind a window, by the model's own forward pass over it alone."""
    answer = case.values[case.right]
    ids = torch.tensor([*window, *case.asked, *answer])
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return F.cross_entropy(logits[-len(answer) :], ids[-len(answer) :], reduction="sum")


@pytest.mark.parametrize("margin", [0.5, 40.0])
def test_the_loss_and_its_gradients_are_those_of_plain_passes_question_by_question(base_folder, margin):
    stage, cases = built(base_folder, True, margin)
    batch = {name: torch.as_tensor(value) for name, value in CaseBatches(cases, 3)[1].items()}
    found = stage.losses(batch)
    model, total = stage.base.model, 0.0
    for n in range(3):
        case = cases[3 + n]
        full, drop = (plain_nll(model, window, case) for window in (case.window, case.dropped))
        hinge = margin - (drop - full)
        torch.testing.assert_close(found["full"][n], full, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["drop"][n], drop, rtol=1e-4, atol=1e-4)
        total = total + (full + (hinge if hinge > 0 else 0.0)) / 3
    mine = found["full"].mean() + found["margin"].mean()
    torch.testing.assert_close(mine, total, rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(x, parameters) for x in (mine, total)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_no_question_of_the_control_reads_a_block(base_folder):
    stage, cases = built(base_folder, False)
    batch = {name: torch.as_tensor(value) for name, value in CaseBatches(cases, 3)[0].items()}
    before = stage.losses(batch)
    assert [*before] == ["full"]
    for row, answers in zip(batch["ids"], batch["answers"], strict=True):
        row[int(answers.nonzero()[-1]) + 1 :] = 7
    torch.testing.assert_close(stage.losses(batch)["full"], before["full"])
    for n, nll in enumerate(before["full"]):
        torch.testing.assert_close(nll, plain_nll(stage.base.model, [cases.bos], cases[n]), rtol=1e-4, atol=1e-4)


@pytest.fixture
def arguments(base_folder, texts):
    small = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    found = ["experiment=cognitive_core", "data=files", f"data.path={texts}", f"base.name={base_folder}"]
    found += [f"stage.config.{name}={value}" for name, value in small.items()]
    found += ["datamodule.tokens=400", "datamodule.batch=2", "datamodule.validation_questions=3"]
    found += ["stage.evaluate.questions=6", "preset.steps=3", "preset.validate_every=2", "preset.warmup=1"]
    return [*found, "trainer=cpu", "trainer.log_every_n_steps=1"]


@pytest.mark.slow
def test_a_run_from_random_weights_ends_with_a_table_and_a_model_and_goes_on_exactly(
    arguments, tmp_path, capsys, monkeypatch
):
    assert run([*arguments, f"folder={tmp_path / 'whole'}"]) == 0, capsys.readouterr().err
    model = tmp_path / "whole" / "model"
    assert f"megactx.studies.cognitive_core --model {model}" in capsys.readouterr().out
    table = json.loads((tmp_path / "whole" / "report.json").read_text())["table"]
    assert {row["carrier"] for row in table if row["metric"] == "accuracy"} == {"with", "dropped", "without"}
    assert {row["point"] for row in table if row["metric"] == "chance"} == {1 / 8}
    with next((tmp_path / "whole").rglob("metrics.csv")).open() as file:
        names = csv.DictReader(file).fieldnames
    assert {"train/nll", "train/nll_drop", "train/margin", "val/nll", "val/margin", "val/accuracy"} <= {*names}
    assert BaseLM.from_pretrained(str(model)).width == 32
    assert "drop margin: 0.5 nat" in (model / "README.md").read_text()

    step, count = CoreStage.training_step, []

    def stops(self, batch):
        count.append(1)
        if len(count) == 3:
            raise RuntimeError("the power is gone")
        return step(self, batch)

    monkeypatch.setattr(CoreStage, "training_step", stops)
    assert run([*arguments, f"folder={tmp_path / 'part'}"]) == 3
    monkeypatch.setattr(CoreStage, "training_step", step)
    assert run([*arguments, f"folder={tmp_path / 'part'}", "resume=auto"]) == 0
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "part")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_control_trains_and_does_not_rely_on_blocks(arguments, tmp_path, capsys):
    assert run([*arguments, "stage.knowledge=false", f"folder={tmp_path}"]) == 0, capsys.readouterr().err
    table = json.loads((tmp_path / "report.json").read_text())["table"]
    assert {row["point"] for row in table if row["metric"] == "CKRI"} == {0.0}
    assert "the control without knowledge" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("stage.margin=-1", "stage.margin=-1"),
        ("datamodule.tokens=600", "datamodule.tokens=600 is not allowed: the base LM takes 512 at most"),
        ("datamodule.tokens=64", "datamodule.tokens=64 is not allowed: too few"),
        ("stage.init=x", "stage.init"),
    ],
)
def test_settings_that_make_no_windows_are_refused(arguments, change, said, tmp_path, capsys):
    assert run([*arguments, change, f"folder={tmp_path / 'run'}"]) == 2
    assert said in capsys.readouterr().err
