"""Windows of knowledge for training: what stands in them, in what order, and what is dropped."""

import random

import numpy as np
import pytest

from megactx.data.documents import TRAIN, VALIDATION
from megactx.data.knowledge_module import ONCE, TWICE, TWO_HOPS, CaseBatches, Cases, KnowledgeData, arranged

PROSE = ["Nothing is told of anybody here.", "It goes on like that for a while.", "Some readers skip such lines."]
SETTINGS = dict(block=32, tokens=480, entities=3, between=1, changed=0.5, hops=0.3, knowledge=True, seed=0)


def cases_of(tokenizer, split=TRAIN, **changes) -> Cases:
    return Cases(PROSE, tokenizer, **SETTINGS | changes, split=split)


@pytest.fixture(scope="module")
def cases(tiny_tokenizer):
    return cases_of(tiny_tokenizer)


def test_a_window_tells_the_answer_and_without_the_needed_blocks_it_does_not(cases, tiny_tokenizer):
    kinds = []
    for n in range(40):
        case = cases[n]
        window, dropped, asked = (tiny_tokenizer.decode(ids) for ids in (case.window, case.dropped, case.asked))
        value = tiny_tokenizer.decode(case.values[case.right]).strip()
        assert value in window and asked.startswith("\nWhat is the ") and asked.endswith(" is")
        assert len(case.dropped) < len(case.window) and case.window[0] == case.dropped[0] == cases.bos
        assert set(case.dropped) <= set(case.window) and dropped != window
        if case.kind == ONCE:
            name = asked.partition(" of ")[2].partition("?")[0]
            what = asked.partition("What is the ")[2].partition(" of ")[0]
            told = [line for line in sentences_of(dropped) if name in line and what in line and value in line]
            assert not told and any(name in line and what in line and value in line for line in sentences_of(window))
        kinds.append(case.kind)
    assert {*kinds} == {ONCE, TWICE, TWO_HOPS}


def sentences_of(text: str) -> list[str]:
    return text.replace("? ", ". ").split(". ")


def test_an_older_version_stands_before_the_newest_one(cases, tiny_tokenizer):
    seen = 0
    for n in range(80):
        case = cases[n]
        if case.kind != TWICE:
            continue
        text, asked = tiny_tokenizer.decode(case.window), tiny_tokenizer.decode(case.asked)
        name = asked.partition(" of ")[2].partition("?")[0]
        what = asked.partition("What is the ")[2].partition(" of ")[0]
        newest = max(text.rfind(f"From now on the {what} of {name} is"), text.rfind(f"{name} has another {what} now"))
        old = [
            text.find(form)
            for form in (f"The {what} of {name} is", f"{name}'s {what} is", f"As for {name}, the {what}")
        ]
        old = [at for at in old if at >= 0]
        assert newest >= 0 and all(at < newest for at in old)
        seen += bool(old)
    assert seen > 3


def test_a_case_is_a_function_of_seed_and_index_and_both_sides_have_other_people(cases, tiny_tokenizer):
    again, other = cases_of(tiny_tokenizer), cases_of(tiny_tokenizer, seed=1)
    assert cases[7] == again[7] != other[7] and cases[7] != cases[8]
    assert cases[7] != cases_of(tiny_tokenizer, split=VALIDATION)[7]


def test_marked_blocks_keep_their_order_and_neighbours_stay_together():
    orders = {tuple(arranged([3, 4, 9], [0, 20], random.Random(n))) for n in range(50)}
    assert len(orders) > 5
    for order in orders:
        assert sorted(order) == [0, 3, 4, 9, 20]
        assert order.index(4) == order.index(3) + 1 < order.index(9) + 1


def test_a_batch_marks_the_answer_of_each_row(cases, tiny_tokenizer):
    batch = CaseBatches(cases, 4)[2]
    assert batch["ids"].shape == batch["dropped"].shape == (4, 480)
    for row, (ids, answers) in enumerate(zip(batch["ids"], batch["answers"], strict=True)):
        case = cases[8 + row]
        assert ids[answers].tolist() == case.values[case.right]
        before = [*case.window, *case.asked]
        assert ids[: len(before)].tolist() == before and answers[: len(before)].sum() == 0
        assert batch["dropped"][row][batch["dropped_answers"][row]].tolist() == case.values[case.right]


def test_the_control_has_the_same_tokens_but_its_blocks_stand_behind_the_answer(cases, tiny_tokenizer):
    control = cases_of(tiny_tokenizer, knowledge=False)
    one, other = CaseBatches(cases, 4)[0], CaseBatches(control, 4)[0]
    assert "dropped" not in other and np.array_equal(np.sort(one["ids"]), np.sort(other["ids"]))
    for n, (ids, answers) in enumerate(zip(other["ids"], other["answers"], strict=True)):
        assert ids[: answers.argmax()].tolist() == [control.bos, *control[n].asked]


def test_a_row_without_room_for_what_is_needed_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="datamodule.tokens=64 is not allowed"):
        cases_of(tiny_tokenizer, tokens=64)[0]
    data = KnowledgeData(None, tiny_tokenizer, batch=2, **SETTINGS)
    with pytest.raises(ValueError, match="datamodule.tokens=480 is not allowed: the base LM takes 256 at most"):
        data.limit_to(256)
