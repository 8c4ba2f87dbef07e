"""Keys are trained on questions about blocks, and measured on words and texts that they never saw."""

import json
import random
import shutil

import pytest
import torch

from megactx.focus import key_training as training
from megactx.focus.keys import KeyNet
from megactx.parts.models import load_models
from megactx.parts.read import load_keys
from megactx.stages import keys as stage
from megactx.studies import keys as study
from megactx.studies.keys import main

K = 8


def test_facts_stand_where_it_is_said_and_none_over_another():
    ids, facts = torch.zeros(160, dtype=torch.long), [[n] * 11 for n in range(1, 6)]
    places = training.put(ids, facts, K, random.Random(0))
    for n, blocks in enumerate(places, 1):
        at = (ids == n).nonzero()[:, 0]
        assert len(at) == 11 and sorted({*(at // K).tolist()}) == blocks


def test_a_question_of_a_text_is_of_the_block_that_holds_it():
    ids, draw = torch.arange(160), random.Random(0)
    for _ in range(50):
        asked = training.of_text(ids, K, [([1000], [1001])], draw)
        assert asked.ids[0] == 1000 and asked.ids[-1] == 1001 and asked.blocks
        assert {token // K for token in asked.ids[1:-1]} & {*asked.blocks}


def test_the_loss_is_infonce_over_all_blocks_and_null():
    torch.manual_seed(0)
    net = KeyNet(torch.randn(40, 32), 16)
    documents = torch.randint(40, (2, 3, K))
    asked = [[training.Asked("text", [1, 2], [1])], [training.Asked("nothing", [3], [])]]
    hard = torch.randint(40, (2, K))
    keys = net(torch.cat([documents.flatten(0, 1), hard]))
    found = torch.stack([net.scale * net(torch.tensor([ids]))[0] @ keys.T for ids in ([1, 2], [3])])
    found = torch.cat([found, net.null.expand(2, 1)], dim=1)
    expected = -(found.log_softmax(1)[0, 1] + found.log_softmax(1)[1, -1]) / 2
    torch.testing.assert_close(training.loss(net, documents, asked, hard), expected)


def test_a_fact_that_another_document_was_told_too_is_no_wrong_answer():
    torch.manual_seed(0)
    net = KeyNet(torch.randn(40, 32), 16)
    documents, hard = torch.randint(40, (2, 3, K)), torch.randint(40, (1, K))
    asked = [[training.Asked("told", [1, 2], [1], True)], [training.Asked("told", [1, 2], [2], True)]]
    same = documents.clone()
    same[1, 2] = documents[0, 1]
    one = [asked[0], []]
    with_other, alone = training.loss(net, same, asked, hard), training.loss(net, same, one, hard)
    assert with_other < alone


@pytest.mark.slow
def test_keys_are_trained_measured_and_read_again(exported, texts, tmp_path, monkeypatch, capsys):
    for module in (stage, study):
        monkeypatch.setattr(module, "BLOCKS", 12)
        monkeypatch.setattr(module, "TOLD", 3)
    out = tmp_path / "keys"
    sizes = ["--documents", "24", "--tokens", "3072", "--steps", "12", "--cases", "2", "--haystack", "48"]
    assert main([str(exported), "--path", str(texts), *sizes, "--size", "16", "--out", str(out)]) == 0
    folder = tmp_path / "models"
    shutil.copytree(exported, folder)
    shutil.copytree(out, folder / "keys")
    models = load_models(str(folder))
    base, net = models.base, models.keys
    assert load_models(str(exported)).keys is None
    assert net.size == 16 and not any(p.requires_grad for p in net.parameters())
    table = json.loads((tmp_path / "keys-recall.json").read_text())["table"]
    assert {row["carrier"] for row in table} == {"keys", "bm25"}
    base.model.get_input_embeddings().weight.data += 1
    with pytest.raises(ValueError, match="trained on other embeddings"):
        load_keys(out, base)


def test_too_little_text_is_told(exported, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("A short text.")
    assert main([str(exported), "--path", str(tmp_path / "short.txt"), "--out", str(tmp_path / "keys")]) == 2
    assert "--path: there are 0 texts of 3072 tokens, at least 20 are needed" in capsys.readouterr().err


def test_too_few_documents_are_told_by_their_option(exported, texts, tmp_path, capsys):
    few = ["--path", str(texts), "--documents", "3", "--out", str(tmp_path / "keys")]
    assert main([str(exported), *few]) == 2
    assert "--documents=3 is not allowed: at least 20" in capsys.readouterr().err
