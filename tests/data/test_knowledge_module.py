"""Windows of knowledge for training: what stands in them, in what order, and what is dropped."""

import random

import pytest

from megactx.data.documents import TRAIN, VALIDATION
from megactx.data.knowledge_module import ONCE, TWICE, TWO_HOPS, CaseBatches, Cases, KnowledgeData, arranged, chosen

PROSE = ["Nothing is told of anybody here.", "It goes on like that for a while.", "Some readers skip such lines."]
SETTINGS = dict(block=32, tokens=480, entities=3, between=1, changed=0.5, hops=0.3, alike=0.0, questions=4, seed=0)
SETTINGS |= dict(session=0)


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


def test_other_blocks_are_like_the_question_where_that_is_asked_for(tiny_tokenizer):
    def told(share: float) -> int:
        cases, count = cases_of(tiny_tokenizer, alike=share, entities=12, hops=0.0, changed=0.0, between=2), 0
        for n in range(25):
            case = cases[n]
            what = tiny_tokenizer.decode(case.asked).partition("What is the ")[2].partition(" of ")[0]
            count += tiny_tokenizer.decode(case.window).count(what)
        return count

    assert told(1.0) > 1.5 * told(0.0)
    draw = random.Random(0)
    found = chosen([*range(20)], {3, 5, 40}, 8, 0.5, draw)
    assert len({*found}) == 8 and {3, 5} <= {*found} <= {*range(20)}
    assert not chosen([1, 2], {1}, 0, 0.5, draw)


def test_text_of_a_session_stands_between_the_blocks_and_the_question_with_and_without_what_is_needed(tiny_tokenizer):
    cases, lengths = cases_of(tiny_tokenizer, session=60), set()
    for n in range(30):
        case = cases[n]
        behind = (len(case.window) - 1) % cases.block  # of blocks and session, where all blocks are full ones
        assert len(case.window) + len(case.asked) + max(map(len, case.values)) <= cases.tokens
        if behind:
            assert case.window[-behind:] == case.dropped[-behind:]
            assert any(word in tiny_tokenizer.decode(case.window[-behind:]) for word in " ".join(PROSE).split())
        lengths.add(behind)
    assert len(lengths) > 10
    with pytest.raises(ValueError, match="datamodule.session=241 is not allowed: at most half of"):
        cases_of(tiny_tokenizer, session=241)


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


def test_a_batch_has_each_window_once_with_all_of_its_questions(cases, tiny_tokenizer):
    batch = CaseBatches(cases, 4)[2]
    for n in range(4):
        case = cases[8 + n]
        for name, window in (("window", case.window), ("dropped", case.dropped)):
            lengths = batch["lengths" if name == "window" else "dropped_lengths"]
            assert batch[name][n][: lengths[n]].tolist() == window and not batch[name][n][lengths[n] :].any()
        pairs = [case.pair, *case.more]
        assert len(pairs) <= batch["asked"].shape[1] <= 4 and not batch["answers"][n, len(pairs) :].any()
        for ids, answers, (asked, answer) in zip(batch["asked"][n], batch["answers"][n], pairs, strict=False):
            assert ids[answers].tolist() == answer and ids[: len(asked)].tolist() == asked
            assert answers[: len(asked)].sum() == 0


def test_more_questions_are_other_ones_whose_newest_facts_stand_in_the_window_whole(tiny_tokenizer):
    cases, seen = cases_of(tiny_tokenizer, questions=6, changed=0.2), 0
    for n in range(40):
        case = cases[n]
        lines = sentences_of(tiny_tokenizer.decode(case.window))
        asked = [tuple(ids) for ids, _ in (case.pair, *case.more)]
        assert len({*asked}) == len(asked) <= 6 and case == cases_of(tiny_tokenizer, questions=6, changed=0.2)[n]
        for ids, answer in case.more:
            text, value = tiny_tokenizer.decode(ids), tiny_tokenizer.decode(answer).strip()
            what, _, whose = text.partition("What is the ")[2].partition("?")[0].partition(" of ")
            via, _, name = whose.removeprefix("the ").partition(" of ") if " of " in whose else ("", "", whose)
            first = [line for line in lines if name in line and (via or what) in line]
            assert first and (via or any(value in line for line in first))
            assert any(what in line and value in line for line in lines)
            assert len(case.window) + len(ids) + len(answer) <= cases.tokens
            seen += 1
    assert seen > 60


def test_a_row_without_room_for_what_is_needed_is_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="datamodule.tokens=64 is not allowed: too few .* [0-9]+ or more"):
        cases_of(tiny_tokenizer, tokens=64)[0]
    data = KnowledgeData(None, tiny_tokenizer, batch=2, **SETTINGS)
    with pytest.raises(ValueError, match="datamodule.tokens=480 is not allowed: the base LM takes 256 at most"):
        data.limit_to(256)
