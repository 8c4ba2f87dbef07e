"""Windows by a rule: the budget is used on the blocks with the highest numbers, and on nothing else."""

import pytest
import torch
from windows import K, small_base, tree_of

from megactx.focus.layout import by_value, check_shares, free_edits, least_entries


@pytest.fixture(scope="module")
def tree():
    return tree_of(small_base(), (150, 97))


def blocks_of(context, row):
    """Level-1 blocks of a row that are raw."""
    raw = (context.lod[row] == 0) & context.mask[row]
    return {int(i) // K for i in context.index[row][raw]}


def values(tree, seed=0):
    return torch.rand(2, int(tree.counts(1).max()), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("budget", [60, 75, 100, 150])
@pytest.mark.parametrize("recent", [8, 13])
def test_the_highest_blocks_are_open_and_the_budget_is_used_up(tree, budget, recent):
    worth = values(tree)
    context = by_value(tree, budget, worth, recent=recent)  # the constructor checks the invariants
    for row, length in enumerate((150, 97)):
        count, opened = length // K, blocks_of(context, row)
        always = {0, *range((length - recent) // K, count)}
        assert always <= opened
        free = sorted(set(range(count)) - always, key=lambda block: -worth[row, block])
        chosen = opened - always - {count}  # the partial tail is no block
        assert chosen == set(free[: len(chosen)])
        assert int(free_edits(tree, budget, recent)[row]) >= len(chosen)
        assert len(chosen) == len(free) or budget - int(context.counts[row]) < K - 1


def test_equal_numbers_open_the_newer_block_and_minus_infinity_none(tree):
    worth = torch.full((2, 37), -torch.inf)
    worth[:, 3] = worth[:, 9] = 1.0
    context = by_value(tree, 60, worth, recent=8)
    assert 9 in blocks_of(context, 0) and blocks_of(context, 1) >= {3, 9}
    opened = by_value(tree, 150, worth, recent=8)
    assert {3, 9} == blocks_of(opened, 0) - {0, 35, 36, 37}


def test_the_oldest_blocks_become_coarse_where_gists_do_not_fit(tree):
    nothing = torch.full((2, 37), -torch.inf)
    fine = by_value(tree, 100, nothing, recent=8)
    tight = by_value(tree, int(fine.counts[0]) - 1, nothing, recent=8)
    assert fine.lod.max() == 1
    assert (tight.lod[0] == 2).sum() == 1 and tight.index[0][tight.lod[0] == 2].item() == 1
    assert tight.counts[0] == fine.counts[0] - (K - 1)
    with pytest.raises(ValueError, match=r"budget=20 is too small: 150 tokens take at least"):
        by_value(tree, 20, nothing, recent=8)


def test_what_is_asked_to_be_coarse_is_so_where_it_may(tree):
    coarse = torch.ones(2, int(tree.counts(2).max()), dtype=torch.bool)
    context = by_value(tree, 150, values(tree), coarse, recent=20)
    found = context.index[0][(context.lod[0] == 2) & context.mask[0]].tolist()
    assert found == list(range(1, (150 - 20) // K // K))  # not the one with the sink, none with newest tokens


def test_another_number_of_values_is_refused(tree):
    with pytest.raises(ValueError, match=r"values have shape \[2, 5\], expected \[2, 37\]"):
        by_value(tree, 100, torch.zeros(2, 5))


@pytest.mark.parametrize("recent", [8, 13])
def test_the_least_entries_of_a_length_are_what_a_window_takes_and_one_fewer_is_refused(recent):
    base = small_base()
    for tokens in range(90, 131):
        tree = tree_of(base, (tokens,))
        nothing = torch.full((1, int(tree.counts(1).max())), -torch.inf)
        least = least_entries(tokens, K, recent)
        assert int(by_value(tree, least, nothing, recent=recent).counts[0]) == least
        with pytest.raises(ValueError, match=f"at least {least} entries"):
            by_value(tree, least - 1, nothing, recent=recent)


def test_shares_that_are_too_small_for_a_length_are_refused_with_a_length_that_would_do():
    with pytest.raises(ValueError, match="stage.budgets.*0.125 of 1951 tokens are 243 entries, .*at least 1952, or"):
        check_shares("stage.budgets", [0.25, 0.125], 1024, 4096, 32)
    check_shares("stage.budgets", [0.25, 0.125], 1952, 4096, 32)
    with pytest.raises(ValueError, match="0.06 of 2048 tokens .* take larger shares"):
        check_shares("stage.evaluate.budgets", [0.25, 0.06], 2048, 2048, 32)
