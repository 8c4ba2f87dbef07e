import pytest
from datasets import Dataset

from megactx.data.documents import TRAIN, VALIDATION, cut, split_of, tokenised
from megactx.data.tokenizer import bos_id, load_tokenizer, tokenizer_hash, train_tokenizer


class Texts:
    """A source that counts how often it is read."""

    def __init__(self, texts, name="texts"):
        self.texts, self.name, self.loads = texts, name, 0

    def fingerprint(self):
        return f"{self.name} {hash(tuple(self.texts))}"

    def load(self):
        self.loads += 1
        return Dataset.from_list([{"text": t, "domain": "code", "source": f"{i}"} for i, t in enumerate(self.texts)])


def test_a_corpus_is_tokenised_once(tiny_tokenizer):
    source = Texts(["one", "two"], "once")
    first, second = tokenised(source, tiny_tokenizer), tokenised(source, tiny_tokenizer)
    assert source.loads == 1
    assert first[:] == second[:]
    assert tiny_tokenizer.decode(first[1]["input_ids"]) == "two"


def test_another_tokenizer_does_not_read_the_cache(tiny_tokenizer):
    source = Texts(["three", "four"], "another")
    tokenised(source, tiny_tokenizer)
    tokenised(source, train_tokenizer(["three four"], 260, progress=False))
    assert source.loads == 2


def test_an_interrupted_write_leaves_nothing_and_is_not_taken_for_a_cache(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path))
    source = Texts([f"text {i}" for i in range(200)], "crash")

    class Crash:
        calls = 0

        def __getattr__(self, name):
            return getattr(tiny_tokenizer, name)

        def __call__(self, texts, **settings):
            self.calls += 1
            if self.calls > 3:  # past the tokenizer's hash: within the second block of rows
                raise KeyboardInterrupt
            return tiny_tokenizer(texts, **settings)

    with pytest.raises(KeyboardInterrupt):
        tokenised(source, Crash())
    assert list(tmp_path.iterdir()) == []
    assert len(tokenised(source, tiny_tokenizer)) == 200
    assert [path.suffix for path in tmp_path.iterdir()] == [".arrow"]


def test_a_write_that_was_killed_is_not_taken_for_a_cache(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path))
    source = Texts(["five", "six"], "killed")
    tokenised(source, tiny_tokenizer)
    (final,) = tmp_path.iterdir()
    final.write_bytes(final.read_bytes()[:100])
    final.rename(final.with_suffix(".12345.part"))
    assert len(tokenised(source, tiny_tokenizer)) == 2


def test_a_source_without_documents_is_refused(tiny_tokenizer):
    class Nothing(Texts):
        def load(self):
            return Dataset.from_dict({"text": [], "domain": [], "source": []})

    with pytest.raises(ValueError, match="no documents"):
        tokenised(Nothing([], "nothing"), tiny_tokenizer)


def test_the_split_is_a_fixed_hash_of_the_text():
    sides = [split_of(f"text {i}") for i in range(2000)]
    assert 0.08 < sides.count(VALIDATION) / len(sides) < 0.12
    # Written down: a change of the rule would mix the two sides of models that are already trained.
    assert [i for i in range(60) if sides[i] == VALIDATION] == [0, 13, 21, 23, 33, 39, 49, 50]


def test_pieces_of_one_text_stay_on_one_side_and_open_with_bos(tiny_tokenizer):
    source = Texts([f"{i} " + "the quick brown fox. " * 60 for i in range(40)], "pieces")
    rows = tokenised(source, tiny_tokenizer)
    train, _ = cut(rows, TRAIN, tiny_tokenizer, 32, 100)
    held, _ = cut(rows, VALIDATION, tiny_tokenizer, 32, 100)
    every, _ = cut(rows, None, tiny_tokenizer, 32, 100)
    assert {d["text"] for d in train}.isdisjoint(d["text"] for d in held)
    assert len(every) == len(train) + len(held)
    assert all(d["input_ids"][0] == bos_id(tiny_tokenizer) and 32 <= len(d["input_ids"]) <= 100 for d in every)


def test_short_texts_are_dropped_and_counted(tiny_tokenizer):
    rows = tokenised(Texts(["short", "long enough " * 50], "short"), tiny_tokenizer)
    documents, dropped = cut(rows, None, tiny_tokenizer, 64, 4096)
    assert (len(documents), dropped) == (1, 1)


def test_special_token_strings_are_encoded_as_text(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    for tokenizer in (tiny_tokenizer, load_tokenizer(tmp_path)):
        ids = tokenizer("a <|bos|> b <|pad|>", add_special_tokens=False)["input_ids"]
        assert not set(ids) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(ids) == "a <|bos|> b <|pad|>"


def test_a_tokenizer_keeps_its_hash_when_saved_and_another_has_another(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(load_tokenizer(tmp_path)) == tokenizer_hash(tiny_tokenizer)
    assert tokenizer_hash(train_tokenizer(["abc"], 260, progress=False)) != tokenizer_hash(tiny_tokenizer)


@pytest.mark.parametrize("name", ["asset:no-such-base", "no/such/folder/here"])
def test_a_folder_without_a_tokenizer_is_refused(name):
    with pytest.raises(ValueError, match=f"tokenizer={name}"):
        load_tokenizer(name)
