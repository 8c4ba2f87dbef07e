"""What answers teach: the packed loss and its gradients against plain passes, and a run that ends in a chat."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megactx.data.packing import ConversationBatches
from megactx.data.tasks import Tasks
from megactx.data.tokenizer import load_chat_tokenizer, train_tokenizer
from megactx.data.turns import Turns, tokenised_conversations, unmarked
from megactx.framework.app import run
from megactx.lm import BaseLM
from megactx.stages.sft import SFTStage

SETTINGS = dict(config=None, muon_lr=0.01, adamw_lr=1e-3, weight_decay=0.0, warmup=1, decay=0.5, max_steps=4)
SETTINGS |= dict(card={"name": "x", "data": "tasks"}, evaluate={"documents": 6})


@pytest.fixture
def stage(base_folder):
    return SFTStage(weights=str(base_folder), **SETTINGS)


@pytest.fixture(scope="module")
def batches(base_folder):
    tokenizer = load_chat_tokenizer(base_folder)
    rows = tokenised_conversations(Tasks(30), tokenizer, 200, "tasks")
    return ConversationBatches(rows, 256, 2, padding=tokenizer.pad_token_id, seed=0)


def plain_losses(model, texts) -> torch.Tensor:
    """The NLL of answers of each conversation alone, by the model's own forward pass, in order."""
    found = []
    for text in texts:
        ids, answers = map(torch.as_tensor, unmarked(np.asarray(text)))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        found.append(F.cross_entropy(logits, ids[1:], reduction="none")[answers[1:]])
    return torch.cat(found)


def test_the_packed_loss_and_its_gradients_are_those_of_one_plain_pass_per_conversation(stage, batches):
    batch = {name: torch.as_tensor(value) for name, value in batches[0].items()}
    assert batch["conversation"].max() > 0, "several share a row"
    texts = [batches.texts[index] for number in (0, 1) for index in batches._pack(number)]
    mine, theirs = stage.losses(batch), plain_losses(stage.base.model, texts)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    parameters = list(stage.base.model.parameters())
    for one, other in zip(*(torch.autograd.grad(x.mean(), parameters) for x in (mine, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_a_conversation_does_not_see_its_neighbours_and_padding_changes_nothing(stage, batches):
    batch = {name: torch.as_tensor(value) for name, value in batches[0].items()}
    before = stage.losses(batch)
    changed = {name: value.clone() for name, value in batch.items()}
    first = batch["conversation"][0] == 0
    changed["ids"][0][first] = changed["ids"][0][first].flip(0)
    changed["ids"][batch["conversation"] < 0] = 7
    after, own = stage.losses(changed), int((batch["answers"][0] & first).sum())
    torch.testing.assert_close(after[own:], before[own:])
    assert not torch.allclose(after[:own], before[:own])


def test_a_base_without_a_template_gets_rows_for_its_signs_and_the_others_stay_as_they_are(stage, base_folder):
    before = BaseLM.from_pretrained(str(base_folder), "float32").model.get_input_embeddings().weight
    after = stage.base.model.get_input_embeddings().weight
    assert len(after) == len(before) + 4 and torch.equal(after[: len(before)], before)
    torch.testing.assert_close(after[-1], before.mean(0))


@pytest.mark.slow
def test_a_run_on_files_ends_with_a_model_that_chat_talks_with_and_goes_on_exactly(
    base_folder, tmp_path, capsys, monkeypatch, dies_at
):
    rows = [json.dumps({"messages": row["messages"]}) for row in Tasks(60).documents()]
    (tmp_path / "talk.jsonl").write_text("\n".join(rows))
    arguments = ["experiment=sft", "conversations=files", f"conversations.path={tmp_path / 'talk.jsonl'}"]
    arguments += [f"base.name={base_folder}", "datamodule.sources.tasks.conversations=20", "datamodule.tokens=256"]
    arguments += ["datamodule.batch=2", "preset.steps=4", "preset.validate_every=2", "preset.warmup=1", "trainer=cpu"]
    assert run([*arguments, f"folder={tmp_path / 'whole'}"]) == 0, capsys.readouterr().err
    model = tmp_path / "whole" / "model"
    assert f"--model {model}" in capsys.readouterr().out
    assert "on answers and the ends of their turns" in (model / "README.md").read_text()
    base = BaseLM.from_pretrained(str(model))
    assert base.tokenizer.chat_template and base.model.generation_config.eos_token_id == [515]
    from megactx.apps.chat import main as chat

    (tmp_path / "asked").write_text("Add 12 and 30.\n")
    with (tmp_path / "asked").open() as asked:
        monkeypatch.setattr("sys.stdin", asked)
        assert chat(["--model", str(model), "--megacontext", "none", "--tokens", "4"]) == 0

    dies_at(SFTStage, "training_step", 4)
    assert run([*arguments, f"folder={tmp_path / 'part'}"]) == 3
    assert run([*arguments, f"folder={tmp_path / 'part'}", "resume=auto"]) == 0
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "part")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.skipif("MEGACTX_TRL" not in os.environ, reason="MEGACTX_TRL names a Python with trl")
def test_answers_are_those_of_another_library_on_the_same_rows(tmp_path):
    texts = [turn["content"] for row in Tasks(200).documents() for turn in row["messages"]]
    tokenizer = train_tokenizer(texts, 600, progress=False, chat=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    talks = [row["messages"] for row in Tasks(200, seed=1).documents()]
    (tmp_path / "rows.json").write_text(json.dumps(talks))
    script = Path(__file__).with_name("trl_masks.py")
    subprocess.run([os.environ["MEGACTX_TRL"], script, tmp_path], check=True, env={**os.environ, "PYTHONPATH": ""})
    theirs = json.loads((tmp_path / "labels.json").read_text())
    turns = Turns(tokenizer)
    for talk, row in zip(talks, theirs, strict=True):
        ids, answers = turns(talk)
        assert row["input_ids"] == ids.tolist()
        assert row["labels"] == np.where(answers, ids, -100).tolist()
