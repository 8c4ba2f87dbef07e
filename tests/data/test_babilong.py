from megactx.assets import resolve
from megactx.data import babilong
from megactx.data.ruler import case
from megactx.data.tokenizer import load_tokenizer


def test_the_needle_is_the_last_walk_of_the_person_that_is_asked_for():
    tokenizer = load_tokenizer(resolve("asset:tiny-base", "base.name"))
    prose = [f"The river ran past mill number {n}." for n in range(200)]
    for seed in range(5):
        row = case("qa1", 600, tokenizer, seed, prose)
        (start, end), person = row["needles"][0], row["question"].split()[2]
        told = row["context"][start:end]
        assert told.startswith(person) and told.endswith(f"{row['answer'][0]}.")
        assert person not in row["context"][end:]


def test_only_the_right_place_in_the_first_sentence_is_right():
    assert babilong.score(" garden. The kitchen is empty.", ["garden"]) == 1
    assert babilong.score(" garden or the kitchen.", ["garden"]) == 0
    assert babilong.score(" house. Garden.", ["garden"]) == 0
