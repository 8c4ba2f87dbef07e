import fcntl
import json
import logging
import os
import resource
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from megactx.data import encoding
from megactx.data.documents import TRAIN, VALIDATION, Part, Views, cut, length_of, split_of, tokenised
from megactx.data.encoding import Encoder
from megactx.data.pretraining import PretrainingBatches
from megactx.data.tokenizer import bos_id, load_tokenizer, tokenizer_hash, train_tokenizer
from megactx.framework.errors import RunFailed, verdict
from megactx.framework.files import PART


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


class Parted(Texts):
    """A source of several parts, of which one may fail."""

    def __init__(self, texts, name, fails=None):
        super().__init__(texts, name)
        self.fails, self.read = fails, []

    def parts(self):
        return [Part(f"{self.name} {text}", partial(self._rows, i, text)) for i, text in enumerate(self.texts)]

    def _rows(self, index, text):
        if index == self.fails:
            raise KeyboardInterrupt
        self.read.append(index)
        yield {"text": text, "domain": "code", "source": str(index)}


def test_an_interrupted_tokenising_goes_on_with_the_part_that_it_was_at(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path))
    texts = [f"text {i}" for i in range(4)]
    first, again = Parted(texts, "parts", fails=2), Parted(texts, "parts")
    with pytest.raises(KeyboardInterrupt):
        tokenised(first, tiny_tokenizer)
    assert {path.suffix for path in tmp_path.iterdir()} == {".arrow"}  # nothing half written
    rows = tokenised(again, tiny_tokenizer)
    assert (first.read, again.read) == ([0, 1], [2, 3])
    assert [tiny_tokenizer.decode(ids) for ids in rows["input_ids"]] == texts


def test_tokenising_tells_from_time_to_time_how_far_it_is(tiny_tokenizer, caplog, monkeypatch):
    monkeypatch.setattr("megactx.data.documents.SAY_EVERY", 0.0)
    with caplog.at_level(logging.INFO):
        tokenised(Parted(["one", "two"], "told"), tiny_tokenizer)
    assert "part 1 of 2" in caplog.text and "part 2 of 2" in caplog.text and "per second" in caplog.text


def test_a_full_disk_is_told_as_a_failed_run_with_the_place_and_leaves_no_temporary_file(
    tiny_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(RunFailed) as failed:
            tokenised(Texts(["some words " * 20_000], "full"), tiny_tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    code, message = verdict(failed.value)
    assert code == 3 and str(tmp_path) in message and "MEGACTX_CACHE" in message and "folder=" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_may_not_be_written_is_told_as_a_mistake_with_the_place(tiny_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError) as failed:
        tokenised(Texts(["some words"], "nowhere"), tiny_tokenizer)
    code, message = verdict(failed.value)
    assert code == 2 and str(tmp_path / "file") in message and "MEGACTX_CACHE" in message


def test_the_next_start_removes_what_killed_ones_have_left_and_nothing_that_is_in_use(
    tiny_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path))
    left, held = tmp_path / f"{PART}left", tmp_path / f"{PART}held"
    for folder in (left, held):
        folder.mkdir()
        (folder / "corpus.arrow").write_bytes(b"half")
    handle = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        tokenised(Texts(["anything"], "stale"), tiny_tokenizer)
        assert held.exists() and not left.exists()
    finally:
        os.close(handle)


def tokenizers(tiny):
    """One like GPT-2's, one that puts a mark in front of every text, one that lowers and drops white space."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = ["The quick brown fox, and 17 others. über die Brücke\n" * 20]
    marked = Tokenizer(models.BPE(byte_fallback=True))
    marked.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    marked.decoder = decoders.ByteFallback()
    special = ["<s>", *(f"<0x{i:02X}>" for i in range(256))]
    # Words as units of the training, as in those that have such a backend.
    words = [word for text in texts for word in text.replace(" ", " ▁").split(" ")]
    marked.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    lower = Tokenizer(models.WordPiece(unk_token="<s>"))
    lower.normalizer, lower.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    lower.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["<s>"], show_progress=False)
    )
    return {"bytes": tiny} | {
        name: PreTrainedTokenizerFast(tokenizer_object=one, bos_token="<s>")
        for name, one in (("marked", marked), ("lower", lower))
    }


@pytest.mark.parametrize("name", ["bytes", "marked", "lower"])
def test_a_long_text_has_the_ids_of_the_whole_text(tiny_tokenizer, name):
    tokenizer = tokenizers(tiny_tokenizer)[name]
    rng = np.random.default_rng(0)
    words = ["The", "quick", "fox,", "17", "über", "\n", "\n\n", "  ", "\t", "voilà!", "🙂", "你好", "<s>", "..", "x_1"]
    text = " ".join(rng.choice(words, 60_000))
    assert len(text) > 3 * encoding.PIECE
    ids, short = Encoder(tokenizer)([text, "The fox"])
    assert ids.dtype == np.int32
    assert ids.tolist() == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert short.tolist() == tokenizer("The fox", add_special_tokens=False)["input_ids"]


def test_one_word_that_is_longer_than_a_piece_loses_nothing(tiny_tokenizer):
    text = "".join(np.random.default_rng(0).choice(list("abcde"), 200_000)) + "a" * 200_000 + " " * 200_000 + "end"
    (ids,) = Encoder(tiny_tokenizer)([text])
    assert tiny_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
TRIED = [
    *"aBé7½.'s_\n\r\t   \xa0你🙂\u0301ltß\u0378\u2028",
    "'ll",
    "'ſ",  # in some libraries an s, where case does not count
    "<|bos|>",
    "12 3",
    "\n    ",
    *'()[]{}"@~^',
    "def",
    " x",
]


def byte_level(pretokenizer):
    """A byte-level BPE of 600 ids behind it, trained on code and on random letters, so that merges have many ties."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng, one = np.random.default_rng(1), Tokenizer(models.BPE())
    one.pre_tokenizer = pretokenizer
    texts = [Path(json.__file__).read_text(), *("".join(rng.choice(list("abcd 1é"), 2000)) for _ in range(20))]
    letters = pre_tokenizers.ByteLevel.alphabet()
    one.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=letters, special_tokens=["<|bos|>", "<s>"], show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=one, bos_token="<s>", split_special_tokens=True)


def byte_levels() -> dict:
    from tokenizers import Regex, pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    unsplit = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), unsplit])
    return {"gpt2": plain, "digits": digits, "llama3": split}


@pytest.mark.parametrize("name", ["gpt2", "digits", "llama3"])
def test_merges_by_rank_give_the_ids_of_the_tokenizer(name):
    rng, tokenizer = np.random.default_rng(0), byte_level(byte_levels()[name])
    merges = Encoder(tokenizer).merges
    texts = ["".join(rng.choice(TRIED, 30)) for _ in range(2000)]
    texts += ["".join(rng.choice(list("abcd 1é"), 200)) for _ in range(200)]
    # Long words are merged by another algorithm there.
    texts += ["".join(rng.choice(list(few), n)) for few in ("abcd", "a", "aé", "é1", "()", "\n ") for n in (499, 3000)]
    found = [merges(text) for text in texts]
    assert sum(ids is not None for ids in found) > 500  # the others have characters that were not tried
    whole = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert all(ids is None or ids.tolist() == right for ids, right in zip(found, whole, strict=True))


def test_many_texts_and_long_ones_have_the_ids_of_each_alone():
    rng, tokenizer = np.random.default_rng(0), byte_level(byte_levels()["digits"])
    texts = ["".join(rng.choice(TRIED, size)) for size in (0, 3, 200, 20_000, 50_000)]
    texts += [text.replace("你", "").replace("🙂", "") for text in texts]
    whole = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    assert [ids.tolist() for ids in Encoder(tokenizer)(texts)] == whole


@pytest.mark.parametrize("change", ["two ways to a token", "a token that its text does not become", "no byte", "added"])
def test_what_ranks_cannot_tell_stays_with_the_tokenizer(change):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    rules = json.loads(byte_level(byte_levels()["gpt2"]).backend_tokenizer.to_str())
    model = rules["model"]
    if change == "two ways to a token":  # which of them comes first depends on what is around
        model["vocab"] |= {"xy": 600, "yz": 601, "xyz": 602}
        model["merges"] += [["y", "z"], ["x", "y"], ["x", "yz"], ["xy", "z"]]
    elif change == "a token that its text does not become":
        model["vocab"] |= {"yz": 600, "xy": 601, "xyz": 602}
        model["merges"] += [["y", "z"], ["x", "y"], ["xy", "z"]]
    elif change == "no byte":
        del model["vocab"]["Ć"]  # byte 6
    else:
        added = {name: False for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        rules["added_tokens"] += [added | {"id": 600, "content": "def"}]
    backend = Tokenizer.from_str(json.dumps(rules))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", split_special_tokens=True)
    encoder, text = Encoder(tokenizer), "xyz xyyz yz axyz def xyzxyz \x06x \x07 " * 4000
    if change == "a token that its text does not become":
        assert b"xyz" not in encoder.merges.encoding._mergeable_ranks
    elif change == "no byte":
        assert encoder.merges("x\x06") is None and encoder.merges("x\x07") is not None
    else:
        assert encoder.merges is None
    assert encoder([text])[0].tolist() == tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def test_truncation_and_padding_of_a_tokenizer_do_not_reach_the_corpus(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    other = load_tokenizer(tmp_path)
    other(["one two three four", "one"], truncation=True, max_length=2, padding=True)
    assert (
        Encoder(other)(["one two three four"])[0].tolist()
        == Encoder(tiny_tokenizer)(["one two three four"])[0].tolist()
    )
    assert tokenizer_hash(other) == tokenizer_hash(tiny_tokenizer)


MEMORY = """
import resource, sys
from megactx.data.documents import tokenised, cut
from megactx.data.files import Files
from megactx.data.tokenizer import load_tokenizer
tokenizer = load_tokenizer("asset:tiny-base")
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokenised(Files(sys.argv[1]), tokenizer)
before = peak()
cut(tokenised(Files(sys.argv[2]), tokenizer), None, tokenizer, 1, 1024)
print((peak() - before) / int(sys.argv[3]))
"""


@pytest.mark.slow
def test_a_long_text_takes_at_most_ten_bytes_of_memory_for_each_of_its_bytes(tmp_path):
    library = Path(sysconfig.get_path("stdlib"))
    text = "".join(path.read_text() for path in sorted(library.glob("*.py"))[:100])
    size = 2**24
    (tmp_path / "small.txt").write_text(text[:400_000])
    (tmp_path / "large.txt").write_text((text * (size // len(text) + 1))[:size])
    asked = [str(tmp_path / "small.txt"), str(tmp_path / "large.txt"), str(size)]
    environment = os.environ | {"MEGACTX_CACHE": str(tmp_path / "cache"), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([sys.executable, "-c", MEMORY, *asked], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10


def test_documents_are_views_of_the_ids_on_disk(tiny_tokenizer):
    rows = tokenised(Texts(["the quick brown fox. " * 60], "views"), tiny_tokenizer)
    documents, _ = cut(rows, None, tiny_tokenizer, 32, 100)
    assert documents[0].piece.dtype == np.int32 and all(np.shares_memory(d.piece, Views(rows)[0]) for d in documents)
    assert rows.cache_files and documents[0]["input_ids"].dtype == np.int64
    assert length_of(documents[0]) == len(documents[0]["input_ids"]) == 100
    assert (documents[0] | {"domain": "other"})["domain"] == "other" and set(documents[0]) == {
        "input_ids",
        "domain",
        "source",
        "text",
    }


def test_texts_of_several_files_are_read_by_their_number(tiny_tokenizer):
    kept = [Texts([f"{word} {n} stands here. " * (5 + n) for n in range(3)], word) for word in ("one", "two", "three")]
    source = Parted([], "three files")
    source.parts = lambda: [Part(texts.fingerprint(), lambda texts=texts: iter(texts.load())) for texts in kept]
    rows = tokenised(source, tiny_tokenizer)
    texts, plain = Views(rows), rows["input_ids"]
    assert len(texts) == len(plain) == 9 and texts.lengths.tolist() == [len(ids) for ids in plain]
    assert [texts[n].tolist() for n in (8, 0, 4)] == [list(plain[n]) for n in (8, 0, 4)]
    assert [ids.tolist() for ids in texts] == [list(ids) for ids in plain]
    for outside in (9, -1):
        with pytest.raises(IndexError):
            texts[outside]


def test_a_window_is_of_the_text_that_numpy_chooses_by_length(tiny_tokenizer):
    rows = tokenised(Texts([f"number {n} is told. " * (40 + 17 * n) for n in range(12)], "by length"), tiny_tokenizer)
    phases = [{"steps": 1, "tokens": 128, "batch": 1}]
    batches = PretrainingBatches(rows, tiny_tokenizer, phases, {"code": 1.0}, 0.0, 0.0, 512, seed=5)
    texts, splits = Views(rows), np.asarray(rows["split"])
    index = np.flatnonzero((splits == TRAIN) & (texts.lengths >= 128))
    share = texts.lengths[index] / texts.lengths[index].sum()
    for n in (0, 7, 10**9):
        rng = np.random.default_rng([5, n])
        rng.choice(1, p=[1.0])
        row = rng.choice(index, p=share)
        start = rng.integers(0, texts.lengths[row] - 128 + 2)
        assert batches[n]["ids"][0, 1:].tolist() == texts[row][start : start + 127].tolist()


def test_a_weight_without_documents_names_the_setting_that_decides(tiny_tokenizer):
    rows = tokenised(Texts(["the quick brown fox. " * 200] * 20, "weights"), tiny_tokenizer)
    phases = [dict(steps=1, tokens=128, batch=1)]
    with pytest.raises(ValueError, match=r"datamodule\.weights\.narrative=1"):
        PretrainingBatches(rows, tiny_tokenizer, phases, {"narrative": 1}, 0, 0, 512, 0)
    with pytest.raises(ValueError, match=r"datamodule\.weights="):
        PretrainingBatches(rows, tiny_tokenizer, phases, {"narrative": 0}, 0, 0, 512, 0)


def test_a_write_that_was_killed_is_not_taken_for_a_cache(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path))
    source = Texts(["five", "six"], "killed")
    tokenised(source, tiny_tokenizer)
    (final,) = tmp_path.iterdir()
    final.write_bytes(final.read_bytes()[:100])
    (tmp_path / f"{PART}killed").mkdir()
    final.rename(tmp_path / f"{PART}killed" / final.name)
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


def test_tokenizers_that_split_texts_otherwise_have_other_hashes(tiny_tokenizer, tmp_path):
    from tokenizers import Regex, pre_tokenizers

    tiny_tokenizer.save_pretrained(tmp_path)
    other = load_tokenizer(tmp_path)
    split = pre_tokenizers.Split(Regex("\\n"), "isolated")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, tiny_tokenizer.backend_tokenizer.pre_tokenizer]
    )
    assert other.get_vocab() == tiny_tokenizer.get_vocab()
    assert tokenizer_hash(other) != tokenizer_hash(tiny_tokenizer)


@pytest.mark.parametrize("name", ["asset:no-such-base", "no/such/folder/here"])
def test_a_folder_without_a_tokenizer_is_refused(name):
    with pytest.raises(ValueError, match=f"tokenizer={name}"):
        load_tokenizer(name)
