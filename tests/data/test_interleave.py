import numpy as np
import pytest

from megactx.data.interleave import interleaved

BLOCK, BOS = 32, 10**9


def document(number, tokens):
    """Token i of document n is 10,000 n + i, so that every piece says where it is from."""
    return np.concatenate([[BOS], 10_000 * number + np.arange(1, tokens)])


def pool(*lengths):
    documents = [document(number + 1, tokens) for number, tokens in enumerate(lengths)]
    return lambda rng: documents[rng.integers(len(documents))]


def segments(ids):
    """-> [(start, length, document, place in it)] of runs that go on as their document does."""
    known = np.where(ids == BOS, ids[1] - 1, ids)
    cuts = [0, *(np.flatnonzero(np.diff(known) != 1) + 1).tolist(), len(ids)]
    return [
        (a, b - a, int(known[a]) // 10_000, int(known[a]) % 10_000) for a, b in zip(cuts[:-1], cuts[1:], strict=True)
    ]


@pytest.mark.parametrize("length", [2 * BLOCK + 1, 3 * BLOCK, 128, 1000, 4096, 5001])
def test_segments_are_whole_blocks_on_the_grid_of_documents_and_of_the_result(length):
    pick = pool(96, 300, 2000, 6000)
    for seed in range(20):
        ids = interleaved(document(0, length), np.random.default_rng(seed), BLOCK, pick)
        assert len(ids) == length and ids.dtype == np.int64
        assert ids[0] == BOS and (ids == BOS).sum() == 1
        found = segments(ids)
        assert len(found) > 1 and found[0][2:] == (0, 0)
        for start, size, _, place in found:
            assert start % BLOCK == 0 and place % BLOCK == 0
            assert size % BLOCK == 0 or start + size == length
            assert start == 0 or place >= BLOCK


def test_segments_have_a_few_hundred_tokens_of_several_documents():
    pick = pool(*[6000] * 50)
    sizes, sources = [], set()
    for seed in range(50):
        found = segments(interleaved(document(0, 4096), np.random.default_rng(seed), BLOCK, pick))
        sizes += [size for _, size, *_ in found[:-1]]
        sources |= {source for _, _, source, _ in found}
    assert min(sizes) >= 128 and max(sizes) <= 512 and 300 < np.mean(sizes) < 340
    assert sources == set(range(51))


def test_the_same_generator_gives_the_same_document():
    pick, base = pool(300, 2000), document(0, 2000)
    a, b, c = (interleaved(base, np.random.default_rng(seed), BLOCK, pick) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.array_equal(base, document(0, 2000))


@pytest.mark.parametrize("block", [1, 7, 200, 700])
def test_other_block_sizes_keep_the_grid(block):
    pick = pool(3000, 5000)
    for seed in range(5):
        found = segments(interleaved(document(0, 3 * 700), np.random.default_rng(seed), block, pick))
        assert len(found) > 1 and all(start % block == 0 for start, *_ in found)
