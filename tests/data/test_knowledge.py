"""Generated knowledge: who is asked about, what counts, and where it is told."""

import random

import pytest

from megactx.data.documents import VALIDATION
from megactx.data.knowledge import ATTRIBUTES, RELATIONS, Knowledge, blocks, encoded, names, sentences, tell, value_ids

PROSE = ["Nothing is told of anybody here.", "It goes on like that for a while.", "Naïve readers skip such lines."]


@pytest.fixture(scope="module")
def knowledge():
    return Knowledge(12, random.Random(0), changed=0.5)


def test_thousands_of_names_are_unique_seeded_and_of_one_side():
    learned = names(3000, random.Random(1))
    asked = names(1000, random.Random(1), VALIDATION)
    assert len({*learned}) == 3000 and learned == names(3000, random.Random(1)) != names(3000, random.Random(2))
    assert not {*learned} & {*asked} and not {*names(3000, random.Random(2))} & {*asked}


def test_characters_and_tokens_of_a_fact_are_those_that_tell_it(knowledge, tiny_tokenizer):
    text, facts = tell(knowledge.facts, PROSE, 1, random.Random(0))
    assert [fact.key for fact in facts] == [fact.key for fact in knowledge.facts]
    assert all(text[fact.start : fact.end] == fact.sentence for fact in facts)
    assert all(fact.name in fact.sentence and fact.value in fact.sentence for fact in facts)
    assert any(line in text for line in PROSE)
    ids, spans = encoded(text, facts, tiny_tokenizer)
    for fact in facts:
        span = spans[fact.key]
        assert tiny_tokenizer.decode(ids[span.start : span.stop]).strip() == fact.sentence
        inner = tiny_tokenizer.decode(ids[span.start + 1 : span.stop - 1])
        assert fact.sentence not in inner, "no token more than needed"


def test_a_value_is_a_word_behind_others(tiny_tokenizer):
    for ids, word in zip(value_ids(tiny_tokenizer, ("harp", "violin")), ("harp", "violin"), strict=True):
        assert tiny_tokenizer.decode(ids) == f" {word}"


def test_a_span_touches_the_blocks_of_its_first_and_last_token():
    assert [*blocks(range(30, 33), 32)] == [0, 1] and [*blocks(range(32, 64), 32)] == [1]


def test_versions_come_one_after_the_other_and_the_newest_counts(knowledge):
    told = {}
    for fact in knowledge.facts:
        versions = told.setdefault((fact.name, fact.what), [])
        assert fact.version == len(versions)
        versions.append(fact)
    twice = [versions for versions in told.values() if len(versions) == 2]
    assert twice and all(old.value != new.value for old, new in twice)
    assert all(knowledge.newest(*key) == versions[-1] for key, versions in told.items())
    assert len(told) == 12 * (len(ATTRIBUTES) + len(RELATIONS))


def test_a_question_of_two_hops_needs_whom_and_what(knowledge):
    for question in knowledge.questions(20, random.Random(3), hops=2):
        via, last = question.needed
        assert via.what in RELATIONS and via.name in question.text and last.name == via.value != via.name
        assert last.name not in question.text and question.answer in question.values == ATTRIBUTES[last.what]
    single = knowledge.questions(12 * len(ATTRIBUTES), random.Random(3))
    assert len({question.text for question in single}) == len(single)


def test_an_update_is_a_later_version_and_poison_the_same_sentence_with_another_value(knowledge):
    fact = knowledge.questions(1, random.Random(0))[0].needed[-1]
    update, poison = fact.update(random.Random(0)), fact.poison(random.Random(0))
    assert update.version == fact.version + 1 and update.value != fact.value
    assert poison.key == fact.key and poison.value != fact.value and fact.value not in poison.sentence.split()
    assert poison.sentence.replace(poison.value, fact.value) == fact.sentence


def test_prose_is_whole_sentences_on_one_line_each():
    found = sentences(
        ["A first sentence that\n  goes on. short. x = f(a, b) is code of no kind\n\nNo. " + "A" * 300 + "."]
    )
    assert found == ["A first sentence that goes on."]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda k: Knowledge(1, random.Random(0)), "entities=1 is not allowed: at least 2"),
        (lambda k: k.questions(73, random.Random(0)), "questions=73 is not allowed: 12 entities allow 72"),
        (lambda k: tell(k.facts, [], 1, random.Random(0)), "the prose has no sentence"),
    ],
)
def test_what_cannot_be_generated_is_refused(wrong, said, knowledge):
    with pytest.raises(ValueError, match=said):
        wrong(knowledge)
