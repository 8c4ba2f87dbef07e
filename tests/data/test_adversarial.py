import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megactx.data.adversarial import KINDS, Vocabulary, disturbed, near_identical, noisy, renumbered, repeated
from megactx.data.tokenizer import load_tokenizer

BLOCK = 32


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("asset:tiny-base")


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer)


@pytest.fixture(scope="module")
def real(tokenizer):
    """1,000 tokens of a module with words and numbers; not a whole number of blocks."""
    text = (Path(sysconfig.get_path("stdlib")) / "calendar.py").read_text(encoding="utf-8")
    return encode(tokenizer, text)[:1000]


def encode(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray([tokenizer.bos_token_id, *ids], dtype=np.int64)


def rng(seed=0):
    return np.random.default_rng(seed)


def doubles(ids):
    """Starts on the grid of neighbouring blocks that differ in exactly one place -> that place."""
    found = {}
    for start in range(0, len(ids) - 2 * BLOCK + 1, BLOCK):
        different = np.flatnonzero(ids[start : start + BLOCK] != ids[start + BLOCK : start + 2 * BLOCK])
        if len(different) == 1:
            found[start] = start + int(different[0])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2 * BLOCK + 1, 3 * BLOCK, 500, 1000])
def test_every_kind_keeps_length_type_and_bos_and_is_a_function_of_the_generator(kind, length, real, vocabulary):
    ids = real[:length]
    before = ids.copy()
    for seed in range(20):
        out = kind(ids, rng(seed), BLOCK, vocabulary)
        assert len(out) == length and out.dtype == np.int64
        assert out[0] == ids[0] and not (out[1:] == ids[0]).any()
        assert np.array_equal(out, kind(ids, rng(seed), BLOCK, vocabulary))
    assert np.array_equal(ids, before)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_a_text_that_gives_room_for_it_and_not_always_alike(kind, real, vocabulary):
    outs = [kind(real, rng(seed), BLOCK, vocabulary) for seed in range(10)]
    assert all(not np.array_equal(out, real) for out in outs)
    assert len({out.tobytes() for out in outs}) > 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 2, 7])
def test_every_kind_works_on_other_block_sizes(kind, block, real, vocabulary):
    for seed in range(10):
        out = kind(real, rng(seed), block, vocabulary)
        assert len(out) == len(real) and not np.array_equal(out, real)


def copies(out, unit):
    """Distances between equal runs of 32 different tokens that start at a multiple of ``unit``."""
    seen, distances = {}, set()
    for start in range(unit, len(out) - BLOCK + 1, unit):
        key = out[start : start + BLOCK].tobytes()
        if key in seen:
            distances.add(start - seen[key])
        seen.setdefault(key, start)
    return distances


def test_aligned_blocks_come_back_on_the_grid():
    ids = np.arange(1000)  # no token twice: every copy is one that was made
    for seed in range(30):
        out = repeated(ids, rng(seed), BLOCK, aligned=True)
        assert copies(out, BLOCK)
        starts = range(0, len(out) - BLOCK + 1, BLOCK)
        assert all((np.diff(out[s : s + BLOCK]) == 1).all() and out[s] % BLOCK == 0 for s in starts)


def test_passages_that_are_not_aligned_come_back_at_another_offset_to_the_grid():
    ids = np.arange(10 * BLOCK)  # short: exactly one passage comes back
    for seed in range(200):
        out = repeated(ids, rng(seed), BLOCK, aligned=False)
        jump = int(np.flatnonzero(np.diff(out) != 1)[0]) + 1
        distance = jump - out[jump]
        again = next((n for n, (a, b) in enumerate(zip(out[jump:], ids[out[jump] :], strict=False)) if a != b), 0)
        assert distance % BLOCK and out[jump] >= 1
        assert again == 0 or 15 <= again <= 4 * BLOCK + BLOCK  # a copy may run on into the text that follows


def test_a_document_has_aligned_or_unaligned_repeats_by_the_generator():
    outs = [repeated(np.arange(1000), rng(seed), BLOCK) for seed in range(40)]
    aligned = [all(out[s] % BLOCK == 0 for s in range(0, 960, BLOCK)) for out in outs]
    assert 8 < sum(aligned) < 32


def test_a_document_without_room_for_a_copy_comes_back_as_it_is(vocabulary):
    ids = np.arange(100, 100 + 3 * BLOCK - 1)  # the sink, one block, and not a whole one after it
    assert np.array_equal(repeated(ids, rng(), BLOCK, aligned=True), ids)
    assert np.array_equal(near_identical(ids, rng(), BLOCK, vocabulary), ids)
    whole = np.arange(100, 100 + 3 * BLOCK)
    assert len(doubles(near_identical(whole, rng(), BLOCK, vocabulary))) == 1


def test_neighbours_differ_in_exactly_one_fact_and_start_on_the_grid(real, vocabulary, tokenizer):
    kinds = []
    for seed in range(30):
        out = near_identical(real, rng(seed), BLOCK, vocabulary)
        pairs = doubles(out)
        assert len(pairs) == 1000 // BLOCK // 8 and 0 not in pairs
        for place in pairs.values():
            old, new = int(out[place]), int(out[place + BLOCK])
            assert vocabulary.shape[old] == vocabulary.shape[new] > 0 and new in real
            kinds.append(bool(vocabulary.number[old]))
        kept = np.concatenate(
            [out[s : s + BLOCK] for s in range(0, 992, BLOCK) if s - BLOCK not in pairs] + [out[992:]]
        )
        assert np.array_equal(kept, real[: len(kept)])  # without the copies it is the text
    assert 0.2 < np.mean(kinds) < 0.8


def test_where_a_block_has_no_fact_any_token_is_exchanged_for_one_of_the_document(vocabulary, tokenizer):
    text = encode(tokenizer, "( ) [ ] { } ; : , . ! ? + - * / " * 20)[:320]
    assert not vocabulary.facts(text).any()
    out = near_identical(text, rng(), BLOCK, vocabulary)
    assert len(doubles(out)) == 1 and set(out.tolist()) == set(text.tolist())
    same = np.full(320, text[3])
    assert np.array_equal(near_identical(same, rng(), BLOCK, vocabulary), same)


def test_a_word_that_goes_on_is_no_fact_and_a_word_before_a_new_line_is(vocabulary, tokenizer):
    for text, facts in (
        (" return\n that, 17", [" return", " that", "1", "7"]),
        (" returnxy", []),
        (" that_one", []),
        (" is", []),
    ):
        ids = encode(tokenizer, text + ".")
        found = [tokenizer.decode([token]) for token in ids[vocabulary.facts(ids) > 0]]
        assert found == facts, text


def test_numbers_become_others_of_as_many_digits_in_half_the_text_and_nothing_else_changes(real, vocabulary):
    changed = []
    for seed in range(20):
        out = renumbered(real, rng(seed), BLOCK, vocabulary)
        places = np.flatnonzero(out != real)
        assert len(places) and np.ptp(places) < 500
        assert vocabulary.number[real[places]].all()
        assert np.array_equal(vocabulary.shape[real], vocabulary.shape[out])
        inside = np.flatnonzero(vocabulary.number[real])
        inside = inside[(inside >= places[0]) & (inside <= places[-1])]
        assert np.array_equal(inside, places)  # every number of the passage, and each to another one
        changed.append(len(places))
    assert max(changed) > 20


def test_a_text_without_numbers_keeps_them_so_and_becomes_adversarial_in_another_way(vocabulary, tokenizer):
    ids = encode(tokenizer, "one returns what another module gave to it, " * 30)[:300]
    assert np.array_equal(renumbered(ids, rng(), BLOCK, vocabulary), ids)
    out = disturbed(ids, rng(), BLOCK, vocabulary, first=KINDS.index(renumbered))
    assert len(doubles(out)) == 1  # the next kind


def test_noise_disturbs_some_characters_and_no_spaces(real, vocabulary, tokenizer):
    text = tokenizer.decode(real[1:].tolist())
    for seed in range(10):
        noise = tokenizer.decode(noisy(real, rng(seed), BLOCK, vocabulary)[1:].tolist())
        assert noise != text
        assert [c for c in noise if c.isspace()][:100] == [c for c in text if c.isspace()][:100]
        old, new = text[:2000].split(), noise[:2000].split()
        same = np.mean([a == b for a, b in zip(old, new, strict=False)])
        assert 0.1 < same < 0.99


def test_noise_never_makes_a_special_token_of_text(vocabulary, tokenizer):
    ids = encode(tokenizer, "a <|bos|> b <|pad|> " * 40)
    for seed in range(20):
        out = noisy(ids, rng(seed), BLOCK, vocabulary)
        assert not np.isin(out[1:], tokenizer.all_special_ids).any() and len(out) == len(ids)


def test_noise_leaves_a_text_of_spaces_and_fills_what_became_shorter(vocabulary, tokenizer):
    spaces = encode(tokenizer, "\n \n\n\t" * 50)
    assert np.array_equal(noisy(spaces, rng(), BLOCK, vocabulary), spaces)
    ids = np.concatenate([[tokenizer.bos_token_id], np.full(300, encode(tokenizer, "#")[1])])
    out = noisy(ids, rng(3), BLOCK, vocabulary)  # long runs of one character are fewer tokens
    assert len(out) == 301


def test_all_kinds_are_drawn_alike_and_the_first_one_can_be_chosen(real, vocabulary, tokenizer):
    for index, kind in enumerate(KINDS):
        expected = kind(real, rng(5), BLOCK, vocabulary)
        assert np.array_equal(disturbed(real, rng(5), BLOCK, vocabulary, first=index), expected)
    drawn = [int(rng(seed).integers(len(KINDS))) for seed in range(40)]
    for seed in range(40):
        generator = rng(seed)
        generator.integers(len(KINDS))
        expected = KINDS[drawn[seed]](real, generator, BLOCK, vocabulary)
        assert np.array_equal(disturbed(real, rng(seed), BLOCK, vocabulary), expected)
    assert min(drawn.count(index) for index in range(len(KINDS))) >= 4


def test_a_text_that_nothing_can_change_comes_back(vocabulary, tokenizer):
    space = encode(tokenizer, "\n")[1]
    ids = np.concatenate([[tokenizer.bos_token_id], np.full(200, space)])
    assert np.array_equal(disturbed(ids, rng(), BLOCK, vocabulary), ids)


def test_the_vocabulary_does_not_depend_on_the_order_in_which_tokens_come(tokenizer, vocabulary):
    class Reversed:
        def get_vocab(self):
            return dict(reversed(tokenizer.get_vocab().items()))

    other = Vocabulary(Reversed())
    assert np.array_equal(other.shape, vocabulary.shape) and np.array_equal(other.rank, vocabulary.rank)


def test_numbers_of_several_digits_go_with_those_of_as_many_digits():
    class Digits:
        def get_vocab(self):
            return {t: i for i, t in enumerate(["<s>", "7", "8", "42", "43", "▁42", "▁43", "Ġword", "²", "##7"])}

    vocabulary = Vocabulary(Digits())
    assert vocabulary.number.tolist() == [False] + [True] * 6 + [False] * 3
    ids = np.asarray([0, 1, 3, 5, 7, 1, 2, 3, 4, 5, 6] * 3)
    for seed in range(10):
        out = renumbered(ids, rng(seed), 2, vocabulary)
        changed = ids != out
        assert (np.asarray([0, 2, 1, 4, 3, 6, 5, 7])[ids[changed]] == out[changed]).all() and changed.any()
