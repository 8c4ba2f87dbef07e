import pytest

from megactx.assets import resolve
from megactx.data import ruler
from megactx.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("asset:tiny-base", "base.name"))


@pytest.mark.parametrize("task", [name for name in ruler.TASKS if name not in ("niah_single_2", "cwe")])
def test_a_case_fits_its_length_and_its_needles_are_where_it_says(task, tokenizer):
    row = ruler.case(task, 1024, tokenizer, seed=3)
    text = f"{row['context']}\n{row['question']}{row['answer_prefix']}"
    assert 900 < len(tokenizer(text, add_special_tokens=False)["input_ids"]) + row["max_new_tokens"] <= 1024
    told = " ".join(row["context"][start:end] for start, end in row["needles"])
    assert task in ruler.WHOLE or all(answer in told for answer in row["answer"])
    assert len({*row["answer"]}) == len(row["answer"])
    assert row == ruler.case(task, 1024, tokenizer, seed=3) != ruler.case(task, 1024, tokenizer, seed=4)


def test_the_score_is_the_share_of_references_found_in_any_case():
    assert ruler.score("It is ABC, and d.", ["abc", "xyz"]) == 0.5


def test_an_unknown_task_is_named(tokenizer):
    with pytest.raises(ValueError, match="--tasks=x is not known"):
        ruler.case("x", 1024, tokenizer, 0)
