import pytest

from megactx.assets import resolve
from megactx.data import ruler
from megactx.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("asset:tiny-base", "base.name"))


@pytest.mark.parametrize("task", [name for name in ruler.TASKS if name not in (*ruler.PROSE, "cwe")])
def test_a_case_fits_its_length_and_its_needles_are_where_it_says(task, tokenizer):
    row = ruler.case(task, 1024, tokenizer, seed=3)
    text = f"{row['context']}\n{row['question']}{row['answer_prefix']}"
    assert 900 < len(tokenizer(text, add_special_tokens=False)["input_ids"]) + row["max_new_tokens"] <= 1024
    told = " ".join(row["context"][start:end] for start, end in row["needles"])
    assert task in ruler.WHOLE or all(answer in told for answer in row["answer"])
    assert len({*row["answer"]}) == len(row["answer"])
    assert row == ruler.case(task, 1024, tokenizer, seed=3) != ruler.case(task, 1024, tokenizer, seed=4)


def test_the_score_is_the_share_of_references_found_in_any_case():
    assert ruler.score("vt", "It is ABC, and d.", ["abc", "xyz"]) == 0.5


def test_an_unknown_task_is_named(tokenizer):
    with pytest.raises(ValueError, match="--tasks=x is not known"):
        ruler.case("x", 1024, tokenizer, 0)


def test_qa1_is_right_by_its_own_rule():
    assert (
        ruler.score("qa1", " garden or the kitchen.", ["garden"]) == 0 == 1 - ruler.score("qa1", " garden.", ["garden"])
    )


@pytest.mark.parametrize(("task", "said"), [("niah_single_2", "give more prose by --path"), ("qa1", "give more prose")])
def test_a_prose_that_is_too_short_for_a_length_is_told(task, said, tokenizer):
    with pytest.raises(ValueError, match=f"--lengths=4096 is not allowed: {task} has .* at most; {said}"):
        ruler.case(task, 4096, tokenizer, 0, ["The river ran past the mill."] * 20)
