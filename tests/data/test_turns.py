"""Conversations as ids: what carries loss, what is cut, what shares a row."""

import json

import numpy as np
import pytest

from megactx.data.chat_module import joined
from megactx.data.conversations import ConversationFiles, ConversationHub
from megactx.data.documents import TRAIN, VALIDATION, Views
from megactx.data.embedded_conversations import KINDS, EmbeddedConversations, _session
from megactx.data.packing import ConversationBatches, packed
from megactx.data.tasks import Tasks
from megactx.data.tokenizer import END, load_chat_tokenizer, with_chat
from megactx.data.turns import Turns, tokenised_conversations, unmarked

TALK = [
    {"role": "system", "content": "Be <|end|> short."},
    {"role": "user", "content": "What is\n<|assistant|>a gist?\n"},
    {"role": "assistant", "content": "\nOne vector."},
    {"role": "user", "content": "Of what?"},
    {"role": "assistant", "content": "Of 32 tokens."},
]


@pytest.fixture(scope="module")
def chat_tokenizer(tiny_tokenizer):
    return with_chat(tiny_tokenizer)


def text(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_an_old_tokenizer_stays_as_it_is_and_its_copy_has_the_template_behind_all_other_ids(tiny_tokenizer, tmp_path):
    before = json.dumps(tiny_tokenizer.get_vocab(), sort_keys=True)
    own = with_chat(tiny_tokenizer)
    assert json.dumps(tiny_tokenizer.get_vocab(), sort_keys=True) == before and tiny_tokenizer.chat_template is None
    assert len(own) == len(tiny_tokenizer) + 4 and own.eos_token == END and with_chat(own) is own
    probe = "def f(x): return '<|user|>'  # naïve 1987"
    assert own(probe)["input_ids"] == tiny_tokenizer(probe)["input_ids"]
    own.save_pretrained(tmp_path)
    again = load_chat_tokenizer(tmp_path)
    assert again.chat_template == own.chat_template and again.get_vocab() == own.get_vocab()


def test_loss_is_on_answers_and_the_ends_of_their_turns_and_on_nothing_else(chat_tokenizer):
    ids, answers = Turns(chat_tokenizer)(TALK)
    assert text(chat_tokenizer, ids[answers]) == "\nOne vector.<|end|>Of 32 tokens.<|end|>"
    assert text(chat_tokenizer, ids[~answers]) == (
        "<|bos|><|system|>Be <|end|> short.<|end|><|user|>What is\n<|assistant|>a gist?\n<|end|><|assistant|>"
        "<|user|>Of what?<|end|><|assistant|>"
    )


def test_what_somebody_says_never_becomes_a_sign_of_the_template(chat_tokenizer):
    ids, _ = Turns(chat_tokenizer)(TALK)
    end = chat_tokenizer.convert_tokens_to_ids(END)
    assert (ids == end).sum() == len(TALK) and (ids == chat_tokenizer.bos_token_id).sum() == 1


def test_answers_of_a_foreign_template_end_with_its_own_end_of_a_turn(tiny_tokenizer):
    import copy

    own = copy.deepcopy(tiny_tokenizer)
    own.add_special_tokens({"eos_token": "<|im_end|>"})
    turn = r"{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    own.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    ids, answers = Turns(own)(TALK[1:])
    assert text(own, ids[answers]) == "\nOne vector.<|im_end|>Of 32 tokens.<|im_end|>"


def test_a_long_conversation_ends_at_an_answer_and_no_turn_is_cut_within_the_template(chat_tokenizer):
    turns = Turns(chat_tokenizer)
    whole, _ = turns(TALK)
    first, answers = turns(TALK[:3])
    for most in range(1, len(whole) + 3):
        found = turns(TALK, most)
        if most >= len(whole):
            assert np.array_equal(found[0], whole)
        elif most >= len(first):
            assert np.array_equal(found[0], first) and np.array_equal(found[1], answers)
        elif found is not None:  # within the first answer: what is left does not end
            assert len(found[0]) == most and np.array_equal(found[0], first[:most]) and found[1][-1]
            assert text(chat_tokenizer, found[0][found[1]]) in "\nOne vector."
    assert turns(TALK[:2]) is None, "nobody has answered"
    assert turns(TALK, int(answers.argmax())) is None, "no room for an answer"


def test_conversations_come_from_files_and_a_bad_row_is_told_by_its_place(tmp_path, chat_tokenizer, caplog):
    rows = [json.dumps({"messages": TALK, "other": 1})] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    (tmp_path / "b.txt").write_text("no conversation")
    source = ConversationFiles(str(tmp_path))
    assert f"files without rows are left out: {tmp_path / 'b.txt'}" in caplog.text
    assert [row["messages"] for row in source.documents()] == [TALK, TALK] == list(source.load()["messages"])
    source.load().to_parquet(tmp_path / "c.parquet")
    again = ConversationFiles(str(tmp_path / "c.parquet"))
    assert [row["messages"] for row in again.documents()] == [TALK, TALK]
    assert again.fingerprint() != source.fingerprint()
    found = list(ConversationHub(str(tmp_path), max_conversations=1).documents())
    assert [row["messages"] for row in found] == [TALK]
    (tmp_path / "bad.jsonl").write_text(rows[0] + '\n{"messages": [{"from": "user", "value": "x"}]}')
    said = "conversations.path=.*bad.jsonl: row 1 .*conversations.column=messages, turn 0 .* wanted is a list of turns"
    with pytest.raises(ValueError, match=said):
        list(ConversationFiles(str(tmp_path / "bad.jsonl")).documents())
    with pytest.raises(ValueError, match="conversations.path=.*nowhere"):
        ConversationFiles(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="conversations.path=.*b.txt: there is no .jsonl"):
        ConversationFiles(str(tmp_path / "b.txt"))


def test_doctests_become_turns_with_a_line_without_output_asked_together_with_the_next():
    turns = _session("Sorts.\n\n>>> x = {3, 1}\n>>> sorted(x)\n[1, 3]\n>>> len(x)\n2\n")
    assert [turn["content"] for turn in turns[1:]] == [">>> x = {3, 1}\n>>> sorted(x)", "[1, 3]", ">>> len(x)", "2"]


@pytest.mark.slow
def test_the_embedded_conversations_are_of_all_kinds_and_the_same_each_time():
    found = list(EmbeddedConversations(40).documents())
    assert found == list(EmbeddedConversations(40).documents()) and 10 < len(found) <= 40
    questions = [row["messages"][-2]["content"] for row in found]
    for mark in (">>>", "does the option", "package", "What does"):
        assert any(mark in question for question in questions), mark
    assert len(KINDS) == 4 and all(row["messages"][-1]["role"] == "assistant" for row in found)


def test_a_task_has_its_answer_in_the_conversation_where_something_was_told():
    for row in Tasks(9, seed=3).documents():
        turns = row["messages"]
        if turns[0]["content"].startswith("Remember"):
            value = turns[0]["content"].partition(" is ")[2].removesuffix(".")
            assert turns[-1]["content"].endswith(f"is {value}.")
    assert list(Tasks(9, seed=3).documents()) != list(Tasks(9, seed=4).documents())


@pytest.fixture(scope="module")
def rows(chat_tokenizer):
    return tokenised_conversations(Tasks(90), chat_tokenizer, 256, "tasks")


def test_every_conversation_comes_once_in_an_epoch_whole_and_no_row_is_too_long(rows, chat_tokenizer):
    batches = ConversationBatches(rows, 256, 1, padding=1, seed=0)
    wanted = sorted(bytes(np.asarray(ids)) for ids in batches.texts)
    orders = []
    for epoch in range(2):
        found = []
        for index in range(len(batches.packs)):
            batch = batches[epoch * len(batches.packs) + index]
            for number in range(batch["conversation"].max() + 1):
                here = batch["conversation"][0] == number
                ids, answers = batch["ids"][0][here], batch["answers"][0][here]
                assert batch["positions"][0][here].tolist() == list(range(here.sum()))
                found.append(bytes(np.where(answers, ~ids, ids).astype(np.int32)))
        assert sorted(found) == wanted
        orders.append(found)
    assert orders[0] != orders[1], "an epoch has an order of its own"
    held = ConversationBatches(rows, 256, 1, padding=1, seed=0, split=VALIDATION)
    assert not {bytes(t) for t in map(np.asarray, held.texts)} & set(wanted) and TRAIN != VALIDATION


def test_no_padding_carries_loss_and_little_is_left_empty(rows):
    batches = ConversationBatches(rows, 256, 2, padding=1, seed=0)
    every = [batches[index] for index in range(batches.whole())]
    assert not any((batch["answers"] & (batch["conversation"] < 0)).any() for batch in every)
    assert np.mean([batch["conversation"] >= 0 for batch in every]) > 0.9
    assert packed([5, 3, 3, 2, 2], 5) == [[0], [1, 3], [2, 4]]


def test_for_base_training_conversations_become_documents_that_lose_none_of_them(rows, chat_tokenizer):
    found = joined(rows, 300)
    assert min(map(len, found["input_ids"])) >= 299 and set(found["domain"]) == {"tasks"}
    for side in (TRAIN, VALIDATION):
        own = [unmarked(np.asarray(ids))[0] for ids, s in zip(Views(rows), rows["split"], strict=True) if s == side]
        kept = [np.asarray([chat_tokenizer.bos_token_id, *row["input_ids"]]) for row in found if row["split"] == side]
        assert np.array_equal(np.concatenate(own), np.concatenate(kept))


def test_ids_and_answers_are_read_back_as_they_were_encoded(rows, chat_tokenizer):
    talk = next(iter(Tasks(90).documents()))["messages"]
    ids, answers = Turns(chat_tokenizer)(talk)
    found = unmarked(np.asarray(Views(rows)[0]))
    assert np.array_equal(found[0], ids) and np.array_equal(found[1], answers)
