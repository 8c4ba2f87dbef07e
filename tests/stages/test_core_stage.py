"""A core that learns to read its facts: the loss against plain passes, and a run that goes on exactly."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megactx.data.knowledge_module import CaseBatches, Cases
from megactx.data.tokenizer import load_tokenizer
from megactx.framework.app import run
from megactx.lm import BaseLM
from megactx.lm.adapters import adapters_of
from megactx.stages.core import CoreStage

PROSE = ["Nothing is told of anybody here.", "It goes on like that for a while.", "Some readers skip such lines."]
SETTINGS = dict(config=None, muon_lr=0.01, adamw_lr=1e-3, weight_decay=0.0, warmup=1, decay=0.5, max_steps=4)
SETTINGS |= dict(card={"name": "x", "data": "people"}, evaluate={"questions": 6}, margin=0.5)
NO_LORA = {"rank": 0, "layers": "all", "embeddings": False}
CASES = dict(block=32, tokens=400, entities=3, between=1, changed=0.5, hops=0.3, alike=0.0, questions=4, seed=0)
CASES |= dict(session=0)


def built(base_folder, knowledge=True, margin=0.5, text=0.0, lora=NO_LORA) -> tuple[CoreStage, Cases]:
    cases = Cases(PROSE, load_tokenizer(base_folder), **CASES)
    settings = SETTINGS | {"margin": margin, "text": text, "lora": lora}
    return CoreStage(knowledge=knowledge, weights=str(base_folder), **settings), cases


def tensors(batch: dict) -> dict:
    return {name: torch.as_tensor(value) for name, value in batch.items()}


def plain_nll(model, window: list[int], pair) -> torch.Tensor:
    """Nats of the answer behind a window, by the model's own forward pass over it alone."""
    asked, answer = pair
    ids = torch.tensor([*window, *asked, *answer])
    logits = model(input_ids=ids[None]).logits[0, :-1]
    return F.cross_entropy(logits[-len(answer) :], ids[-len(answer) :], reduction="sum")


@pytest.mark.parametrize("margin", [0.5, 40.0])
def test_the_loss_and_its_gradients_are_those_of_plain_passes_question_by_question(base_folder, margin):
    stage, cases = built(base_folder, margin=margin)
    found = stage.losses(tensors(CaseBatches(cases, 3)[1]))
    model, full, hinges = stage.base.model, [], []
    for case in (cases[3], cases[4], cases[5]):
        full += [plain_nll(model, case.window, pair) for pair in (case.pair, *case.more)]
        first, drop = (plain_nll(model, window, case.pair) for window in (case.window, case.dropped))
        hinges.append(F.relu(margin - (drop - first)))
    assert len(full) > 6
    torch.testing.assert_close(found["full"], torch.stack(full), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["margin"], torch.stack(hinges), rtol=1e-4, atol=1e-4)
    mine = found["full"].mean() + found["margin"].mean()
    plain = torch.stack(full).mean() + torch.stack(hinges).mean()
    parameters = list(model.parameters())
    for one, other in zip(*(torch.autograd.grad(x, parameters) for x in (mine, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("knowledge", [True, False])
def test_the_text_of_a_window_is_learned_where_that_is_asked_for(base_folder, knowledge):
    stage, cases = built(base_folder, knowledge, text=0.5)
    batch = tensors(CaseBatches(cases, 3)[1])
    found, plain = stage.losses(batch), []
    for case in (cases[3], cases[4], cases[5]):
        ids = torch.tensor(case.window)
        plain.append(F.cross_entropy(stage.base.model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none"))
    torch.testing.assert_close(found["text"], torch.cat(plain), rtol=1e-4, atol=1e-4)
    said = {}
    stage._over_processes = lambda *values: torch.stack(values)
    stage._trainer = SimpleNamespace(datamodule=SimpleNamespace(tokens=lambda steps: 0), global_step=0)
    stage.log = lambda name, value, **rest: said.update(
        {name: float(value.detach() if hasattr(value, "detach") else value)}
    )
    loss = stage.training_step(batch)
    rest = found["full"].mean() + (found["margin"].mean() if knowledge else 0.0)
    torch.testing.assert_close(loss, rest + 0.5 * found["text"].mean())
    assert said["train/nll_text"] == pytest.approx(float(found["text"].detach().mean()), rel=1e-5)


def test_without_a_margin_there_is_no_second_pass(base_folder):
    stage, cases = built(base_folder, margin=0.0)
    batch = tensors(CaseBatches(cases, 2)[0])
    assert [*stage.losses({name: value for name, value in batch.items() if "dropped" not in name})] == ["full"]


def test_no_question_of_the_control_reads_a_block(base_folder):
    stage, cases = built(base_folder, knowledge=False)
    batch = tensors(CaseBatches(cases, 3)[0])
    before = stage.losses(batch)
    assert [*before] == ["full"]
    batch["window"][:, 1:] = 7
    torch.testing.assert_close(stage.losses(batch)["full"], before["full"])
    pairs = [pair for case in (cases[0], cases[1], cases[2]) for pair in (case.pair, *case.more)]
    for nll, pair in zip(before["full"], pairs, strict=True):
        torch.testing.assert_close(nll, plain_nll(stage.base.model, [cases.bos], pair), rtol=1e-4, atol=1e-4)


def test_with_adapters_nothing_else_learns(base_folder):
    stage, cases = built(base_folder, lora={"rank": 4, "layers": "all", "embeddings": False})
    learn = {p for group in stage.groups() for p in group["params"]}
    assert learn == {*adapters_of(stage.base).values()} == {p for p in stage.parameters() if p.requires_grad}
    found = stage.losses(tensors(CaseBatches(cases, 2)[0]))
    (found["full"].mean() + found["margin"].mean()).backward()
    assert all(p.grad is not None for p in learn) and any(p.grad.any() for p in learn)


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
    arguments, tmp_path, capsys, dies_at
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

    dies_at(CoreStage, "training_step", 3)
    assert run([*arguments, f"folder={tmp_path / 'part'}"]) == 3
    assert run([*arguments, f"folder={tmp_path / 'part'}", "resume=auto"]) == 0
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "part")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_core_with_adapters_is_a_plain_model_at_the_end_that_says_what_the_run_said(arguments, tmp_path, capsys):
    found = ["stage.config=null", "preset.steps=2", "preset.validate_every=2", "stage.adamw_lr=0.05"]
    base = next(argument.removeprefix("base.name=") for argument in arguments if argument.startswith("base.name="))
    mine = [argument for argument in arguments if not argument.startswith("stage.config.")]
    mine += [*found, f"stage.weights={base}", "stage.lora.rank=4", f"folder={tmp_path}"]
    assert run(mine) == 0, capsys.readouterr().err
    trained, before = (BaseLM.from_pretrained(str(folder), "float32").model for folder in (tmp_path / "model", base))
    assert not any("lora" in name for name, _ in trained.named_parameters())
    kept = {name: p.bfloat16().float() for name, p in before.named_parameters()}  # as the model is kept
    # Behind the embedding rows that were there stand those of a chat template.
    moved = {name for name, p in trained.named_parameters() if not torch.equal(p[: len(kept[name])], kept[name])}
    assert moved and all("self_attn" in name for name in moved)
    assert "adapters of rank 4" in (tmp_path / "model" / "README.md").read_text()


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
