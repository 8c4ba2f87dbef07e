import numpy as np
import pytest
import torch

from megactx.evaluation import context_use as module
from megactx.evaluation.context_use import context_use, copy_gain, cut_cost, drop_cost, loss_by_position, nll
from megactx.evaluation.model_card import model_card, write_model_card
from megactx.lm import BaseLM
from megactx.lm.masks import causal

VOCAB = 97


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    config = dict(
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
    )
    base = BaseLM.from_config(config).freeze()
    for p in base.parameters():  # random weights as they come hardly depend on the context
        p.mul_(3)
    return base


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [
        {
            "input_ids": np.concatenate([[0], rng.integers(1, VOCAB, size=1100 + 40 * i)]),
            "domain": ("narrative", "code")[i % 2],
            "text": i // 2,
        }
        for i in range(5)
    ]


def plain_nll(base, ids, positions=None):
    """NLL of every token but the first, of one sequence, by the plain model and log-softmax."""
    ids = torch.as_tensor(ids)[None]
    positions = torch.arange(ids.shape[1])[None] if positions is None else torch.as_tensor(positions)[None]
    with torch.no_grad():
        hidden = base(base.embed(ids), positions, causal(ids.shape[1]))
        logits = base.logits(hidden)[0, :-1]
    return -torch.log_softmax(logits, -1)[torch.arange(len(logits)), ids[0, 1:]]


def window(document, length, seed, row):
    ids = document["input_ids"]
    start = int(np.random.default_rng([seed, row]).integers(1, len(ids) - length + 2))
    return np.concatenate([ids[:1], ids[start : start + length - 1]])


def test_all_measures_are_finite_and_name_their_domains(base, documents):
    use = context_use(base, documents, length=1024)
    assert use.names("metric") == ["length", "loss_by_position", "copy_gain", "drop_cost", "cut_cost"]
    for measure in use.names("metric")[1:]:
        own = use.pick(metric=measure)
        assert set(own.names("domain")) == {"overall", "narrative", "code"}
        for row in own:
            assert np.isfinite([row[name] for name in ("point", "low", "high", "std")]).all()
    near = use.pick(metric="copy_gain", domain="overall").names("span")
    assert near == ["128", "256"], "farther ones do not fit into 1,024 tokens"
    counts = {row["domain"]: row["n"] for row in use.pick(metric="drop_cost", span="0")}
    assert counts == {"overall": 5, "narrative": 3, "code": 2}


def test_loss_by_position_equals_a_plain_loop(base, documents):
    got = loss_by_position(base, documents, 300)
    assert list(got) == ["1-7", "8-31", "32-127", "128-255", "256-299"]
    for row, document in enumerate(documents):
        plain = plain_nll(base, document["input_ids"][:300])
        assert got["8-31"][row] == pytest.approx(plain[7:31].mean().item(), rel=1e-5)
        assert got["256-299"][row] == pytest.approx(plain[255:].mean().item(), rel=1e-5)


def test_copy_gain_compares_the_same_tokens_at_the_same_positions(base, documents):
    passage, distance, before = 40, 64, module.BEFORE
    got = copy_gain(base, documents, distance, passage, seed=3)
    for row, document in enumerate(documents):
        ids = window(document, before + 2 * passage + distance, 3, row)
        first, between = ids[before : before + passage], ids[before + passage : before + passage + distance]
        other = ids[before + passage + distance :]
        twice = plain_nll(base, np.concatenate([ids[:before], first, between, first]))[-passage:]
        once = plain_nll(base, np.concatenate([ids[:before], other, between, first]))[-passage:]
        assert got[row] == pytest.approx((once - twice).mean().item(), abs=1e-4)


class Copier(torch.nn.Module):
    """Stands for a perfect copier: knows a token for sure if its bigram came before, else knows nothing."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size
        self.model = torch.nn.Linear(1, 1)
        self.model.device = torch.device("cpu")
        self.embed = torch.nn.Identity()

    def forward(self, ids, positions=None, mask=None, cache=None):
        logits = torch.zeros(*ids.shape, self.vocab_size)
        for b, row in enumerate(ids.tolist()):
            known = {}
            for t, token in enumerate(row):
                if token in known:
                    logits[b, t, known[token]] = 30.0
                if t + 1 < len(row):
                    known[token] = row[t + 1]
        return logits

    def logits(self, hidden):
        return hidden


def test_a_copier_gains_all_of_log_vocabulary_on_the_second_occurrence():
    passage = 10
    # Every token once: only the passage comes back.
    ids = np.arange(module.BEFORE + 2 * passage + 8)
    gain = copy_gain(Copier(200), [{"input_ids": ids, "domain": "code", "text": 0}], 8, passage)
    # All but the first token of the passage follow a known bigram; that one follows the end of the text between.
    assert gain[0] == pytest.approx(np.log(200) * (passage - 1) / passage, rel=1e-3)


def test_drop_cost_equals_a_fresh_pass_without_the_block(base, documents):
    length, seed = 192, 5
    got = drop_cost(base, documents[:3], length, seed)
    block, horizon = module.BLOCK, module.HORIZON
    last = (length - block - horizon) // block
    rng = np.random.default_rng([seed, 0, 1, 2])
    starts = [np.sort(rng.choice(np.arange(1, last + 1), min(8, last), replace=False)) * block for _ in range(3)]
    for row in range(3):
        ids = window(documents[row], length, seed, row)
        full, costs = plain_nll(base, ids), []
        for s in starts[row]:
            kept = np.r_[0:s, s + block : s + block + horizon]
            # The first target stands right behind the prefix: it is scored from row s - 1, as it should be.
            without = plain_nll(base, ids[kept], kept)[s - 1 :]
            costs.append(without - full[s + block - 1 : s + block + horizon - 1])
        cost = torch.stack(costs)
        for name, (first, end) in module.DROP_OFFSETS.items():
            assert got[name][row] == pytest.approx(cost[:, first:end].mean().item(), abs=1e-4), name


def test_cut_cost_equals_a_fresh_pass_over_sink_and_window(base, documents, monkeypatch):
    length, windows, seed = 400, (64, 32), 2
    monkeypatch.setattr(module, "TOKENS_PER_PASS", 1000)
    got = cut_cost(base, documents[:2], windows, length, seed)
    assert list(got) == ["64", "32"] and cut_cost(base, documents[:2], (), length, seed) == {}
    segment = module.SEGMENT
    rng = np.random.default_rng([seed, 0, 1])
    starts = rng.integers(length // 2, length - segment + 1, size=(2, module.SEGMENTS_PER_DOCUMENT))
    for row in range(2):
        ids = window(documents[row], length, seed, row)
        full = plain_nll(base, ids)
        for keep in windows:
            costs = []
            for p in starts[row]:
                kept = np.r_[0 : module.BLOCK, p - keep : p + segment]
                costs.append((plain_nll(base, ids[kept], kept)[-segment:] - full[p - 1 : p + segment - 1]).mean())
            assert got[str(keep)][row] == pytest.approx(torch.stack(costs).mean().item(), abs=1e-4)


def test_batch_size_changes_nothing_in_the_losses(base, documents, monkeypatch):
    ids = torch.from_numpy(np.stack([document["input_ids"][:200] for document in documents]))
    with torch.no_grad():
        assert torch.allclose(nll(base, ids), torch.cat([nll(base, row[None]) for row in ids]), atol=1e-4)
    all_ = loss_by_position(base, documents, 200)
    monkeypatch.setattr(module, "TOKENS_PER_PASS", 200)
    one = loss_by_position(base, documents, 200)
    assert one["32-127"] == pytest.approx(all_["32-127"], rel=1e-5)


def test_documents_that_are_all_too_short_are_refused(base, documents):
    with pytest.raises(ValueError, match="length=4096, but the longest document has 1261 tokens"):
        context_use(base, documents)


def test_model_card_states_training_and_all_four_measures(base, documents, tmp_path):
    use = context_use(base, documents, length=1024)
    facts = dict(name="tiny", data="two books", steps=100, tokens=1_000_000, parameters=5000, validation={"code": 2.0})
    write_model_card(tmp_path, facts | {"license": "apache-2.0"}, use)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlicense: apache-2.0\n") and "1,000,000" in text and "| code | 2.000 | 7.4 |" in text
    for heading in (
        "Loss by position",
        "A passage the second time",
        "A block is missing",
        "The far context is missing",
    ):
        assert heading in text
    assert f"{use.point(metric='drop_cost', domain='overall', span='8-31'):.3f}" in text
    with pytest.raises(ValueError, match="lack steps, tokens"):
        model_card({k: v for k, v in facts.items() if k not in ("steps", "tokens")}, use)
