"""Documents with a cursor, and facts planted far before it."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from megactx.data.planted import DISTRACTORS, KINDS, NEAR, plant
from megactx.data.windows_module import WindowData

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau".split()


class Texts:
    def __init__(self, documents=200, words=260):
        self.documents, self.words = documents, words

    def fingerprint(self):
        return f"windows {self.documents} {self.words}"

    def load(self):
        rng, domains = np.random.default_rng(0), ("narrative", "code")
        rows = [f"{i} " + " ".join(rng.choice(WORDS, self.words)) for i in range(self.documents)]
        return Dataset.from_list(
            [{"text": text, "domain": domains[i % 2], "source": str(i)} for i, text in enumerate(rows)]
        )


def data(tokenizer, **settings):
    defaults = dict(block=8, horizon=8, min_tokens=200, max_tokens=300, batch=4, seed=0)
    defaults["weights"] = {"narrative": 0.5, "code": 0.5}
    made = WindowData(Texts(), tokenizer, **defaults | settings)
    made.setup()
    return made


def test_a_training_document_is_a_function_of_seed_and_key_and_has_its_horizon(tiny_tokenizer):
    made, again = data(tiny_tokenizer), data(tiny_tokenizer)
    cursors = set()
    for key in ([0, 1], [0, 2], [1, 1], [5, 9]):
        one, two = made.training_document(key), again.training_document(key)
        assert torch.equal(one["ids"], two["ids"]) and one["cursor"] == two["cursor"]
        assert 200 <= one["cursor"] <= 300 and len(one["ids"]) == one["cursor"] + 8
        assert one["domain"] in ("narrative", "code")
        cursors.add(one["cursor"])
    assert len(cursors) > 1


def test_held_out_documents_are_not_trained_on_and_stand_at_the_cursor_that_is_asked_for(tiny_tokenizer):
    made = data(tiny_tokenizer)
    trained = {d["text"] for pool in made.pools.values() for d in pool}
    found = made.held_documents(count=6, tokens=250)
    assert len(found) == 6 and not trained & {d["text"] for d in found}
    assert all(d["cursor"] == 250 and len(d["ids"]) == 258 for d in found)
    assert {d["domain"] for d in found} == {"narrative", "code"}


def test_picks_are_a_function_of_seed_and_index(tiny_tokenizer):
    picks = data(tiny_tokenizer).train_dataloader().dataset
    assert torch.equal(picks[3], picks[3]) and not torch.equal(picks[3], picks[4])
    assert picks[0].shape == (4,) and ((picks[0] >= 0) & (picks[0] < 1)).all()


@pytest.mark.parametrize("kind", ["copy", "passage"])
def test_the_answer_stands_in_the_needed_block_and_its_cue_before_the_cursor(kind, tiny_tokenizer):
    made = data(tiny_tokenizer, block=32, horizon=32, min_tokens=600, max_tokens=650)
    rng = np.random.default_rng(0)
    plain = made.held_documents(tokens=600)[0]
    others = [d["input_ids"] for d in made.held]
    found = plant(plain, others, tiny_tokenizer, kind, 32, rng)
    ids, (block,) = found["ids"], found["needed"]
    answer = ids[600:]
    told = ids[block * 32 : (block + 1) * 32]
    assert torch.equal(told[-len(answer) :], answer)
    cue = 12 if kind == "copy" else 32
    start = block * 32 if kind == "copy" else (block - 1) * 32
    assert torch.equal(ids[600 - cue : 600], ids[start : start + cue])
    assert 0 < block and (block + 1) * 32 <= 600 * (1 - NEAR) + 32
    changed = (ids[:600] != plain["ids"][:600]).view(-1)[: 18 * 32].view(18, 32).any(1).sum()
    assert changed >= 1 + DISTRACTORS, "nothing else is foreign to the text"


def test_planted_cases_are_of_all_kinds_and_the_same_for_the_same_seed(tiny_tokenizer):
    settings = dict(block=32, horizon=32, min_tokens=600, max_tokens=650)
    made, again = (data(tiny_tokenizer, **settings).planted_cases(9, 600) for _ in range(2))
    assert len(made) == 9 and {"copy", "passage"} <= {case["kind"] for case in made} <= set(KINDS)
    assert all(torch.equal(a["ids"], b["ids"]) for a, b in zip(made, again, strict=True))
    assert all(case["cursor"] == 600 and 0 < len(case["ids"]) - 600 <= 32 for case in made)


def test_a_share_of_the_training_documents_is_planted(tiny_tokenizer):
    settings = dict(block=32, horizon=32, min_tokens=600, max_tokens=650)
    made = data(tiny_tokenizer, planted=0.5, **settings)
    share = sum("needed" in made.training_document([0, n]) for n in range(60)) / 60
    assert 0.2 < share < 0.7
    assert not any("needed" in data(tiny_tokenizer, **settings).training_document([0, n]) for n in range(5))


def test_an_unknown_kind_and_a_text_that_is_too_short_to_plant_in(tiny_tokenizer):
    made = data(tiny_tokenizer, block=32, horizon=32, min_tokens=200)
    document, others = made.held_documents(tokens=200)[0], [d["input_ids"] for d in made.held]
    with pytest.raises(ValueError, match="kind riddle is not known, allowed are copy, passage, key-value"):
        plant(document, others, tiny_tokenizer, "riddle", 32, np.random.default_rng(0))
    assert plant(document, others, tiny_tokenizer, "passage", 32, np.random.default_rng(0)) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(min_tokens=600), r"data.min_tokens=600, data.max_tokens=300 are not allowed"),
        (dict(max_tokens=20_000), r"at most 16376 tokens before the cursor"),
        (dict(min_tokens=290, max_tokens=9000, weights={"code": 1}), None),
        (dict(horizon=0), r"horizon.tokens=0 is not allowed"),
        (dict(planted=1.5), r"datamodule.planted=1.5 is not allowed"),
        (dict(weights={"poems": 1}), r"data.weights.poems=1.0: there is no document of that domain"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(settings, message, tiny_tokenizer):
    if message is None:
        data(tiny_tokenizer, **settings)
        return
    with pytest.raises(ValueError, match=message):
        data(tiny_tokenizer, **settings)
