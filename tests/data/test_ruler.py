import pytest

from megactx.assets import resolve
from megactx.data import paraphrases, ruler
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


SHARING = [name for name in ruler.TASKS if name not in ruler.WHOLE]


@pytest.mark.parametrize("task", SHARING)
def test_cases_of_one_history_differ_in_what_they_tell_alone(task, tokenizer):
    rows = [ruler.case(task, 4096, tokenizer, seed, PROSE, shared=True) for seed in range(4)]
    ids = [tokenizer(row["context"], add_special_tokens=False)["input_ids"] for row in rows]
    assert len({len(own) for own in ids}) == 1 and 3800 < len(ids[0]) <= 4096
    assert len({row["question"] for row in rows}) > 1
    for row, own in zip(rows, ids, strict=True):
        told = " ".join(row["context"][start:end] for start, end in row["needles"])
        assert all(answer in told for answer in row["answer"])
        text = f"{row['context']}\n{row['question']}{row['answer_prefix']}"
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) + row["max_new_tokens"] <= 4096
        for start, end in row["needles"]:  # no word is cut in two
            assert row["context"][end : end + 1] in ("", " ") and row["context"][:start][-1:] in ("", " ")
        same = sum(a == b for a, b in zip(ids[0], own, strict=True)) / len(own)
        assert same > (0.5 if "paraphrase" in task or "changed" in task else 0.85)
    assert rows[1] == ruler.case(task, 4096, tokenizer, 1, PROSE, shared=True)
    if task in ("niah_paraphrase", "niah_changed"):
        counts = [row["context"].count("secret number") for row in rows]
        assert counts == [24 + (task == "niah_changed")] * 4


@pytest.mark.parametrize("task", ruler.WHOLE)
def test_tasks_whose_cases_have_nothing_in_common_share_no_history(task, tokenizer):
    with pytest.raises(ValueError, match=f"--shared is not allowed with {task}"):
        ruler.case(task, 4096, tokenizer, 0, shared=True)


def test_more_facts_than_there_is_room_for_are_told(tokenizer):
    with pytest.raises(ValueError, match="--lengths=700 is not allowed for niah_changed with --shared: .* 25 facts"):
        ruler.case("niah_changed", 700, tokenizer, 0, PROSE, shared=True)
    for task in ("niah_single_1", "niah_single_2", "niah_multikey_3"):
        with pytest.raises(ValueError, match=f"--lengths=200 is not allowed: too short for {task} with --shared"):
            ruler.case(task, 200, tokenizer, 0, PROSE, shared=True)
    with pytest.raises(ValueError, match="--lengths=4096 is not allowed: the prose has .* tokens; give more by --path"):
        ruler.case("niah_changed", 4096, tokenizer, 0, PROSE[:40], shared=True)


PROSE = [f"The river ran past mill {n} and on to the sea." for n in range(400)]


@pytest.mark.parametrize("task", ["niah_paraphrase", "niah_changed"])
@pytest.mark.parametrize("seed", range(6))
def test_a_question_shares_no_rare_word_with_its_needle_and_the_newest_value_counts(task, seed, tokenizer):
    row = ruler.case(task, 2048, tokenizer, seed, PROSE)
    ((start, end),) = row["needles"]
    needle, before = row["context"][start:end], row["context"][:start]
    (answer,) = row["answer"]
    assert answer in needle and row["context"].count(answer) == 1
    word = row["question"].removeprefix("What is the secret number of the ").split()[0]
    assert word not in needle and not any(word in other for other in paraphrases.LEARNED)
    told_before = f"The secret number of the {word} is" in before
    assert told_before == (task == "niah_changed") and f"number of the {word}" not in row["context"][end:]
    assert row["context"].count("secret number") == 24 + (task == "niah_changed")


@pytest.mark.parametrize("length", [700, 1024, 1500])
@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_paraphrase"])
def test_a_case_is_the_longest_that_fits(task, length, tokenizer, monkeypatch):
    counts = []
    generator = ruler.TASKS[task]

    def counted(draw, count, essay):
        counts.append(count)
        return generator(draw, count, essay)

    monkeypatch.setitem(ruler.TASKS, task, counted)
    row = ruler.case(task, length, tokenizer, 0, PROSE)

    def tokens(count):
        units, _, _, asked = generator(ruler.random.Random(f"{task}/{length}/0"), count, PROSE)
        text = f"{' '.join(units)}\n{asked['question']}{asked['answer_prefix']}"
        return units, len(tokenizer(text, add_special_tokens=False)["input_ids"]) + row["max_new_tokens"]

    best = next(n for n in sorted({*counts}) if " ".join(tokens(n)[0]) == row["context"])
    assert tokens(best)[1] <= length < tokens(best + 1)[1] and len(counts) < 14


def test_no_pair_of_words_is_learned_and_measured():
    learned = {word for pair in paraphrases.LEARNED for word in pair}
    assert not learned & {word for pair in paraphrases.MEASURED for word in pair}
