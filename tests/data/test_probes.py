"""Probes tell something exact in an old block and ask for it behind the recency window."""

import numpy as np
import pytest

from megactx.data.probes import KINDS, make_probes

K, R, M = 64, 128, 4


@pytest.fixture(scope="module")
def made(tiny_tokenizer):
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 400, size=n) for n in (100, 448, 900)]
    return make_probes(tiny_tokenizer, texts, per_kind=3, block=K, recency=R, blocks=M)


def test_every_class_has_as_many_probes_as_asked_for(made):
    assert [probe.kind for probe in made] == [kind for kind in KINDS for _ in range(3)]


def test_the_answer_is_told_in_one_old_block_and_follows_the_question(made, tiny_tokenizer):
    for probe in made:
        told = tiny_tokenizer.decode(probe.ids[probe.told : probe.told + K])
        end = tiny_tokenizer.decode(probe.ids[probe.asked - 40 : probe.asked])
        assert f" {probe.answer}" in told and end.endswith(" is")
        assert told.startswith(end[end.rindex("\nThe ") :]), "asked in the words in which it was told"
        assert tiny_tokenizer.decode(probe.ids[probe.asked :]) == f" {probe.answer}"
        assert probe.told % K == 0 and K <= probe.told < probe.asked - R and probe.asked % K == 0
        assert 0 < probe.length < K


def test_what_is_longer_than_a_block_takes_as_many_as_it_needs(tiny_tokenizer):
    probes = make_probes(tiny_tokenizer, [np.arange(448) % 400 + 3], 3, block=16, recency=32, blocks=8)
    for probe in probes:
        told = tiny_tokenizer.decode(probe.ids[probe.told : probe.told + 16 * probe.blocks])
        assert f" {probe.answer}" in told and f" {probe.answer}" not in tiny_tokenizer.decode(
            probe.ids[probe.told : probe.told + 16 * (probe.blocks - 1)]
        ), "as many as it needs, and not one more"
        assert probe.told % 16 == 0 and 16 <= probe.told <= probe.asked - 32 - 16 * probe.blocks
    assert max(probe.blocks for probe in probes if probe.kind == "uuid") > 1


def test_values_differ_and_come_again_with_the_seed(tiny_tokenizer):
    texts = [np.arange(448) % 400 + 3]
    again = [make_probes(tiny_tokenizer, texts, 3, K, R, M, seed=s) for s in (0, 0, 1)]
    answers = [[probe.answer for probe in probes] for probes in again]
    assert answers[0] == answers[1] != answers[2] and len(set(answers[0])) > 10


def test_texts_that_are_too_short_and_blocks_that_are_too_small_are_refused(tiny_tokenizer):
    with pytest.raises(ValueError, match="no text has 448 tokens"):
        make_probes(tiny_tokenizer, [np.zeros(447, dtype=np.int64)], 1, K, R, M)
    with pytest.raises(ValueError, match="above blocks=4 of 4"):
        make_probes(tiny_tokenizer, [np.zeros(447, dtype=np.int64)], 1, 4, 8, M)
