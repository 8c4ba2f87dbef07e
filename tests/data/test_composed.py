from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset

from megactx.data.adversarial import KINDS, Vocabulary
from megactx.data.composed import Composed
from megactx.data.spans import SpanBatches
from megactx.data.spans_module import SpanData, in_turn

WORDS = "parser argument 17 string 4 action 256 option False True 9 message 80 default, value.".split()
OFFSET = {"narrative": 0, "code": 1, "structured": 2}


class Texts:
    def __init__(self, documents=120):
        self.documents = documents

    def fingerprint(self):
        return f"composed {self.documents}"

    def load(self):
        rng = np.random.default_rng(0)
        return Dataset.from_list(
            [
                {"text": f"{i} " + " ".join(rng.choice(WORDS, 300)), "domain": list(OFFSET)[i % 3], "source": str(i)}
                for i in range(self.documents)
            ]
        )


def data(tokenizer, **settings):
    defaults = dict(
        block=32,
        horizon=32,
        min_tokens=128,
        max_tokens=512,
        batch=4,
        spans=4,
        weights={"narrative": 0.6, "code": 0.4, "structured": 0},
        validation_documents=8,
        validation_blocks=3,
        interleave=0.3,
        adversarial=0.2,
    )
    return SpanData(Texts(), tokenizer, **{**defaults, **settings})


@pytest.fixture(scope="module")
def made(tiny_tokenizer):
    module = data(tiny_tokenizer)
    module.setup()
    return module


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


def document(length, domain="code", text=0):
    return {"input_ids": np.arange(length), "domain": domain, "source": "s", "text": text}


def test_without_shares_batches_and_the_held_out_order_are_what_they_were_before_documents_were_made():
    code = [document(200 + 7 * i, "code", i) for i in range(15)]
    narrative = [document(210 + 9 * i, "narrative", 100 + i) for i in range(13)]
    shares = {"code": 0.4, "narrative": 0.6}
    batches = SpanBatches(code + narrative, shares, batch=3, spans=2, block=32, horizon=32, seed=3)
    expected = {  # written down before
        0: ([2, 100, 101], [214, 210, 219], [[128, 32], [96, 128], [96, 32]], 68607),
        5: ([102, 102, 1], [228, 228, 207], [[128, 96], [64, 32], [128, 32]], 73077),
        10**6: ([8, 7, 104], [256, 249, 246], [[160, 64], [32, 64], [128, 160]], 93651),
    }
    for index, values in expected.items():
        batch = batches[index]
        got = [batch[name].tolist() for name in ("document", "lengths", "block_starts")]
        assert (*got, batch["ids"].sum()) == values
    held = [document(200 + i, "code", i) for i in range(3)] + [document(250, "code", 1)]
    held[3:3] = [document(300, "narrative", 3), document(301, "narrative", 4)]
    order = [(d["text"], len(d["input_ids"])) for d in in_turn(held)]
    assert order == [(2, 202), (3, 300), (0, 200), (4, 301), (1, 201), (1, 250)]


def test_shares_of_zero_give_the_same_data_as_no_shares(tiny_tokenizer):
    plain, zero = (
        data(tiny_tokenizer, interleave=0.0, adversarial=0.0),
        data(tiny_tokenizer, interleave=0, adversarial=0),
    )
    for module in (plain, zero):
        module.setup()
    documents = [d for pool in plain.training.pools.values() for d in pool]
    direct = SpanBatches(documents, plain.weights, 4, 4, 32, 32, seed=0)
    for index in range(20):
        assert same(plain.training[index], zero.training[index]) and same(plain.training[index], direct[index])
    assert {d["domain"] for d in plain.held} == {"narrative", "code"} and len(plain.held) == len(zero.held)


def test_documents_are_drawn_by_the_shares(made):
    drawn = Counter(domain for index in range(500) for domain in made.training[index]["domain"])
    assert set(drawn) == {"narrative", "code", "mixed", "adversarial"}
    for domain, share in (("mixed", 0.3), ("adversarial", 0.2), ("narrative", 0.3), ("code", 0.2)):
        assert abs(drawn[domain] / drawn.total() - share) < 0.04, domain


def test_all_documents_can_be_made_ones(tiny_tokenizer):
    module = data(tiny_tokenizer, interleave=1, adversarial=0)
    module.setup()
    assert {domain for index in range(20) for domain in module.training[index]["domain"]} == {"mixed"}
    assert {d["domain"] for d in module.held} == {"narrative", "code", "mixed"}


def test_made_documents_keep_to_the_lengths_and_open_with_bos(made, tiny_tokenizer):
    bos = tiny_tokenizer.bos_token_id
    for index in range(50):
        batch = made.training[index]
        assert batch["lengths"].min() >= 128 and batch["lengths"].max() <= 512
        for ids, length in zip(batch["ids"], batch["lengths"], strict=True):
            assert ids[0] == bos and (ids[:length] == bos).sum() == 1


def test_a_batch_is_a_function_of_seed_and_index(made, tiny_tokenizer):
    again, other = data(tiny_tokenizer), data(tiny_tokenizer, seed=1)
    for module in (again, other):
        module.setup()
    made.training[3]
    np.random.seed(1)
    assert same(made.training[7], again.training[7]) and not same(made.training[7], other.training[7])
    assert not same(made.training[7], made.training[8])


def test_workers_give_the_same_batches(tiny_tokenizer):
    served = []
    for workers in (0, 2):
        module = data(tiny_tokenizer, workers=workers)
        module.setup()
        served.append([batch for batch, _ in zip(module.train_dataloader(), range(12), strict=False)])
    for a, b in zip(*served, strict=True):
        assert a["domain"] == b["domain"]
        assert all(torch.equal(a[name], b[name]) for name in ("ids", "lengths", "block_starts", "document"))
    assert {"mixed", "adversarial"} <= {domain for batch in served[0] for domain in batch["domain"]}


def test_held_out_documents_of_each_label_are_the_same_in_every_run_and_made_of_held_out_text(made, tiny_tokenizer):
    other = data(tiny_tokenizer, seed=5, interleave=0.01, adversarial=0.9)
    other.setup()
    assert len(made.held) == len(other.held)
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(made.held, other.held, strict=True))
    plain = [d for d in made.held if d["domain"] in OFFSET]
    texts = {d["text"] for d in plain}
    runs = {d["input_ids"][s : s + 32].tobytes() for d in plain for s in range(0, len(d["input_ids"]) - 31, 32)}
    for d in made.held:
        assert d["text"] in texts
        if d["domain"] == "mixed":
            ids = d["input_ids"]
            assert all(ids[s : s + 32].tobytes() in runs for s in range(0, len(ids) - 31, 32))
    count = Counter(d["domain"] for d in made.held)
    assert count["mixed"] == count["adversarial"] >= 2
    assert count["mixed"] == -(-len(plain) // 2)


def test_the_order_of_plain_held_out_documents_is_kept(made, tiny_tokenizer):
    module = data(tiny_tokenizer, interleave=0, adversarial=0)
    module.setup()
    plain = [d for d in made.held if d["domain"] in OFFSET]
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(plain, module.held, strict=True))


def test_validation_and_evaluation_have_the_labels_as_domains(made):
    served = Counter(batch["domain"][0] for batch in made.val_dataloader())
    assert served == dict.fromkeys(("narrative", "code", "mixed", "adversarial"), 2)
    assert {batch["domain"][0] for batch in made.evaluation_documents(50)} == set(served)
    assert {batch["domain"][0] for batch in made.held_out(Texts(9))} == set(OFFSET)


def composed(documents, tokenizer, weights=None, **shares):
    weights = weights or {"code": 1.0}
    return Composed(
        documents, weights, **{"interleave": 0.5, "adversarial": 0.5} | shares, block=32, vocabulary=tokenizer
    )


def test_segments_come_from_the_domains_by_weight():
    # Ids say the domain: below 10,000 it is code.
    narrative = [{**document(3000, "narrative", i), "input_ids": 10_000 + np.arange(3000)} for i in range(5)]
    code = [document(3000, "code", 10)] * 20
    make = composed(code + narrative, None, {"code": 0.25, "narrative": 0.75, "structured": 1.0}, adversarial=0.0)
    base, rng = {**narrative[0], "input_ids": np.full(100_000, -1)}, np.random.default_rng(0)
    ids = make.mixed(base, rng)["input_ids"]
    share = (ids[ids >= 0] < 10_000).mean()
    assert abs(share - 0.25) < 0.06


def test_every_kind_is_among_any_four_held_out_documents(tiny_tokenizer):
    documents = [document(400, "code", i) for i in range(8)]
    documents = [{**d, "input_ids": np.random.default_rng(i).integers(2, 500, 400)} for i, d in enumerate(documents)]
    vocabulary, tried = Vocabulary(tiny_tokenizer), []
    make = composed(documents, vocabulary, interleave=0.0)
    original = make.disturbed
    make.disturbed = lambda document, rng, first: tried.append(first) or original(document, rng, first)
    held = make.held_out(documents)
    assert len(held) == 8 and all(d["domain"] == "adversarial" for d in held)
    assert sorted(tried[:4]) == sorted(tried[4:]) == list(range(len(KINDS)))
    for before, after in zip(documents, held, strict=True):
        assert not np.array_equal(before["input_ids"], after["input_ids"]) and before["text"] == after["text"]


def test_one_held_out_document_gives_one_of_each_label(tiny_tokenizer):
    only = [document(200)]
    held = composed(only, Vocabulary(tiny_tokenizer)).held_out(only)
    assert [d["domain"] for d in held] == ["mixed", "adversarial"]


@pytest.mark.parametrize(
    "shares, said",
    [
        (dict(interleave=-0.1), "datamodule.interleave=-0.1 is not allowed"),
        (dict(interleave=1.5), "datamodule.interleave=1.5 is not allowed"),
        (dict(adversarial=float("nan")), "datamodule.adversarial=nan is not allowed"),
        (dict(adversarial=2), "datamodule.adversarial=2 is not allowed"),
        (dict(interleave=0.7, adversarial=0.4), "datamodule.interleave=0.7 and datamodule.adversarial=0.4"),
    ],
)
def test_shares_out_of_range_are_refused_by_name_before_any_data_is_read(tiny_tokenizer, shares, said):
    with pytest.raises(ValueError, match=said):
        data(tiny_tokenizer, **shares)
