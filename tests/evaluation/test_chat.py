"""How well models answer: what is measured, and that it is what it says."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megactx.data.documents import VALIDATION, split_of
from megactx.data.tokenizer import with_chat
from megactx.evaluation.chat import (
    DROPPING,
    FULL,
    MEMORY,
    TASKS,
    Chatting,
    held_out,
    main,
    measure,
    memory_cases,
    recall_talks,
    sheets,
)
from megactx.lm import BaseLM
from megactx.parts.models import Models
from megactx.runtime import Session


@pytest.fixture(scope="module")
def models(tiny_tokenizer):
    """A random base LM that has rows for the signs of the template."""
    config = dict(model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    base = BaseLM.from_config(config | dict(vocab_size=516, max_position_embeddings=512), with_chat(tiny_tokenizer))
    return Models(base.freeze(), name="random")


def test_conversations_are_of_the_held_out_side_and_end_with_an_answer():
    found = held_out(None, 5, embedded=False)
    assert [*found] == [TASKS] and len(found[TASKS]) == 5
    for turns in found[TASKS]:
        assert split_of("\0".join(turn["content"] for turn in turns)) == VALIDATION
        assert turns[-1]["role"] == "assistant"


def test_a_fact_is_told_in_the_second_turn_and_asked_for_in_the_last():
    for turns in recall_talks(3, 40):
        assert len(turns) == 2 * 40 and turns[2]["content"].startswith("Remember this: my ")
        value = turns[2]["content"].partition(" is ")[2].removesuffix(".")
        assert value in turns[-1]["content"] and not any(value in turn["content"] for turn in turns[4:-1])


def test_the_cost_of_answers_is_that_of_a_plain_pass(models, tiny_tokenizer):
    (turns,) = held_out(None, 1, embedded=False)[TASKS]
    one = Chatting(models, 4)
    ids, answers = one.turns(turns)
    ids = torch.as_tensor(ids, dtype=torch.long)
    logits = models.base.model(input_ids=ids[None]).logits[0, :-1]
    plain = F.cross_entropy(logits, ids[1:], reduction="none")[torch.as_tensor(answers[1:])]
    torch.testing.assert_close(one.nll(turns), plain)


def test_an_answer_is_asked_for_where_it_begins_and_obeys_where_no_sign_stands_in_it(models, monkeypatch):
    one = Chatting(models, 4)
    asked, end = one._asked([{"role": "user", "content": "Say yes."}])
    text = models.base.tokenizer.decode(asked, skip_special_tokens=False)
    assert text == "<|bos|><|user|>Say yes.<|end|><|assistant|>" and one.end == "<|end|>"
    yes, user = models.base.tokenizer("yes")["input_ids"], models.base.tokenizer.convert_tokens_to_ids("<|user|>")

    def says(ids):
        def decode(stream, most, sampling):
            for token in ids[:most]:
                yield [token]

        monkeypatch.setattr("megactx.runtime.session.decode", decode)
        return one.answer(one.plain(), [{"role": "user", "content": "Say yes."}])

    one.tokens = 8
    assert says([*yes, end]) == ("yes", True, True)
    assert says([*yes, user, end]) == ("yes", True, False)
    one.tokens = len(yes)
    assert says(yes) == ("yes", False, True)


def test_every_figure_of_a_model_stands_in_the_long_table(models):
    table = measure(models, "random", held_out(None, 2, embedded=False), recall_talks(1, 12), 192, 4)
    for metric in ("nll", "stops", "obeys", "right"):
        row = table.one(metric=metric, run="random", domain=TASKS)
        assert row["n"] == 2 and row["low"] <= row["point"] <= row["high"]
    assert table.one(metric="recall nll", carrier=DROPPING, span="window 192")["point"] > 0
    assert [sheet.title for sheet in sheets(table)][1] == "recall, dropping, window 192 (n = 1)"


def test_a_needle_and_a_story_are_asked_for_by_every_way_of_reading(models, monkeypatch):
    # The embedded text takes half a minute to make.
    prose = [f"Traveller {n} went on, for the road was {n} miles long and the evening was near." for n in range(90)]
    monkeypatch.setattr("megactx.data.ruler.sentences", lambda path: prose)
    one, (row,) = Chatting(models, 4), memory_cases("niah_single_1", 1, 300, models.base.tokenizer)
    session, end = one.session(192, DROPPING), f" {row['answer_prefix']}"
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(Session, "append", lambda self, ids: asked.extend(ids))
        patch.setattr(Session, "generate", lambda self, most, stop: iter([SimpleNamespace(text=row["answer"][0])]))
        assert one.found(session, row) == 1
        text = models.base.tokenizer.decode(asked, skip_special_tokens=False)
        assert text.startswith("<|user|>") and text.endswith(f"<|end|><|assistant|>{end}") and row["question"] in text
        patch.setattr(Session, "generate", lambda self, most, stop: iter([SimpleNamespace(text="nothing.\n")]))
        assert one.found(session, row) == 0
    table = measure(models, "random", held_out(None, 1, embedded=False), [], 192, 4, (1, 330))
    for task in MEMORY:
        own = table.pick(domain=task, metric="right")
        assert [(row["carrier"], row["n"]) for row in own] == [(FULL, 1), (DROPPING, 1)]
    assert "qa1, dropping, 330 tokens, window 192 (n = 1)" in [sheet.title for sheet in sheets(table)]


@pytest.mark.parametrize("option", ["--memory=-1", "--recall=-1", "--length=0"])
def test_a_number_that_says_nothing_is_refused(option, base_folder, capsys):
    assert main([str(base_folder), option]) == 2
    assert f"{option} is not allowed" in capsys.readouterr().err


def test_a_model_without_a_chat_template_is_refused_by_name(base_folder, capsys):
    assert main([str(base_folder), "--conversations", "1", "--recall", "0"]) == 2
    assert "its tokenizer has no chat template" in capsys.readouterr().err
