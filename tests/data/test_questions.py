"""Short contexts with a question: whole blocks, in which the answer is told once and told where it is said to be."""

import pytest

from megactx.assets import resolve
from megactx.data.knowledge import ATTRIBUTES
from megactx.data.questions import TASKS, asked
from megactx.data.tokenizer import load_tokenizer

PROSE = [f"The river ran past mill {n} and on to the sea." for n in range(400)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("asset:tiny-base", "base.name"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [96, 256])
@pytest.mark.parametrize("number", range(4))
def test_a_context_has_exactly_its_tokens_and_tells_the_answer_where_it_says(task, tokens, number, tokenizer):
    case = asked(task, number, tokens, tokenizer, PROSE)
    assert len(case.ids) == tokens and case.needed.stop <= tokens
    told = tokenizer.decode(case.ids[case.needed.start : case.needed.stop])
    subject = case.prefix.split()[-2] if task == "fact" else case.prefix.split(" for ")[1].split()[0]
    assert case.answer in told and subject in told and case.answer in case.values
    assert tokenizer.decode(case.ids).startswith(case.context[: len(case.context) // 2])
    assert case == asked(task, number, tokens, tokenizer, PROSE) != asked(task, number + 1, tokens, tokenizer, PROSE)


def test_a_fact_stands_beside_the_same_attribute_of_another_with_values_to_choose_from(tokenizer):
    for number in range(6):
        case = asked("fact", number, 128, tokenizer, PROSE)
        what = case.text.split(" the ")[1].split(" of ")[0]
        assert case.values == ATTRIBUTES[what] and case.context.count(f" {what} ") + case.context.count(f"{what}.") > 1
        # The rest is real prose, which goes on up to the last token.
        assert case.context.rsplit(". ", 1)[-1][:9] in ("The river", "The rive", "The riv", "The ", "The")


@pytest.mark.parametrize(
    ("task", "tokens", "prose", "said"),
    [
        ("x", 128, PROSE, "--tasks=x is not known, allowed are fact, niah_single_1, niah_single_2"),
        ("fact", 16, PROSE, "--tokens=16 is not allowed: too short for what fact tells"),
        ("niah_single_2", 512, PROSE[:8], "--tokens=512 is not allowed: niah_single_2 finds too little prose"),
    ],
)
def test_what_makes_no_context_is_refused(task, tokens, prose, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        asked(task, 0, tokens, tokenizer, prose)
