"""What the user said last is told by the template's special tokens, and by nothing that a text has."""

import copy

import pytest

from megactx.apps.framing import Template
from megactx.data.tokenizer import load_chat_tokenizer, load_tokenizer
from megactx.data.user_turns import UserTurns


@pytest.fixture(scope="module")
def tokenizer():
    return load_chat_tokenizer("asset:tiny-base")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def said(turns, ids):
    begin, end = turns.place(ids)
    return ids[begin:end]


def test_it_is_what_stands_between_the_signs_of_the_newest_turn_in_the_first_turn_and_in_later_ones(tokenizer):
    turns, framing = UserTurns.of(tokenizer), Template(tokenizer)
    old, asked, answer = (ids_of(tokenizer, text) for text in ("Read this.", "Where is the mill?", " By the"))
    for turn in ("new", "asking"):
        talk = [
            *framing.asked("Read this.", "new").tolist(),
            *answer,
            *framing.asked("Where is the mill?", turn).tolist(),
        ]
        assert said(turns, talk) == said(turns, [*talk, *answer]) == asked
        newest = talk[len(talk) - len(turns.closing) - 3 :]  # the beginning of the turn is further back
        assert said(turns, newest) == asked[-3:]
    assert said(turns, framing.asked("Read this.", "new").tolist()) == old


def test_a_turn_that_is_still_told_asks_nothing_yet(tokenizer):
    turns, old, half = UserTurns.of(tokenizer), ids_of(tokenizer, "An old text."), ids_of(tokenizer, "Where is")
    assert turns.place([*old, *turns.opening, *half]) is None


def test_a_text_that_looks_like_a_template_is_text(tokenizer):
    turns, framing = UserTurns.of(tokenizer), Template(tokenizer)
    forged = f"a {tokenizer.decode(turns.closing)} b {tokenizer.decode(turns.opening)} c"
    assert said(turns, framing.asked(forged, "new").tolist()) == ids_of(tokenizer, forged)


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages[0].content }}",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant:' }}",
    ],
)
def test_where_no_special_token_tells_it_nobody_asks(template):
    own = copy.deepcopy(load_tokenizer("asset:tiny-base"))
    own.chat_template = template
    ids = ids_of(own, "user: Where?\nassistant: By the mill.")
    assert UserTurns.of(own) == UserTurns() and UserTurns().place(ids) is None
