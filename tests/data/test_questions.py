"""Short contexts with a question: whole blocks, in which the answer is told once and told where it is said to be."""

import copy
import re

import pytest

from megactx.assets import resolve
from megactx.data.documents import TRAIN, split_of
from megactx.data.knowledge import ATTRIBUTES
from megactx.data.questions import TASKS, QuestionBatches, asked, check_tasks
from megactx.data.tokenizer import bos_id, load_tokenizer

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


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="--tasks=x is not known, allowed are fact, niah_single_1, niah_single_2"):
        check_tasks("--tasks", ["fact", "x"])


@pytest.mark.parametrize(
    ("task", "tokens", "prose", "said"),
    [
        ("fact", 8, PROSE, "--tokens=8 is not allowed: too short for what fact tells"),
        ("niah_single_2", 512, PROSE[:8], "--tokens=512 is not allowed: niah_single_2 finds too little prose"),
    ],
)
def test_what_makes_no_context_is_refused(task, tokens, prose, said, tokenizer):
    with pytest.raises(ValueError, match=said):
        asked(task, 0, tokens, tokenizer, prose)


@pytest.fixture(scope="module")
def batches(tokenizer):
    return QuestionBatches(
        PROSE, tokenizer, block=32, count=6, tokens=[128], tasks=["fact", "niah_single_2"], framed=0, seed=0
    )


def test_a_batch_of_questions_is_whole_blocks_behind_a_begin_and_its_answers_stand_where_it_says(batches, tokenizer):
    for index in range(3):
        batch = batches[index]
        assert batch["contexts"].shape == (6, 129) and (batch["contexts"][:, 0] == bos_id(tokenizer)).all()
        assert batch["context_starts"].tolist() == [[1, 33, 65, 97]] * 6
        for row, places, context in zip(batch["questions"], batch["answers"], batch["contexts"], strict=True):
            answer = tokenizer.decode(row[places[places >= 0]]).strip()
            assert answer and answer in tokenizer.decode(context)
            assert not row[places.max() + 1 :].any()  # nothing comes behind it


def test_a_batch_is_a_function_of_seed_and_number_and_asks_about_nobody_of_evaluation(batches, tokenizer):
    one, again, other = batches[1], batches[1], batches[2]
    assert all((one[key] == again[key]).all() for key in one)
    assert (one["contexts"] != other["contexts"]).any()
    told = {asked("fact", number, 128, tokenizer, PROSE).context for number in range(12)}
    assert not {tokenizer.decode(row[1:]) for row in one["contexts"]} & told
    for row in other["questions"]:  # of facts
        name = re.search(r"of (\w+)\?", tokenizer.decode(row))[1]
        assert split_of(name) == TRAIN


def test_the_chat_template_stands_around_a_share_of_the_batches_and_only_where_there_is_one(tokenizer):
    framed = copy.deepcopy(tokenizer)
    framed.chat_template = "{% for m in messages %}User: {{ m.content }}{% endfor %}\nAnswer: "
    given = dict(block=32, count=2, tokens=[96], tasks=["fact"], seed=0)
    every, some, none = (QuestionBatches(PROSE, framed, **given, framed=share) for share in (1, 0.5, 0))
    without = QuestionBatches(PROSE, tokenizer, **given, framed=1)
    assert framed.decode(every[0]["contexts"][0]).startswith("User: ") and "Answer: " in framed.decode(
        every[0]["questions"][0]
    )
    shapes = {some[n]["contexts"].shape for n in range(12)}
    assert len(shapes) == 2 and without[0]["contexts"].shape == none[0]["contexts"].shape == (2, 97)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(tokens=[32, 100]), "loss.questions.tokens=100 is not allowed: a multiple of block_size=32"),
        (
            dict(tokens=[8], block=8),
            "loss.questions.tokens=8 is not allowed: too short for what fact tells",
        ),
        (dict(tasks=["riddle"]), "loss.questions.tasks=riddle is not known, allowed are fact, "),
        (dict(prose=PROSE[:3]), "loss.questions.tokens=128 is not allowed: fact finds too little prose"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_before_the_training(given, message, tokenizer):
    settings = dict(prose=PROSE, block=32, count=2, tokens=[128], tasks=["fact"], framed=0, seed=0) | given
    with pytest.raises(ValueError, match=message):
        QuestionBatches(tokenizer=tokenizer, **settings)
