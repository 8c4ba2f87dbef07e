"""Drafts cost or save passes, and never change what the base LM says."""

import pytest
import torch
from small_base import small

from megactx.gist import GistNet
from megactx.memory.prediction import Readout
from megactx.parts.models import Models
from megactx.runtime.speculative import LONGEST, Drafter, Gists, Lookup, Speculative, behind_match, verified

K, PROMPT = 4, [0, *torch.randint(3, 97, (30,), generator=torch.Generator().manual_seed(0)).tolist()] * 2


@pytest.fixture(scope="module")
def models():
    base = small()
    torch.manual_seed(1)
    net = GistNet(base.width, base.embedding_rms(), block_size=K, num_heads=4).eval()
    return Models(base, net, prediction=Readout(base.width).eval())


class Said(Drafter):
    """Always the same draft."""

    def __init__(self, *tokens: int):
        self.tokens = list(tokens)

    def draft(self, tokens: list[int]) -> list[int]:
        return self.tokens


class Knowing(Drafter):
    """The right answer, and from some place on a wrong one."""

    def __init__(self, answer: list[int], wrong: int):
        self.answer, self.wrong = answer, wrong

    def draft(self, tokens: list[int]) -> list[int]:
        draft = self.answer[len(tokens) - len(PROMPT) :][:LONGEST]
        return [(t + 1) % 97 if n >= self.wrong else t for n, t in enumerate(draft)]


def plain(base, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(base.logits(base(base.embed(torch.tensor([ids])), None)[0, -1]).argmax()))
    return ids[len(prompt) :]


def drafters(models) -> dict[str, Drafter]:
    return {
        "none": Drafter(),
        "lookup": Lookup(),
        "behind": Gists(models),
        "expected": Gists(models, models.prediction),
        "nonsense": Said(5, 96, 7, 8, 9, 10, 11, 12),
    }


@pytest.mark.parametrize("name", ["none", "lookup", "behind", "expected", "nonsense"])
def test_greedy_decoding_gives_the_tokens_of_full_passes_whatever_is_drafted(models, name):
    decoding = Speculative(models.base, drafters(models)[name])
    assert decoding.generate(PROMPT, 40) == plain(models.base, PROMPT, 40)
    assert decoding.tally.tokens == 40 and decoding.tally.passes + decoding.tally.accepted == 40
    assert decoding.tally.accepted <= decoding.tally.drafted and (decoding.tally.drafted > 0) == (name != "none")


@pytest.mark.parametrize("wrong", [0, 3, LONGEST])
def test_a_draft_counts_up_to_its_first_wrong_token(models, wrong):
    answer = plain(models.base, PROMPT, 36)
    decoding = Speculative(models.base, Knowing(answer, wrong))
    assert decoding.generate(PROMPT, 36) == answer
    assert decoding.tally.passes == 36 // (wrong + 1), "a pass gives what is right of its draft, and one token more"


def test_drawn_tokens_are_distributed_as_the_base_says_by_chi_square():
    """Behind a text, and behind a token of the draft that was taken; the draft is likely, unlikely, or in between."""
    draw, count = torch.Generator().manual_seed(0), 3000
    logits = 2 * torch.randn(3, 12, generator=draw)
    share = (logits.double() / 0.7).softmax(-1)
    for first in (int(share[0].argmax()), int(share[0].argmin()), int(share[0].argsort()[6])):
        draft = [first, int(share[1].argmax())]
        found = [torch.zeros(12), torch.zeros(12), torch.zeros(12)]
        for _ in range(count):
            for place, token in enumerate(verified(logits, draft, 0.7, draw)):
                found[place][token] += 1
        for place, seen in enumerate(found):
            expected = seen.sum() * share[place]
            large = expected >= 5
            chi, free = ((seen - expected)[large] ** 2 / expected[large]).sum().item(), max(1, int(large.sum()))
            assert chi < free + 4 * (2 * free) ** 0.5, (first, place, chi)  # about one in 10,000 by chance
        assert found[0].sum() == count and found[1].sum() == found[0][draft[0]]


def test_the_same_seed_draws_the_same_tokens_and_another_one_others(models):
    drawn = [Speculative(models.base, Lookup(), 1.0, seed).generate(PROMPT, 20) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_gists_find_a_block_that_comes_back_without_a_word_in_common_with_what_is_behind(models):
    drafter = Gists(models)
    text = torch.randint(3, 97, (12 * K,), generator=torch.Generator().manual_seed(5)).tolist()
    text[8 * K : 9 * K] = text[2 * K : 3 * K]
    for block in range(9):
        drafter.block_done(text[: (block + 1) * K], torch.zeros(models.base.width))
    assert drafter.draft(text[: 9 * K])[:K] == text[3 * K : 4 * K]


def test_the_newest_place_of_the_longest_end_is_what_is_looked_up():
    assert behind_match([7, 1, 2], [1, 2, 3, 9, 7, 1, 2, 4, 1, 2, 5], most=2) == [4, 1]
    assert behind_match([8, 1, 2], [1, 2, 3, 9, 1, 2, 4], most=9) == [4]
    assert behind_match([8], [1, 2, 8]) == [] and behind_match([], [1]) == []


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [([], 4, "prompt: it is empty"), (PROMPT * 8, 100, "have 596 tokens, the base LM takes 512")],
)
def test_what_cannot_be_decoded_is_refused(models, prompt, count, message):
    with pytest.raises(ValueError, match=message):
        Speculative(models.base, Drafter()).generate(prompt, count)
