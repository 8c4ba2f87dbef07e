"""A prompt answers alike in whatever form it is kept, if nothing of it is compressed; else as its entries say."""

import pytest
import torch
from small_base import WIDTH, small

from megactx.evaluation.table import Table
from megactx.gist import GistNet
from megactx.gist.carriers.avgpool import AvgPool
from megactx.gist.carriers.last_token import LastToken
from megactx.lm import masks
from megactx.lm.prefill import prefill
from megactx.studies.caching_cost import flops, measure_answers, measure_making
from megactx.studies.prompts import again, cached, compressed, filled, greedy, levels
from megactx.studies.trained import Nothing

K, T, A, B = 8, 64, 5, 2
LAYERS, HEADS, HEAD_WIDTH, KEYS = 4, 4, 16, 2  # of small_base


@pytest.fixture(scope="module")
def base():
    base = small()
    for p in base.parameters():
        p.data *= 2.5  # a random base is indifferent to what it reads
    return base


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 97, (B, T + A), generator=torch.Generator().manual_seed(1))


def read(base, ids):
    return prefill(base, ids, with_states=True)


def plain_greedy(base, rows, positions, ids, start, tokens):
    """A fresh prefill for every token of the answer."""
    for _ in range(tokens):
        after = start + torch.arange(ids.shape[1])
        x = torch.cat([rows, base.embed(ids)], dim=1)
        at = torch.cat([positions, after.expand(len(ids), -1)], dim=1)
        hidden = base(x, at, masks.causal(x.shape[1]))
        ids = torch.cat([ids, base.logits(hidden[:, -1:]).argmax(-1)], dim=1)
    return ids[:, -tokens:]


@torch.no_grad()
def test_a_prompt_that_is_read_again_and_its_cache_answer_as_a_plain_prefill(base, ids):
    prompt, rest = ids[:, :T], ids[:, T:]
    wanted = plain_greedy(base, base.embed(prompt), torch.arange(T).expand(B, -1), rest, T, 6)
    for kept in (
        again(base, prompt),
        cached(base, read(base, prompt)),
        compressed(base, LastToken(K), read(base, prompt), 0)["keys"],
    ):
        assert torch.equal(greedy(base, kept, rest, 6), wanted)


@torch.no_grad()
@pytest.mark.parametrize("count", [3, 7])
@pytest.mark.parametrize("gaussian_rope", ["plain", "damped"])
def test_gists_answer_as_a_plain_prefill_of_the_entries(base, ids, count, gaussian_rope):
    torch.manual_seed(2)
    net = GistNet(WIDTH, base.embedding_rms(), K, num_heads=4, skip="none", gaussian_rope=gaussian_rope)
    prompt, rest = ids[:, :T], ids[:, T:]
    kept = compressed(base, net, read(base, prompt), count)
    answers = {form: greedy(base, value, rest, 6) for form, value in kept.items()}
    assert torch.equal(answers["vectors"], answers["keys"])
    assert kept["vectors"].entries == kept["keys"].entries == K + count + T - (count + 1) * K
    if gaussian_rope == "plain":  # the plain prefill has points for positions
        embedded = base.embed(prompt)
        gists = net.encode_block(embedded[:, K : K * (count + 1)].reshape(-1, K, WIDTH)).view(B, count, -1)
        rows = torch.cat([embedded[:, :K], gists, embedded[:, K * (count + 1) :]], dim=1)
        places = [torch.arange(K), torch.arange(1, count + 1) * K + net.offset, torch.arange(K * (count + 1), T)]
        wanted = plain_greedy(base, rows, torch.cat(places).expand(B, -1), rest, T, 6)
        assert torch.equal(answers["vectors"], wanted)


@torch.no_grad()
def test_keys_that_lose_nothing_answer_as_the_prompt_itself(base, ids):
    prompt, rest = ids[:, :T], ids[:, T:]
    kept = compressed(base, AvgPool(1), read(base, prompt), T - 1)["keys"]
    assert kept.entries == T
    assert torch.equal(greedy(base, kept, rest, 6), greedy(base, cached(base, read(base, prompt)), rest, 6))


@torch.no_grad()
def test_nothing_in_place_is_the_sink_and_the_raw_rest(base, ids):
    prompt, rest = ids[:, :T], ids[:, T:]
    kept = compressed(base, Nothing(K), read(base, prompt), 4)["keys"]
    rows = torch.cat([base.embed(prompt[:, :K]), base.embed(prompt[:, 5 * K :])], dim=1)
    places = torch.cat([torch.arange(K), torch.arange(5 * K, T)]).expand(B, -1)
    assert kept.entries == T - 4 * K
    assert torch.equal(greedy(base, kept, rest, 6), plain_greedy(base, rows, places, rest, T, 6))
    assert not torch.equal(greedy(base, kept, rest, 6), greedy(base, again(base, prompt), rest, 6)), "it reads"


def test_bytes_are_those_of_what_is_kept(base, ids):
    prompt, column = ids[:, :T], 2 * 2 * LAYERS * KEYS * HEAD_WIDTH
    assert again(base, prompt).stored == 4 * T
    assert cached(base, read(base, prompt)).stored == T * column
    kept = compressed(base, LastToken(K), read(base, prompt), 3)
    assert kept["vectors"].stored == 4 * (T - 3 * K) + 3 * 2 * WIDTH
    assert kept["keys"].stored == (T - 3 * K + 3) * column == filled(base, kept["vectors"]).stored


def test_levels_leave_the_newest_blocks_raw_so_that_the_compression_comes_out():
    found = levels(33 * 32, 32, [1, 2, 8, 32])
    assert list(found.values()) == [0, 17, 29, 32]
    assert list(found) == pytest.approx([1, 2.06, 8.19, 32], abs=0.3)
    for compression, count in found.items():
        assert compression == round(32 * 32 / (count + (32 - count) * 32), 2)
    assert levels(16, 8, [1, 2, 4, 8]) == {1.0: 0, 8.0: 1}, "one block is either raw or not"
    for wrong in (0.5, 33):
        with pytest.raises(ValueError, match=f"--compression={wrong:g} is not allowed: 1 to 32"):
            levels(1024, 32, [wrong])


def linear_flops(base, rows):
    return 2 * rows * sum(p.numel() for n, p in base.named_parameters() if "layers" in n and p.ndim == 2)


def test_flops_are_those_of_the_shapes(base, ids):
    """Linear layers by row, attention by row and column, the head on the last row only."""
    prompt, rest, head = ids[:1, :T], ids[:1, T:], 2 * WIDTH * 97

    def attention(rows, columns):
        return 4 * rows * columns * HEADS * HEAD_WIDTH * LAYERS

    for kept, rows in ((again(base, prompt), T + A), (cached(base, read(base, prompt)), A)):
        wanted = linear_flops(base, rows) + attention(rows, T + A) + head
        assert flops(lambda kept=kept: greedy(base, kept, rest, 1)) == wanted
    own = linear_flops(base, A + 2) + attention(A, T + A) + attention(1, T + A + 1) + attention(1, T + A + 2) + 3 * head
    kept = cached(base, read(base, prompt))
    assert flops(lambda: greedy(base, kept, rest, 3)) == own


def test_answers_and_carriers_are_measured(base, ids):
    prompt, rest = ids[:1, :T], ids[:1, T:]
    net = GistNet(WIDTH, base.embedding_rms(), K, num_heads=4)
    prefill = read(base, prompt)
    forms = {"again": again(base, prompt), "cache": cached(base, prefill)} | compressed(base, net, prefill, 7)
    found = measure_answers(base, forms, rest, 3, repeats=2)
    assert found["again"]["flops"] > found["cache"]["flops"] > found["keys"]["flops"]
    assert found["again"]["flops"] > found["vectors"]["flops"] > found["keys"]["flops"]
    assert all(cost["answer_flops"] > cost["flops"] and cost["answer_seconds"] > 0 for cost in found.values())
    made = Table()
    measure_making(base, {"gistnet": net, "avgpool": AvgPool(K)}, prompt, made)
    own, avgpool = made.pick(carrier="gistnet"), made.pick(carrier="avgpool")
    assert own.point(metric="vector_bytes") == 2 * WIDTH and avgpool.one(metric="vector_bytes") is None
    more = own.point(metric="keys_flops") - own.point(metric="made_flops")
    assert more == linear_flops(base, K + 7) + 4 * ((K + 7) ** 2 * HEADS * HEAD_WIDTH * LAYERS)
    flat = avgpool.point(metric="made_flops")
    assert flat == avgpool.point(metric="keys_flops") > flops(lambda: read(base, prompt))
