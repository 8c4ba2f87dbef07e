import logging

import numpy as np
import pytest
import torch
from datasets import Dataset
from lightning import LightningModule, Trainer

from megactx.data.spans import SpanBatches, eligible_starts, evenly
from megactx.data.spans_module import SpanData

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()


class Texts:
    def __init__(self, words=260, documents=60, domains=("narrative", "code", "structured")):
        self.words, self.documents, self.domains = words, documents, domains

    def fingerprint(self):
        return f"spans {self.words} {self.documents} {self.domains}"

    def load(self):
        rng = np.random.default_rng(0)
        return Dataset.from_list(
            [
                {
                    "text": f"{i} " + " ".join(rng.choice(WORDS, self.words)),
                    "domain": self.domains[i % len(self.domains)],
                    "source": str(i),
                }
                for i in range(self.documents)
            ]
        )


def data(tokenizer, source=None, **settings):
    defaults = dict(
        block=32,
        horizon=32,
        min_tokens=128,
        max_tokens=512,
        batch=3,
        spans=4,
        weights={"narrative": 0.6, "code": 0.4, "structured": 0},
        validation_documents=6,
        validation_blocks=3,
    )
    return SpanData(source or Texts(), tokenizer, **{**defaults, **settings})


@pytest.mark.parametrize(
    "length, starts",
    [
        (95, []),  # one token short of sink, block and horizon
        (96, [32]),  # exactly one block, its horizon ends with the document
        (127, [32]),
        (128, [32, 64]),  # the second block is at the very end
        (40, []),
        (0, []),
    ],
)
def test_a_block_is_eligible_from_the_second_on_up_to_the_end_of_its_horizon(length, starts):
    assert eligible_starts(length, 32, 32).tolist() == starts


def test_a_block_at_the_very_end_is_eligible_for_a_horizon_of_one():
    assert eligible_starts(32 * 3 + 1, 32, 1).tolist() == [32, 64]
    assert eligible_starts(32 * 3, 32, 1).tolist() == [32]


def test_evenly_takes_first_and_last_and_never_one_twice():
    starts = np.arange(32, 1000, 32)
    for count in (1, 2, 5, 29, 30, 31, 50):
        taken = evenly(starts, count)
        assert len(set(taken.tolist())) == min(count, len(starts))
    assert evenly(starts, 2).tolist() == [starts[0], starts[-1]]


def test_a_batch_has_distinct_eligible_starts_and_padding_after_the_document(tiny_tokenizer):
    module = data(tiny_tokenizer, weights={"narrative": 0.5, "code": 0.5})
    module.setup()
    batch = next(iter(module.train_dataloader()))
    assert (
        batch["ids"].dtype
        == batch["block_starts"].dtype
        == batch["lengths"].dtype
        == batch["document"].dtype
        == torch.int64
    )
    assert batch["ids"].shape == (3, batch["lengths"].max()) and batch["block_starts"].shape == (3, 4)
    assert len(batch["domain"]) == 3 and all(isinstance(domain, str) for domain in batch["domain"])
    for ids, length, starts in zip(
        batch["ids"], batch["lengths"].tolist(), batch["block_starts"].tolist(), strict=True
    ):
        assert len(set(starts)) == 4 and set(starts) <= set(eligible_starts(length, 32, 32).tolist())
        assert ids[0] == tiny_tokenizer.bos_token_id and not ids[length:].any()


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_a_batch_is_a_function_of_seed_and_index(tiny_tokenizer):
    a, b, c = (data(tiny_tokenizer, seed=seed) for seed in (1, 1, 2))
    for module in (a, b, c):
        module.setup()
    np.random.seed(5)
    assert same(a.training[7], b.training[7]) and not same(a.training[7], a.training[8])
    assert not same(a.training[7], c.training[7])


def documents(lengths, domain="code"):
    return [
        {"input_ids": np.arange(length), "domain": domain, "source": "s", "text": i} for i, length in enumerate(lengths)
    ]


def test_a_document_with_too_few_blocks_gives_all_of_them_then_some_again(caplog):
    with caplog.at_level(logging.INFO):
        batches = SpanBatches(documents([160]), {"code": 1}, batch=1, spans=8, block=32, horizon=32, seed=0)
    assert "1 documents have fewer than 8" in caplog.text
    starts = batches[0]["block_starts"][0]
    assert len(starts) == 8 and set(starts.tolist()) == {32, 64, 96}


def test_documents_of_a_batch_are_about_equally_long_and_all_are_drawn_alike():
    batches = SpanBatches(documents(range(200, 1200)), {"code": 1}, batch=4, spans=1, block=32, horizon=32, seed=0)
    drawn = np.stack([batches[i]["lengths"] for i in range(2000)])
    assert np.ptp(drawn, axis=1).max() <= 210
    counts, _ = np.histogram(drawn, bins=10, range=(200, 1200))
    assert counts.min() > 0.85 * counts.mean() and counts.max() < 1.15 * counts.mean()


def test_domains_are_drawn_by_weight_and_null_is_their_share():
    both = documents([200] * 30) + documents([200] * 10, "narrative")
    for weights, share in (
        ({"code": 0.3, "narrative": 0.7, "structured": 0}, 0.3),
        (dict.fromkeys(("code", "narrative", "structured")), 0.75),
    ):
        batches = SpanBatches(both, weights, batch=8, spans=1, block=32, horizon=32, seed=0)
        drawn = [domain for i in range(300) for domain in batches[i]["domain"]]
        assert abs(drawn.count("code") / len(drawn) - share) < 0.05


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(weights={"code": 0}), "data.weights"),
        (dict(weights={"code": -1}), "data.weights.code=-1"),
        (dict(weights={"code": 1, "structured": 0.5}), "data.weights.structured=0.5: there is no document"),
        (dict(batch=0), "preset.batch=0"),
        (dict(spans=0), "preset.spans=0"),
    ],
)
def test_bad_weights_and_sizes_are_refused_by_name(settings, said):
    defaults = dict(weights={"code": 1}, batch=1, spans=1, block=32, horizon=32, seed=0)
    with pytest.raises(ValueError, match=said):
        SpanBatches(documents([200]), **{**defaults, **settings})


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(horizon=80), r"horizon.tokens=80 .* data.min_tokens=128: .* needs 144 tokens"),
        (dict(horizon=0), "horizon.tokens=0"),
        (dict(block=0), "block_size=0"),
        (dict(min_tokens=1024), "data.min_tokens=1024 is not allowed: documents have at most 512"),
        (dict(max_tokens=20_000), "data.max_tokens=20000 is not allowed: 16384 at most"),
        (dict(validation_blocks=0), "validation_blocks=0"),
    ],
)
def test_lengths_that_do_not_fit_are_refused_before_any_data_is_read(tiny_tokenizer, settings, said):
    with pytest.raises(ValueError, match=said):
        data(tiny_tokenizer, **settings)


def test_without_a_length_documents_are_cut_to_what_the_base_takes_and_the_log_says_so(tiny_tokenizer, caplog):
    with caplog.at_level(logging.INFO):
        module = data(tiny_tokenizer, max_tokens=None)
        module.limit_to(300)
        module.setup()
    assert "of at most 300 tokens" in caplog.text
    assert max(len(batch["ids"][0]) for batch in module.evaluation_documents()) == 300
    assert data(tiny_tokenizer, max_tokens=None).max_tokens == 16_384
    with pytest.raises(ValueError, match="data.max_tokens=1024 is not allowed: 1000 at most"):
        data(tiny_tokenizer, max_tokens=1024).limit_to(1000)


def test_texts_that_are_too_short_are_counted_and_nothing_left_is_refused(tiny_tokenizer, caplog):
    with pytest.raises(ValueError, match="data.min_tokens=128: none of the .* texts is that long"):
        data(tiny_tokenizer, Texts(words=3)).setup()
    with pytest.raises(ValueError, match="no held-out text"):
        data(tiny_tokenizer, Texts(documents=1, domains=("code",)), weights={"code": 1}).setup()


def test_validation_is_fixed_balanced_and_evenly_spaced(tiny_tokenizer):
    module = data(tiny_tokenizer, Texts(documents=200))
    module.setup()
    state = torch.random.get_rng_state()
    first, second = list(module.val_dataloader()), list(module.val_dataloader())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert sorted(batch["domain"][0] for batch in first) == ["code"] * 3 + ["narrative"] * 3
    assert len({batch["document"].item() for batch in first}) == 6
    trained = {text for i in range(100) for text in module.training[i]["document"].tolist()}
    for batch in first:
        assert batch["document"].item() not in trained
        every = eligible_starts(batch["lengths"].item(), 32, 32)
        assert batch["block_starts"].shape == (1, 3)
        assert batch["block_starts"][0, [0, -1]].tolist() == [every[0], every[-1]]


def test_evaluation_takes_every_block_or_about_as_many_as_asked(tiny_tokenizer):
    module = data(tiny_tokenizer, Texts(documents=1000))
    every = module.evaluation_documents()
    assert all(
        batch["block_starts"][0].tolist() == eligible_starts(batch["lengths"].item(), 32, 32).tolist()
        for batch in every
    )

    def asked(blocks):
        some = module.evaluation_documents(blocks)
        return len(some), sum(batch["block_starts"].numel() for batch in some)

    assert asked(2) == (1, 2)  # the blocks of a document share the pass over it
    documents, blocks = asked(64)
    assert documents <= 12 and 64 <= blocks < 64 + documents
    documents, blocks = asked(500)
    assert 500 <= blocks < 508 and 500 / 8 <= documents < len(every)
    assert asked(10**6) == (len(every), sum(batch["block_starts"].numel() for batch in every))


def test_another_source_is_evaluated_whole(tiny_tokenizer):
    module = data(tiny_tokenizer)
    other = module.held_out(Texts(documents=7, words=270))
    assert {batch["document"].item() for batch in other} == set(range(7))
    assert {batch["domain"][0] for batch in other} == {"narrative", "code", "structured"}
    assert all(isinstance(batch["ids"], torch.Tensor) for batch in other)


def test_spans_of_level_two_lie_on_their_own_grid_and_leave_the_rest_of_a_batch_as_it_was():
    settings = dict(weights={"code": 1}, batch=3, spans=2, block=4, horizon=5, seed=1)
    texts = documents([70, 60, 37])
    plain, both = SpanBatches(texts, **settings), SpanBatches(texts, **settings, level2_spans=4)
    for index in range(20):
        one, two = plain[index], both[index]
        starts = two.pop("span_starts")
        assert same(one, two) and starts.shape == (3, 4)
        for row, length in zip(starts, two["lengths"], strict=True):
            eligible = {s for s in (16, 32, 48) if s + 16 + 5 <= length}
            assert set(row.tolist()) == eligible, "every span is there where there is room"
        assert all(both[index][name] is not None for name in ("span_starts",)) and same(both[index], both[index])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(level2_spans=1, block=8, min_tokens=140, max_tokens=200), "needs 160 tokens"),
        (dict(level2_spans=-1), "datamodule.level2_spans=-1"),
    ],
)
def test_spans_of_level_two_that_do_not_fit_are_refused(tiny_tokenizer, settings, said):
    with pytest.raises(ValueError, match=said):
        data(tiny_tokenizer, **settings)


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, index):
        self.seen.append((batch["document"].tolist(), batch["block_starts"].tolist()))
        return self.weight.sum()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_with_the_batch_it_stopped_at(tiny_tokenizer, tmp_path, workers):
    def train(steps, checkpoint=None):
        recorder = Recorder()
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            accumulate_grad_batches=2,
            default_root_dir=tmp_path,
        )
        trainer.fit(recorder, datamodule=data(tiny_tokenizer, workers=workers), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return recorder.seen

    whole = train(5)
    first = train(3)
    assert first + train(5, tmp_path / "last.ckpt") == whole and len(whole) == 10
